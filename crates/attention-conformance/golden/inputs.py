"""Random inputs of the cases: float32 tensors, masks and biases with the patterns that the cases ask for."""

import numpy as np

from philox import InputStream

# Every input of both sets follows from this number, the case's id and the tensor's name.
SEED = 20260

# Multiples of 1/32 below 8 in magnitude have eight significant bits at most: exact in bf16 and in f16.
_STEPS = 32.0


def floats(case_id, name, shape, half_exact=True):
    """Float32 of variance 1; on a grid that bf16 and f16 hold exactly unless `half_exact` is false."""
    values = InputStream(SEED, case_id, name).bell(shape)
    if half_exact:
        values = np.rint(values * _STEPS) / _STEPS
    return values.astype(np.float32)


def random_mask(case_id, shape, empty_rows=()):
    """A boolean mask: three of four true, key 0 always true, then the query rows `empty_rows` all false."""
    mask = InputStream(SEED, case_id, "mask").uniform(shape) < 0.75
    mask[..., 0] = True
    for row in empty_rows:
        mask[..., row, :] = False
    return mask


def bias(case_id, shape, half_exact=True, negative_infinity=None):
    """A bias; `negative_infinity` is None, "some" (scattered, never key 0) or "row_2" (all of row 2)."""
    values = floats(case_id, "bias", shape, half_exact)
    if negative_infinity == "some":
        scattered = InputStream(SEED, case_id, "negative_infinity").uniform(shape) < 0.25
        scattered[..., 0] = False
        values[scattered] = -np.inf
    elif negative_infinity == "row_2":
        values[..., 2, :] = -np.inf
    elif negative_infinity is not None:
        raise ValueError(negative_infinity)
    return values


def is_half_exact(tensors):
    """Whether every float32 array of `tensors` survives a round trip through bf16 and through f16."""
    for array in tensors.values():
        if array.dtype != np.float32:
            continue
        # bf16 is the upper half of f32.
        in_bfloat16 = not np.any(np.ascontiguousarray(array).view(np.uint32) & 0xFFFF)
        with np.errstate(over="ignore"):
            in_float16 = np.array_equal(array.astype(np.float16).astype(np.float32), array, equal_nan=True)
        if not (in_bfloat16 and in_float16):
            return False
    return True
