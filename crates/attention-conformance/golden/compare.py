"""Comparing a stored golden set with a freshly generated one."""

import pathlib

import numpy as np

import storage

# Another machine may round a sum differently: what NumPy or JAX computed in float64 is held to this.
FLOAT64_TOLERANCE = 1e-12
# Outputs of unmodified JAX are a yardstick; they may move with the compiler, and a real change is far larger.
YARDSTICK_TOLERANCES = {"jax_f32_out": 1e-5, "jax_bf16_out": 5e-2}
# Figures measured while generating, and versions: recorded, not compared.
MEASURED_KEYS = (
    "jax",
    "numpy",
    "oracle_max_abs_diff",
    "finite_difference_worst",
    "max_abs",
    "jax_max_abs_err",
)


def differences_of_sets(stored, fresh):
    """What is different between two directories of one set, as a list of sentences."""
    stored, fresh = pathlib.Path(stored), pathlib.Path(fresh)
    if not (stored / "manifest.json").is_file():
        return [f"{stored.name}: no manifest.json"]
    stored_manifest, fresh_manifest = storage.read_manifest(stored), storage.read_manifest(fresh)
    found = differences_of_entries(stored.name, stored_manifest, fresh_manifest, skip=("cases",))
    stored_cases = {entry["id"]: entry for entry in stored_manifest["cases"]}
    fresh_cases = {entry["id"]: entry for entry in fresh_manifest["cases"]}
    for case_id in sorted(stored_cases.keys() ^ fresh_cases.keys()):
        found.append(f"{stored.name}: {case_id} is on one side only")
    listed = {entry["file"] for entry in stored_manifest["cases"]}
    for path in sorted((stored / "cases").glob("*")):
        if f"cases/{path.name}" not in listed:
            found.append(f"{stored.name}: cases/{path.name} is not in the manifest")
    for case_id in sorted(stored_cases.keys() & fresh_cases.keys()):
        entry = stored_cases[case_id]
        found += differences_of_entries(case_id, entry, fresh_cases[case_id])
        path = stored / entry["file"]
        if not path.is_file():
            found.append(f"{case_id}: {entry['file']} is missing")
            continue
        tensors = storage.read_safetensors(path)
        if storage.describe(tensors) != entry["tensors"]:
            found.append(f"{case_id}: the file's tensors are not those of the manifest")
        found += differences_of_tensors(case_id, tensors, storage.read_safetensors(fresh / entry["file"]))
    return found


def differences_of_entries(label, stored, fresh, skip=()):
    """Keys whose values differ between two manifests or two entries."""
    ignored = set(skip) | set(MEASURED_KEYS)
    found = [f"{label}: {key} is on one side only" for key in sorted(stored.keys() ^ fresh.keys())]
    for key in sorted((stored.keys() & fresh.keys()) - ignored):
        if stored[key] != fresh[key]:
            found.append(f"{label}: {key} is {stored[key]!r}, now {fresh[key]!r}")
    return found


def differences_of_tensors(label, stored, fresh):
    """Tensors that differ between two files: computed ones by a tolerance, all others in any bit."""
    found = [f"{label}: {name} is on one side only" for name in sorted(stored.keys() ^ fresh.keys())]
    for name in sorted(stored.keys() & fresh.keys()):
        left, right = stored[name], fresh[name]
        if left.dtype != right.dtype or left.shape != right.shape:
            found.append(f"{label}: {name} is {left.dtype}{left.shape}, now {right.dtype}{right.shape}")
        elif name in YARDSTICK_TOLERANCES or left.dtype == np.float64:
            tolerance = YARDSTICK_TOLERANCES.get(name, FLOAT64_TOLERANCE)
            if not np.allclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True):
                found.append(f"{label}: {name} differs by more than {tolerance}")
        elif left.tobytes() != right.tobytes():
            found.append(f"{label}: {name} differs")
    return found
