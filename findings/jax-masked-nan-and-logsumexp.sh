#!/bin/sh
# JAX: a NaN in a value that no row may see makes every row NaN, the logsumexp of a row without keys depends on the dtype, and its gradient is 0.
#
# Installs jax 0.10.2 in a temporary folder, and runs it without this project. Fails where the behaviour is another.
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

print("jax", jax.__version__)
attention = jax.nn.dot_product_attention
x = jnp.zeros((1, 4, 1, 8))

# Causal rows 0, 1 and 2 may not see key 3, whose value is NaN.
value = jnp.ones((1, 4, 1, 8)).at[0, 3].set(jnp.nan)
out = np.array(attention(x, x, value, is_causal=True))[0, :, 0, 0]
print("NaN in the value of key 3, causal: rows", out.tolist())
assert np.isnan(out).all()

# A mask that hides every key.
hidden = jnp.zeros((1, 1, 4, 4), bool)
for dtype, expected in ((jnp.float32, -2.3819763e38), (jnp.bfloat16, -2.3793181e38), (jnp.float16, -np.inf)):
    out, lse = attention(*[x.astype(dtype)] * 2, jnp.ones_like(x, dtype), mask=hidden, return_residual=True)
    row, lse_of_row = float(out[0, 0, 0, 0]), float(lse[0, 0, 0])
    print(f"no key, {dtype.__name__}: output {row} (the mean of the values), logsumexp {lse_of_row} in {lse.dtype}")
    assert row == 1.0 and lse.dtype == dtype
    assert lse_of_row == expected or abs(lse_of_row - expected) < 1e-6 * abs(expected)

# The logsumexp depends on the query, its gradient says that it does not.
query = jnp.ones((1, 4, 1, 8))
gradient = jax.grad(lambda query: attention(query, query, query, return_residual=True)[1].sum())(query)
print("largest gradient of the logsumexp:", float(jnp.abs(gradient).max()))
assert float(jnp.abs(gradient).max()) == 0.0
END
