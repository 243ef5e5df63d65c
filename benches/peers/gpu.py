"""Times one of PyTorch's fused attention paths on a GPU, on request.

Reads one JSON object a line: {"b", "t", "s", "n", "k", "h", "dtype", "causal", "backward", "terms", "calls", "path"}, the
path one of "cudnn", "flash", "efficient"; writes one a line: {"device_us", "host_us"} of a call, or {"error"} where the path
refuses. The first line it writes names the versions.
"""

import json
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def timed(call, calls):
    call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    device = start.elapsed_time(end) * 1e3 / calls
    # Few enough calls that none waits for room in the stream.
    begin = time.perf_counter()
    for _ in range(20):
        call()
    host = (time.perf_counter() - begin) * 1e6 / 20
    torch.cuda.synchronize()
    return {"device_us": device, "host_us": host}


PATHS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def run(case):
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[case["dtype"]]

    def tensor(length, heads):
        x = torch.randn(case["b"], length, heads, case["h"], device="cuda", dtype=dtype)
        return x.transpose(1, 2)

    q, k, v = tensor(case["t"], case["n"]), tensor(case["s"], case["k"]), tensor(case["s"], case["k"])
    options = {"is_causal": case["causal"], "enable_gqa": case["n"] != case["k"]}
    if case["terms"] == "bias":
        options["attn_mask"] = torch.randn(1, case["n"], case["t"], case["s"], device="cuda", dtype=dtype)
    if case["terms"] == "mask":
        options["attn_mask"] = torch.rand(case["b"], 1, case["t"], case["s"], device="cuda") > 0.1
    if case["terms"] == "dropout":
        options["dropout_p"] = 0.125
    with sdpa_kernel(PATHS[case["path"]]):
        if not case["backward"]:
            with torch.no_grad():
                return timed(lambda: F.scaled_dot_product_attention(q, k, v, **options), case["calls"])
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, **options)
        d_out = torch.randn_like(out)
        return timed(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True), case["calls"])


warnings.filterwarnings("ignore")
print(json.dumps({"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}), flush=True)
for line in sys.stdin:
    try:
        answer = run(json.loads(line))
    except Exception as error:  # whatever torch refuses is an answer
        answer = {"error": str(error).splitlines()[0]}
    print(json.dumps(answer), flush=True)
