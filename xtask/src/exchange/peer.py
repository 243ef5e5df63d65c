"""Tensors of PyTorch through DLPack to the library and back: `peer.py LIBRARY`."""

import ctypes
import resource
import sys

try:
    import torch
except ImportError as error:
    print(f"skipped: {error}")
    print("0 passed, 0 failed, 1 skipped")
    sys.exit()

from torch.nn.functional import scaled_dot_product_attention

library = ctypes.CDLL(sys.argv[1])
python = ctypes.pythonapi
python.PyCapsule_GetPointer.restype = ctypes.c_void_p
python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
python.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
python.PyCapsule_New.restype = ctypes.py_object
python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

# Capsules keep the address of their name.
NAMES = {True: (b"dltensor_versioned", b"used_dltensor_versioned"), False: (b"dltensor", b"used_dltensor")}


def take(tensor, versioned):
    """What the tensor's capsule holds, taken out of it."""
    capsule = tensor.__dlpack__(max_version=(1, 0)) if versioned else tensor.__dlpack__()
    name, used = NAMES[versioned]
    pointer = python.PyCapsule_GetPointer(capsule, name)
    python.PyCapsule_SetName(capsule, used)
    return pointer


def attention(query, key, value, versioned):
    function = library.attention_versioned if versioned else library.attention_unversioned
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p] * 3
    out = function(*(take(tensor, versioned) for tensor in (query, key, value)))
    if not out:
        raise RuntimeError("the library refused")
    return torch.utils.dlpack.from_dlpack(python.PyCapsule_New(out, NAMES[versioned][0], None))


def cases():
    for dtype, tolerance in [
        (torch.float64, 1e-13),
        (torch.float32, 2e-6),
        (torch.float16, 4e-3),
        (torch.bfloat16, 3e-2),
    ]:
        torch.manual_seed(1)
        make = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
        stored = make(2, 4, 9, 3, 16)
        fused = make(2, 11, 12, 16)
        yield f"contiguous {dtype}", [make(2, 9, 4, 16) for _ in range(3)], tolerance
        yield f"transposed {dtype}", [stored[..., i, :].transpose(1, 2) for i in range(3)], tolerance
        yield f"slices of a fused buffer {dtype}", [fused[:, 1:10, 4 * i : 4 * i + 4] for i in range(3)], tolerance
        yield f"expanded {dtype}", [make(1, 9, 4, 16).expand(3, 9, 4, 16)] * 3, tolerance


passed, failed, skipped = 0, 0, 0
for name, tensors, tolerance in cases():
    want = scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in tensors), is_causal=True).transpose(1, 2)
    for versioned in (True, False):
        label = f"{name}, {'versioned' if versioned else 'unversioned'}"
        try:
            got = attention(*tensors, versioned)
        except TypeError as error:
            # A torch that has no capsules with a version.
            print(f"{label}: skipped: {error}")
            skipped += 1
            continue
        difference = (got.double() - want).abs().max().item()
        good = got.shape == want.shape and got.dtype == tensors[0].dtype and difference <= tolerance
        passed, failed = passed + good, failed + (not good)
        print(f"{label}: largest difference {difference:.1e}{'' if good else ' FAILED'}")

# Memory goes back to its owner: 200 results of 8 MiB each are not kept, and neither are the inputs.
query, key = torch.zeros(1, 4096, 8, 64), torch.zeros(1, 1, 8, 64)
attention(query, key, key, False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for turn in range(200):
    attention(query.clone(), key.clone(), key.clone(), turn % 2 == 0)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
passed, failed = passed + (grown < 400), failed + (grown >= 400)
print(f"the process grew by {grown:.0f} MiB over 200 calls")
print(f"torch {torch.__version__}")
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(failed > 0)
