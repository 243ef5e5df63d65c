"""Times cuDNN's attention through PyTorch, on request.

Reads one JSON object a line: {"b", "t", "n", "k", "h", "causal", "backward", "calls"}; writes one a line:
{"device_us", "host_us"} of a call, or {"error"}. The first line it writes names the versions.
"""

import json
import sys
import time

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


def run(case):
    def tensor(heads):
        x = torch.randn(case["b"], case["t"], heads, case["h"], device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2)

    q, k, v = tensor(case["n"]), tensor(case["k"]), tensor(case["k"])
    gqa = case["n"] != case["k"]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        if not case["backward"]:
            with torch.no_grad():
                return timed(
                    lambda: F.scaled_dot_product_attention(q, k, v, is_causal=case["causal"], enable_gqa=gqa),
                    case["calls"],
                )
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=case["causal"], enable_gqa=gqa)
        d_out = torch.randn_like(out)
        return timed(lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True), case["calls"])


print(json.dumps({"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}), flush=True)
for line in sys.stdin:
    try:
        answer = run(json.loads(line))
    except Exception as error:  # whatever torch refuses is an answer
        answer = {"error": str(error).splitlines()[0]}
    print(json.dumps(answer), flush=True)
