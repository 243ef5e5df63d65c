"""Runs another library's attention on the CPU, one timed call at a time, for `cargo xtask bench --peer`.

    peer.py --peer torch|jax --threads N

The benchmark keeps this process alive and alternates with it (ours, the peer's, ours, ...), so that
both see the same machine. Each line of stdin is a JSON object, and each gets one line back on stdout.
Whatever the libraries themselves print goes to stderr.

At start, then exit 0 when not ready:

    {"ready": true, "peer": "torch", "version": "2.13.0", "device": "cpu", "threads": 2}
    {"ready": false, "reason": "No module named 'torch'"}

`prepare` makes the inputs, warms the call up, and frees those of the one before. `path` is `math`
(materialises the logits), `fused`, or `default` (what a user gets); the answer names what runs.
`mask` is `none`, `bool` ([B,1,T,S]) or `bias` ([1,N,T,S], in the dtype of the query); causal is
top-left. `both` is the forward and the backward pass, with gradients for query, key and value.
`limit_bytes` (optional) refuses a call whose logits would take more than that. `lengths` (optional) are query
rows and keys of each sequence: the ones here take no packed tensors, so they compute the whole rectangle with a
boolean mask of the padding keys, [B,1,1,S], and [B,1,T,S] where torch needs a causal call's mask in it.

    {"op": "prepare", "b": 1, "t": 512, "s": 512, "n": 8, "k": 8, "h": 64, "hv": 64, "dtype": "f32",
     "pass": "both", "causal": false, "mask": "none", "path": "math", "threads": 2, "limit_bytes": 4000000000}
    {"ok": true, "path": "MATH"}
    {"ok": false, "reason": "..."}

`time` makes `repeats` calls and gives the milliseconds of each; `quit` ends, as does the end of stdin.

    {"op": "time", "repeats": 3}
    {"ok": true, "ms": [1.91, 1.87, 1.88]}
    {"op": "quit"}
"""

import argparse
import contextlib
import json
import os
import sys
import time

import numpy as np


class Refused(Exception):
    """The peer cannot do what was asked; the text goes back as the reason."""


def materialised_bytes(request):
    """Logits and probabilities in f32 or wider, twice that where the backward pass has theirs as well."""
    element = 8 if request["dtype"] == "f64" else 4
    copies = 4 if request["pass"] == "both" else 2
    return copies * element * request["b"] * request["n"] * request["t"] * request["s"]


def inputs(request):
    """Query, key, value and the output's gradient in BTNH order, and the mask or bias, in f32 (f64 for f64)."""
    random = np.random.default_rng(0)
    real = np.float64 if request["dtype"] == "f64" else np.float32
    b, t, s, n, k, h, hv = (request[name] for name in ("b", "t", "s", "n", "k", "h", "hv"))
    shapes = [(b, t, n, h), (b, s, k, h), (b, s, k, hv), (b, t, n, hv)]
    tensors = [random.standard_normal(shape, dtype=real) for shape in shapes]
    mask = bias = None
    if request["mask"] == "bool":
        mask = random.random((b, 1, t, s), dtype=np.float32) < 0.9
        # No row may be empty: the libraries do not agree on what it gives.
        mask[..., 0] = True
    elif request["mask"] == "bias":
        bias = random.standard_normal((1, n, t, s), dtype=real)
    elif request.get("lengths"):
        keys = np.array([keys for _, keys in request["lengths"]])
        mask = (np.arange(s) < keys[:, None])[:, None, None, :]
    return tensors, mask, bias


