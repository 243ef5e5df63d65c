#!/bin/sh
# ml_dtypes: float64 to float8_e4m3fn or float8_e5m2 gives what rounding to float32 first would give: just
# beside the middle of two neighbours it takes the wrong one half of the time. JAX, whose 8-bit dtypes are
# those of ml_dtypes, takes the nearest.
#
# Guess before the run: `astype` takes the nearest number in both, whatever dtype it comes from; if anything
# differs, it is JAX with and without jit.
#
# Installs jax 0.10.2 and ml_dtypes 0.6.0 in a temporary folder, and runs them without this project. Fails
# where the behaviour is another.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/python"
"$folder/python/bin/pip" install --quiet jax==0.10.2 ml_dtypes==0.6.0 numpy
"$folder/python/bin/python" - <<'END'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

jax.config.update("jax_enable_x64", True)
print("ml_dtypes", ml_dtypes.__version__, "jax", jax.__version__)


def by_numpy(x, dtype):
    return x.astype(dtype).astype(np.float64)


def by_jax(x, dtype):
    return np.asarray(jnp.asarray(x).astype(dtype)).astype(np.float64)


def by_jit(x, dtype):
    return np.asarray(jax.jit(lambda x: x.astype(dtype))(jnp.asarray(x))).astype(np.float64)


for name in ("float8_e4m3fn", "float8_e5m2"):
    dtype = getattr(ml_dtypes, name)
    numbers = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    below, above = numbers[:-1], numbers[1:]
    middle = (below + above) / 2
    # The numbers right above and right below each middle. Each has one nearest 8-bit number.
    for source in (np.float64, np.float32):
        middles = middle.astype(source)
        assert (middles.astype(np.float64) == middle).all()
        up, down = np.nextafter(middles, source(np.inf)), np.nextafter(middles, source(-np.inf))
        wrong = {}
        for convert in (by_numpy, by_jax, by_jit):
            too_low, too_high = convert(up, dtype) != above, convert(down, dtype) != below
            # Rounded to float32 first, they are the middle, which goes to its even neighbour on either side.
            through = convert(up.astype(np.float32), dtype), convert(down.astype(np.float32), dtype)
            if convert is by_numpy:
                assert (convert(up, dtype) == through[0]).all() and (convert(down, dtype) == through[1]).all()
            wrong[convert.__name__] = int(too_low.sum() + too_high.sum())
        print(f"{2 * len(middle)} numbers of {np.dtype(source).name} to {name}, not to the nearest:", wrong)
        assert wrong["by_jax"] == wrong["by_jit"] == 0
        assert wrong["by_numpy"] == (0 if source is np.float32 else len(middle))

# One of them: 17 is the middle of 16 and 18, and goes to 16, whose last bit is 0. A little more goes to 18.
x = np.nextafter(np.float64(17), np.inf)
numpy, jax = by_numpy(x, ml_dtypes.float8_e4m3fn), by_jax(x, ml_dtypes.float8_e4m3fn)
print(f"{x!r} to float8_e4m3fn: {numpy} by ml_dtypes, {jax} by JAX")
assert numpy == 16 and jax == 18
END
