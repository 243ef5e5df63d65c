"""Reading and writing a golden set: safetensors files by hand, and the manifest.

The format is small (https://github.com/huggingface/safetensors, "Format"), and writing it here makes the
bytes a function of the content alone.
"""

import json
import pathlib
import struct

import numpy as np

# Name in a file, name in the manifest.
_DTYPES = {"F64": "float64", "F32": "float32", "I32": "int32", "BOOL": "bool"}
_FILE_NAMES = {manifest_name: file_name for file_name, manifest_name in _DTYPES.items()}


def write_safetensors(path, tensors, metadata):
    """Writes `tensors` (name -> array) and the string pairs of `metadata`."""
    header = {"__metadata__": metadata}
    chunks, position = [], 0
    # Widest elements first, so that every tensor starts at a multiple of its element size.
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        array = tensors[name]
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": _FILE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + len(data)],
        }
        chunks.append(data)
        position += len(data)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(chunks))


def read_safetensors(path):
    """The tensors of a file, name -> array."""
    content = pathlib.Path(path).read_bytes()
    (header_length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_length])
    data = content[8 + header_length :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<")
            tensors[name] = np.frombuffer(data[begin:end], dtype=dtype).reshape(entry["shape"])
    return tensors


def describe(tensors):
    """The `tensors` value of a manifest entry: name -> [dtype, shape]."""
    return {name: [array.dtype.name, list(array.shape)] for name, array in tensors.items()}


def write_set(directory, manifest, cases, metadata):
    """Writes manifest.json and one file for each (manifest entry, tensors) of `cases`.

    Files of an earlier run that this one does not write are removed.
    """
    directory = pathlib.Path(directory)
    (directory / "cases").mkdir(parents=True, exist_ok=True)
    for old in (directory / "cases").glob("*.safetensors"):
        old.unlink()
    for entry, tensors in cases:
        write_safetensors(directory / entry["file"], tensors, metadata)
    manifest = {**manifest, "n_cases": len(cases), "cases": [entry for entry, _ in cases]}
    text = json.dumps(manifest, indent=1, allow_nan=False)
    (directory / "manifest.json").write_text(text + "\n")


def read_manifest(directory):
    """The manifest of a set."""
    return json.loads((pathlib.Path(directory) / "manifest.json").read_text())
