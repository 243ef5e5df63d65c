#!/bin/sh
# MLX: a row without keys is the mean of the values, or NaN, or 0, by how it was said; masks of integers are added.
#
# Installs mlx 0.32.4 for the CPU in a temporary folder, and runs it without this project. Fails where the behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/python"
"$folder/python/bin/pip" install --quiet "mlx[cpu]==0.32.4" numpy
"$folder/python/bin/python" - <<'END'
import mlx.core as mx
import numpy as np

print("mlx", mx.__version__)
attention = mx.fast.scaled_dot_product_attention
query, key = mx.zeros((1, 1, 2, 8)), mx.zeros((1, 1, 4, 8))
value = mx.array(np.eye(4, 8, dtype=np.float32)[None, None])


def rows(mask, query=query):
    out = attention(query, key, value, scale=1.0, mask=mask)
    return np.array(out)[0, 0, :, :4].astype(np.float64).round(3).tolist()


print("causal, 2 rows over 4 keys:", rows("causal"))
assert rows("causal") == [[0.333, 0.333, 0.333, 0.0], [0.25] * 4]

hidden = (1, 1, 2, 4)
boolean = rows(mx.zeros(hidden, dtype=mx.bool_))
print("booleans that hide every key:", boolean[0])
assert boolean == [[0.25] * 4] * 2
infinity = rows(mx.full(hidden, -float("inf")))
print("an additive mask of -inf:", infinity[0])
assert np.isnan(infinity).all()
integers = rows(mx.array([[[[1, 0, 0, 0], [0, 0, 0, 1]]]], dtype=mx.int32))
print("integers, 1 for key 0 alone: weights", integers[0], "as of logits 1, 0, 0, 0")
assert integers[0] == [0.475, 0.175, 0.175, 0.175]
END
