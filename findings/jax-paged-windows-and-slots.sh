#!/bin/sh
# JAX: a window of 2 keeps two keys in the paged attention for TPUs and three in jax.nn.dot_product_attention.
# In the paged attention for GPUs, NaN in the slots past a sequence's length reaches its row, and
# `pages_per_compute_block` decides how many of those slots are read. The reference of the attention for TPUs
# returns no rows behind the last offset.
#
# Guess before the run: one library counts windows in one way; slots past the length do not matter; the output
# has the shape of the query.
#
# Installs jax 0.10.2 in a temporary folder, and runs it on the CPU without this project: the kernel for GPUs
# in Pallas's interpreter, and for TPUs the reference that is published with the kernel. Fails where the
# behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/python"
"$folder/python/bin/pip" install --quiet jax==0.10.2
"$folder/python/bin/python" - <<'END'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

print("jax", jax.__version__)


def seen(row):
    return np.flatnonzero(np.array(row)[:6] > 1e-6).tolist()


def ints(*numbers):
    return jnp.array(numbers, jnp.int32)


# Six keys with the unit vectors as values, dense and in one page, where keys and values alternate.
values = jnp.eye(6, 128)
six = jnp.zeros((1, 6, 1, 128))
dense = jax.nn.dot_product_attention(
    six, six, values[None, :, None], is_causal=True, local_window_size=(2, 0))
pages = jnp.zeros((1, 16, 2, 128)).at[0, :6, 1].set(values)
paged = ref_ragged_paged_attention(
    jnp.zeros((1, 1, 128)), pages, ints(6), ints(0)[None], ints(0, 1), ints(1), sliding_window=2)
print("dot_product_attention, local_window_size=(2, 0): the last of 6 rows sees keys", seen(dense[0, 5, 0]))
print("ragged_paged_attention, sliding_window=2: the same row sees keys", seen(paged[0, 0]))
assert seen(dense[0, 5, 0]) == [3, 4, 5] and seen(paged[0, 0]) == [4, 5]

# Four rows of queries, of which one sequence has the first two.
four = ref_ragged_paged_attention(jnp.zeros((4, 1, 128)), pages, ints(6), ints(0)[None], ints(0, 2), ints(1))
print("ragged_paged_attention's reference, 4 rows of which a sequence has 2: output", four.shape)
assert four.shape == (2, 1, 128)

# Two pages of 16 slots, lengths of 16 and 17. All values are 1, but for NaN in the slots past the length.
key = jnp.zeros((1, 2, 16, 16))
value = jnp.ones((1, 2, 16, 16))
for length, pages_per_compute_block, finite in ((16, 1, True), (16, 2, False), (17, 1, False)):
    page, slot = divmod(length, 16)
    given = value.at[0, page, slot:].set(jnp.nan)
    row = paged_attention(
        jnp.zeros((1, 1, 16)), key, given, ints(0, 1)[None], ints(length), k_splits=1,
        pages_per_compute_block=pages_per_compute_block, interpret=True)[0, 0, 0]
    print(f"paged_attention, length {length}, NaN in the {32 - length} slots past it, "
          f"pages_per_compute_block={pages_per_compute_block}: {float(row):.4f}")
    assert bool(jnp.isfinite(row)) == finite
END
