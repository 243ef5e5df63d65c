#!/bin/sh
# PyTorch: a tensor that NumPy and PyTorch call contiguous is exported through DLPack with the strides that its axes of size 1 happen to have.
#
# Installs torch 2.15.0, which is large (some GB), in a temporary folder, and runs it without this project. Fails where the behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/python"
"$folder/python/bin/pip" install --quiet torch==2.15.0 numpy
"$folder/python/bin/python" - <<'END'
import ctypes

import torch

print("torch", torch.__version__)


class Tensor(ctypes.Structure):
    """DLTensor of DLPack."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 4), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]


# One element more than the strides of axes with more than one element reach: 8 numbers are the whole memory.
tensor = torch.as_strided(torch.arange(8.0), (1, 8, 1, 1), (999, 1, 777, 1))
assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == 8 * 4
capsule = torch.utils.dlpack.to_dlpack(tensor)
pointer = ctypes.pythonapi.PyCapsule_GetPointer
pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
exported = Tensor.from_address(pointer(capsule, b"dltensor"))
strides = exported.strides[: exported.ndim]
print("shape", exported.shape[: exported.ndim], "is contiguous, exported strides", strides)
assert strides == [999, 1, 777, 1]
END
