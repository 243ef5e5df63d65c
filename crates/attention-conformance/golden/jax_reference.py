"""`jax.nn.dot_product_attention` as it is, and once more with its float32 softmax cast removed.

JAX casts the logits to float32 before the softmax whatever the dtype of the inputs, so its float64 results
are only good to about 5e-7. `without_softmax_cast` removes that one line, on a copy of the function: the
installed package is left alone.
"""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

_CAST_LINE = "  padded_logits = padded_logits.astype(np.float32)\n"
_CORE = "_dot_product_attention_core"
# The functions between the public entry and the core, which have to see the rewritten core.
_CALLERS = ("_dot_product_attention_xla", "dot_product_attention")


def without_softmax_cast():
    """A copy of `jax.nn.dot_product_attention` that keeps the softmax in the dtype of the logits."""
    module = inspect.getmodule(inspect.unwrap(jax.nn.dot_product_attention))
    for name in (_CORE, *_CALLERS):
        if not hasattr(module, name):
            raise RuntimeError(
                f"jax {jax.__version__}: {module.__name__} has no {name}; adapt jax_reference.py"
            )
    source = inspect.getsource(getattr(module, _CORE))
    if source.count(_CAST_LINE) != 1:
        raise RuntimeError(
            f"jax {jax.__version__}: expected the line {_CAST_LINE.strip()!r} exactly once in "
            f"{module.__name__}.{_CORE}, found it {source.count(_CAST_LINE)} times; adapt jax_reference.py"
        )
    namespace = dict(vars(module))
    exec(compile(source.replace(_CAST_LINE, ""), f"<{_CORE} without the cast>", "exec"), namespace)
    for name in _CALLERS:
        original = inspect.unwrap(getattr(module, name))
        copy = types.FunctionType(original.__code__, namespace, name, original.__defaults__)
        copy.__kwdefaults__ = original.__kwdefaults__
        namespace[name] = copy
    return namespace["dot_product_attention"]


def evaluate(function, dtype, tensors, params):
    """Output, LSE and gradients of one case, float64 NumPy arrays under the names of the case files.

    `tensors` are the inputs of the case under the names of the case files, `params` its manifest entry.
    """
    names = [name for name in ("q", "k", "v", "bias") if name in tensors]
    inputs = [jnp.asarray(tensors[name], dtype=dtype) for name in names]
    window = params["local_window_size_as_passed"]

    def attend(*arrays):
        given = dict(zip(names, arrays))
        return function(
            given["q"],
            given["k"],
            given["v"],
            given.get("bias"),
            tensors.get("mask"),
            scale=params["scale"],
            is_causal=params["is_causal"],
            query_seq_lengths=tensors.get("q_lens"),
            key_value_seq_lengths=tensors.get("kv_lens"),
            local_window_size=tuple(window) if isinstance(window, list) else window,
            implementation="xla",
            return_residual=True,
        )

    @jax.jit
    def run(d_out, *arrays):
        out, pullback, logsumexp = jax.vjp(attend, *arrays, has_aux=True)
        return out, logsumexp, pullback(d_out)

    out, logsumexp, gradients = run(jnp.asarray(tensors["d_out"], dtype=dtype), *inputs)
    results = {"out": out, "lse": logsumexp}
    results.update({f"d{name}": gradient for name, gradient in zip(names, gradients)})
    return {name: np.asarray(value.astype(jnp.float64)) for name, value in results.items()}
