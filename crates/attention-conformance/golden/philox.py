"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in NumPy.

Two things use it: the dropout stream, whose bits are part of the library's promise, and the inputs of the
cases, which must not depend on a version of NumPy.
"""

import hashlib

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)

# Counter, key, output: the philox4x32 10-round lines of kat_vectors in Random123.
_KNOWN_ANSWERS = (
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def philox4x32(counter, key):
    """Four output words for every counter.

    `counter` holds four integer arrays that broadcast together, `key` two integers; every one of them below
    2**32. Returns uint32 with the broadcast shape and a last axis of 4.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    key_low, key_high = int(key[0]), int(key[1])
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIERS[0] * c0
        product_2 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product_2 >> _WORD_BITS) ^ c1 ^ np.uint64(key_low),
            product_2 & _LOW_WORD,
            (product_0 >> _WORD_BITS) ^ c3 ^ np.uint64(key_high),
            product_0 & _LOW_WORD,
        )
        key_low = (key_low + _KEY_INCREMENTS[0]) & 0xFFFFFFFF
        key_high = (key_high + _KEY_INCREMENTS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def assert_known_answers():
    """Stops the program unless the published known-answer tests hold."""
    for counter, key, expected in _KNOWN_ANSWERS:
        got = tuple(int(word) for word in philox4x32(counter, key))
        if got != expected:
            raise AssertionError(f"philox4x32-10 of {counter} under {key}: {got}, expected {expected}")


def dropout_threshold(rate):
    """`round(rate * 65536)`, refusing a rate that keeps nothing."""
    threshold = int(np.floor(rate * 65536 + 0.5))
    if not 0 <= threshold < 65536:
        raise ValueError(f"dropout rate {rate} is out of range")
    return threshold


def keep_mask(batch, heads, query_length, key_length, *, rate, seed, offset, first_head=0):
    """The published dropout bits, bool [B, N, T, S]: true = the probability is kept.

    `first_head` is what the counter of batch rows and heads starts from: `b * N` for sequence `b` alone.
    """
    blocks = -(-key_length // 8)
    words = philox4x32(
        (
            np.arange(blocks)[None, None, :],
            np.arange(query_length)[None, :, None],
            first_head + np.arange(batch * heads)[:, None, None],
            offset,
        ),
        (seed & 0xFFFFFFFF, seed >> 32),
    )
    # Each word is two 16-bit lanes, low half first; lane s % 8 of block s / 8 belongs to key s.
    lanes = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    lanes = lanes.reshape(batch, heads, query_length, blocks * 8)[..., :key_length]
    return lanes >= dropout_threshold(rate)


class InputStream:
    """Random inputs of one tensor, a pure function of (seed, case id, tensor name)."""

    def __init__(self, seed, case_id, tensor_name):
        digest = hashlib.sha256(f"{seed}/{case_id}/{tensor_name}".encode()).digest()
        self._key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))

    def _words(self, shape):
        """uint32 words of the given shape and four per element."""
        indices = np.arange(int(np.prod(shape)), dtype=np.uint64)
        return philox4x32((indices, 0, 0, 0), self._key).reshape(tuple(shape) + (4,))

    def bell(self, shape):
        """Float64 with mean 0, variance 1 and a bell shape inside (-3.47, 3.47): the sum of four uniforms."""
        total = self._words(shape).astype(np.float64).sum(axis=-1)
        return (total * 2.0**-32 - 2.0) * np.sqrt(3.0)

    def uniform(self, shape):
        """Float64, uniform in [0, 1)."""
        return self._words(shape)[..., 0].astype(np.float64) * 2.0**-32