class Torch:
    def __init__(self, threads):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        self.torch = torch
        self.version = torch.__version__
        self.threads = threads
        torch.set_num_threads(threads)

    def prepare(self, request):
        """Returns a function that makes one call, and the name of the implementation that it runs."""
        torch = self.torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        selection = {
            "math": lambda: sdpa_kernel(SDPBackend.MATH),
            "fused": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
            "default": contextlib.nullcontext,
        }[request["path"]]
        if request["causal"] and request["mask"] != "none":
            raise Refused("torch takes a mask or is_causal, not both")
        torch.set_num_threads(request["threads"])
        dtype = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[request["dtype"]]
        both = request["pass"] == "both"

        tensors, mask, bias = inputs(request)
        # Storage stays BTNH: a transposed view is what users pass.
        query, key, value, grad = (torch.from_numpy(x).to(dtype).transpose(1, 2) for x in tensors)
        for tensor in (query, key, value):
            tensor.requires_grad_(both)
        is_causal = request["causal"]
        if mask is not None:
            if is_causal:
                mask, is_causal = mask & np.tri(request["t"], request["s"], dtype=bool), False
            attn_mask = torch.from_numpy(mask)
        else:
            attn_mask = None if bias is None else torch.from_numpy(bias).to(dtype)
        options = {
            "attn_mask": attn_mask,
            "is_causal": is_causal,
            "enable_gqa": request["k"] < request["n"],
        }

        def call():
            with selection(), torch.set_grad_enabled(both):
                out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
                if both:
                    torch.autograd.grad(out, (query, key, value), grad)

        with selection():
            chosen = SDPBackend(torch._fused_sdp_choice(query, key, value, **options))
        if chosen == SDPBackend.ERROR:
            raise Refused(f"torch has no {request['path']} implementation for this call")
        if chosen == SDPBackend.MATH:
            guard(request)
        return call, chosen.name + padded(request)


class Jax:
    def __init__(self, threads):
        # The only limit that XLA's CPU thread pools honour, and only when set before they start.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_ENABLE_X64"] = "1"
        import jax

        self.jax = jax
        self.version = jax.__version__
        self.threads = len(os.sched_getaffinity(0))

    def prepare(self, request):
        """Returns a function that makes one call, and the name of the implementation that it runs."""
        jax = self.jax
        jnp = jax.numpy
        if request["threads"] != self.threads:
            raise Refused(f"started with {self.threads} threads, and JAX cannot change that later")
        if request["path"] == "fused":
            raise Refused("JAX has no fused implementation on the CPU")
        guard(request)
        dtype = {"f64": jnp.float64, "f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}[request["dtype"]]

        tensors, mask, bias = inputs(request)
        query, key, value, grad = (jnp.asarray(x, dtype) for x in tensors)
        mask = None if mask is None else jnp.asarray(mask)
        bias = None if bias is None else jnp.asarray(bias, dtype)

        # Arrays are arguments: those that a jitted function closes over may be folded into constants.
        def forward(query, key, value, mask, bias):
            return jax.nn.dot_product_attention(
                query, key, value, bias=bias, mask=mask, is_causal=request["causal"], implementation="xla"
            )

        def both(query, key, value, mask, bias, grad):
            out, backward = jax.vjp(lambda q, k, v: forward(q, k, v, mask, bias), query, key, value)
            return out, backward(grad)

        if request["pass"] == "both":
            function, arguments = jax.jit(both), (query, key, value, mask, bias, grad)
        else:
            function, arguments = jax.jit(forward), (query, key, value, mask, bias)
        return lambda: jax.block_until_ready(function(*arguments)), "XLA" + padded(request)


def padded(request):
    """What the name of an implementation is followed by where padding is masked."""
    return " padded" if request.get("lengths") else ""


def guard(request):
    limit = request.get("limit_bytes")
    if limit is not None and materialised_bytes(request) > limit:
        raise Refused(f"materialised logits need {materialised_bytes(request)} bytes, limit {limit}")


def timed(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["torch", "jax"], required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    # From here on file descriptor 1 is stderr, also for what native code prints.
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields):
        print(json.dumps(fields), file=protocol, flush=True)

    try:
        peer = {"torch": Torch, "jax": Jax}[args.peer](args.threads)
    except Exception as error:
        answer(ready=False, reason=str(error))
        return
    answer(ready=True, peer=args.peer, version=peer.version, device="cpu", threads=peer.threads)

    call = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["op"] == "quit":
                return
            elif request["op"] == "prepare":
                # The tensors of the call before go first: both sets may not fit.
                call = None
                prepared, path = peer.prepare(request)
                prepared()
                call = prepared
                answer(ok=True, path=path)
            elif request["op"] == "time":
                if call is None:
                    raise Refused("nothing is prepared")
                answer(ok=True, ms=[timed(call) for _ in range(request["repeats"])])
            else:
                raise Refused(f"unknown op {request['op']!r}")
        except KeyError as error:
            answer(ok=False, reason=f"unknown or missing: {error}")
        except Exception as error:
            answer(ok=False, reason=str(error) or type(error).__name__)


if __name__ == "__main__":
    main()
