#!/bin/sh
# Paddle: a mask is dropped without a word where causal is set, and a row without keys is NaN.
#
# Installs paddlepaddle 3.3.1 in a temporary folder, and runs it without this project. Fails where the behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/python"
"$folder/python/bin/pip" install --quiet paddlepaddle==3.3.1 numpy setuptools
"$folder/python/bin/python" - <<'END'
import warnings

warnings.simplefilter("ignore")
import numpy as np
import paddle

print("paddlepaddle", paddle.__version__)
attention = paddle.nn.functional.scaled_dot_product_attention
query, key = paddle.zeros([1, 2, 1, 8]), paddle.zeros([1, 4, 1, 8])
value = paddle.to_tensor(np.eye(4, 8, dtype=np.float32)[None, :, None])


def rows(**options):
    return attention(query, key, value, **options).numpy()[0, :, 0, :4].round(3).tolist()


mask = paddle.to_tensor(np.array([[[[True, False, False, True], [True, False, False, False]]]]))
alone, causal, both = rows(attn_mask=mask), rows(is_causal=True), rows(attn_mask=mask, is_causal=True)
print("mask:", alone)
print("causal:", causal)
print("mask and causal:", both)
assert alone == [[0.5, 0.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0]]
assert causal == [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
assert both == causal, "both would be [1, 0, 0, 0] twice"

hidden = rows(attn_mask=paddle.zeros([1, 1, 2, 4], dtype="bool"))
print("booleans that hide every key:", hidden[0])
assert np.isnan(hidden).all()
END
