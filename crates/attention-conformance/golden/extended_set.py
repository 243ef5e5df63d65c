"""Format 2: what JAX has no option for, expected values from the NumPy reference."""

import dataclasses

import numpy as np

import inputs
import philox
import reference
import storage

FORMAT = 2
REFERENCE = "NumPy float64, analytic gradients, checked by central differences"

# Gradient of the reference -> tensor of the file.
GRADIENT_NAMES = {
    "query": "dq_f64",
    "key": "dk_f64",
    "value": "dv_f64",
    "bias": "dbias_f64",
    "sinks": "dsink_f64",
}


@dataclasses.dataclass
class Spec:
    """One case of the set. `dims` is (B, T, S, N, K, H, Hv); shapes and lengths are those of the manifest."""

    id: str
    tags: tuple
    dims: tuple = (2, 7, 9, 4, 2, 16, 16)
    scale: float | None = None
    is_causal: bool = False
    window: tuple | None = None
    offset: int | str = 0
    softcap: float | None = None
    dropout: tuple | None = None  # (rate, seed, offset)
    alibi: str | None = None
    sinks: bool = False
    d_lse: bool = False
    mask_shape: tuple | None = None
    empty_rows: tuple = ()
    bias_shape: tuple | None = None
    negative_infinity: str | None = None
    query_lengths: tuple | None = None
    key_lengths: tuple | None = None


BOTTOM_RIGHT = reference.BOTTOM_RIGHT
TALL = (2, 9, 6, 4, 2, 16, 16)
EVERYTHING_TAGS = (
    "softcap", "alibi", "sinks", "offset", "window", "dropout", "d_lse", "value_dim", "bias", "mask",
    "seqlen", "gqa",
)  # fmt: skip

# fmt: off
SPECS = (
    Spec("e00_plain", ("gqa",)),
    Spec("e01_softcap", ("softcap",), softcap=1.5),
    Spec(
        "e02_softcap_scale_bias", ("softcap", "scale", "bias"), scale=-0.9, softcap=3.0,
        bias_shape=(2, 1, 7, 9),
    ),
    Spec("e03_alibi_n", ("alibi",), alibi="n"),
    Spec("e04_alibi_bn", ("alibi",), alibi="bn"),
    Spec("e05_alibi_offset_causal", ("alibi", "offset", "causal"), alibi="n", offset=3, is_causal=True),
    Spec(
        "e06_alibi_bottom_right_lens", ("alibi", "offset", "seqlen"), alibi="bn", offset=BOTTOM_RIGHT,
        query_lengths=(7, 3), key_lengths=(5, 9),
    ),
    Spec("e07_scale_zero_softcap_alibi", ("softcap", "alibi", "scale"), scale=0.0, softcap=2.0, alibi="n"),
    Spec("e08_sinks", ("sinks",), sinks=True),
    Spec(
        "e09_sinks_causal_mqa", ("sinks", "causal", "gqa"), (2, 9, 9, 3, 1, 16, 16), sinks=True,
        is_causal=True,
    ),
    Spec("e10_sinks_empty_rows", ("sinks", "mask"), sinks=True, mask_shape=(2, 1, 7, 9), empty_rows=(0, 4)),
    Spec(
        "e11_sinks_empty_rows_d_lse", ("sinks", "mask", "d_lse"), sinks=True, d_lse=True, mask_shape=(7, 9),
        empty_rows=(2, 6),
    ),
    Spec(
        "e12_sinks_padded_rows", ("sinks", "seqlen", "d_lse"), sinks=True, d_lse=True, query_lengths=(4, 7),
        key_lengths=(9, 0),
    ),
    Spec(
        "e13_sinks_neginf_row", ("sinks", "bias"), sinks=True, bias_shape=(1, 4, 7, 9),
        negative_infinity="row_2",
    ),
    Spec("e14_neginf_row", ("bias", "d_lse"), d_lse=True, bias_shape=(7, 9), negative_infinity="row_2"),
    Spec("e15_offset_positive_causal", ("offset", "causal"), offset=2, is_causal=True),
    Spec("e16_offset_negative_causal", ("offset", "causal"), offset=-3, is_causal=True),
    Spec("e17_offset_past_the_keys_window", ("offset", "window"), TALL, offset=4, window=(2, 1)),
    Spec("e18_offset_alone", ("offset",), offset=5),
    Spec("e19_bottom_right_wide", ("offset", "causal"), offset=BOTTOM_RIGHT, is_causal=True),
    Spec("e20_bottom_right_tall", ("offset", "causal"), TALL, offset=BOTTOM_RIGHT, is_causal=True),
    Spec(
        "e21_bottom_right_lens", ("offset", "causal", "seqlen"), offset=BOTTOM_RIGHT, is_causal=True,
        query_lengths=(7, 4), key_lengths=(9, 5),
    ),
    Spec(
        "e22_bottom_right_q_lens", ("offset", "causal", "seqlen"), offset=BOTTOM_RIGHT, is_causal=True,
        query_lengths=(5, 1),
    ),
    Spec(
        "e23_bottom_right_kv_lens", ("offset", "causal", "seqlen"), offset=BOTTOM_RIGHT, is_causal=True,
        key_lengths=(9, 4),
    ),
    Spec(
        "e24_bottom_right_window_lens", ("offset", "window", "seqlen"), offset=BOTTOM_RIGHT, window=(2, 1),
        query_lengths=(7, 5), key_lengths=(6, 9),
    ),
    Spec(
        "e25_decode_bottom_right", ("offset", "causal", "seqlen"), (3, 1, 21, 4, 1, 16, 16),
        offset=BOTTOM_RIGHT, is_causal=True, window=(7, None), key_lengths=(21, 12, 3),
    ),
    Spec("e26_window_left_only", ("window",), (2, 9, 9, 4, 2, 16, 16), window=(2, None)),
    Spec("e27_window_right_only", ("window",), (2, 9, 9, 4, 2, 16, 16), window=(None, 1)),
    Spec("e28_window_left_only_causal", ("window", "causal"), window=(3, None), is_causal=True),
    Spec("e29_window_left_only_offset", ("window", "offset"), window=(1, None), offset=5),
    Spec(
        "e30_window_right_only_bottom_right", ("window", "offset"), TALL, window=(None, 0),
        offset=BOTTOM_RIGHT,
    ),
    Spec("e31_window_unbounded", ("window",), window=(None, None)),
    Spec("e32_dropout", ("dropout",), (2, 7, 13, 2, 2, 16, 16), dropout=(0.25, 42, 0)),
    Spec("e33_dropout_rate_zero", ("dropout",), dropout=(0.0, 1, 0)),
    Spec(
        "e34_dropout_gqa_offset", ("dropout", "gqa"), (2, 6, 17, 6, 2, 16, 16),
        dropout=(0.1, 3, 4000000000),
    ),
    Spec(
        "e35_dropout_causal_wide_seed", ("dropout", "causal"), (1, 19, 19, 2, 2, 16, 16), is_causal=True,
        dropout=(0.5, 0x1234_5678_9ABC, 9),
    ),
    Spec(
        "e36_dropout_lens", ("dropout", "seqlen"), (3, 9, 10, 4, 2, 8, 8), dropout=(0.3, 11, 2),
        query_lengths=(9, 4, 0), key_lengths=(10, 6, 3),
    ),
    Spec("e37_dropout_sinks_high_rate", ("dropout", "sinks"), dropout=(0.9, 5, 1), sinks=True),
    Spec(
        "e38_dropout_bottom_right_mqa", ("dropout", "offset", "causal", "gqa"), (2, 5, 16, 3, 1, 16, 16),
        dropout=(0.2, 8, 0), offset=BOTTOM_RIGHT, is_causal=True, bias_shape=(1, 3, 1, 16),
    ),
    Spec("e39_d_lse", ("d_lse",), d_lse=True),
    Spec("e40_d_lse_empty_rows", ("d_lse", "mask"), d_lse=True, mask_shape=(1, 4, 7, 9), empty_rows=(1, 3)),
    Spec("e41_d_lse_sinks_softcap", ("d_lse", "sinks", "softcap"), d_lse=True, sinks=True, softcap=2.0),
    Spec(
        "e42_d_lse_dropout_alibi", ("d_lse", "dropout", "alibi"), d_lse=True, dropout=(0.4, 6, 3),
        alibi="n",
    ),
    Spec("e43_value_dim_smaller", ("value_dim",), (2, 7, 9, 4, 2, 16, 8)),
    Spec(
        "e44_value_dim_larger", ("value_dim", "d_lse", "causal"), (2, 7, 9, 4, 2, 16, 40), d_lse=True,
        is_causal=True,
    ),
    Spec("e45_value_dim_1_h33", ("value_dim", "bias"), (1, 7, 9, 2, 1, 33, 1), bias_shape=(9,)),
    Spec(
        "e46_softcap_alibi_bias_neginf", ("softcap", "alibi", "bias", "offset", "causal"),
        softcap=2.5, alibi="bn",
        offset=BOTTOM_RIGHT, is_causal=True, bias_shape=(2, 4, 7, 9), negative_infinity="some",
    ),
    Spec(
        "e47_everything", (*EVERYTHING_TAGS, "causal"), (2, 13, 17, 4, 2, 16, 24), scale=0.4, is_causal=True,
        window=(7, None), offset=4, softcap=3.0, dropout=(0.2, 77, 6), alibi="n", sinks=True, d_lse=True,
        mask_shape=(2, 1, 13, 17), empty_rows=(5,), bias_shape=(1, 4, 13, 17), negative_infinity="some",
        query_lengths=(13, 9), key_lengths=(15, 17),
    ),
    Spec(
        "e48_everything_bottom_right_mqa", EVERYTHING_TAGS, (3, 10, 12, 4, 1, 24, 16), scale=-0.3,
        window=(6, 2), offset=BOTTOM_RIGHT, softcap=2.0, dropout=(0.35, 2**40 + 1, 1), alibi="bn",
        sinks=True, d_lse=True, mask_shape=(12,), bias_shape=(3, 1, 10, 12), query_lengths=(10, 7, 2),
        key_lengths=(12, 5, 0),
    ),
    Spec(
        "e49_everything_longer_than_a_block", (*EVERYTHING_TAGS, "causal"),
        (1, 67, 131, 2, 1, 16, 20), is_causal=True,
        window=(70, None), offset=BOTTOM_RIGHT, softcap=4.0, dropout=(0.15, 13, 21), alibi="n", sinks=True,
        d_lse=True, mask_shape=(131,), bias_shape=(1, 2, 1, 131), query_lengths=(65,), key_lengths=(129,),
    ),
    Spec("e50_no_keys", ("zero_size", "sinks", "d_lse"), (2, 5, 0, 4, 2, 16, 16), sinks=True, d_lse=True),
    Spec("e51_no_queries", ("zero_size",), (2, 0, 6, 4, 2, 16, 16)),
)
# fmt: on


def make_inputs(spec):
    """The input tensors of a case, under their names in its file."""
    batch, query_length, key_length, heads, key_heads, head_dim, value_dim = spec.dims
    shapes = {
        "q": (batch, query_length, heads, head_dim),
        "k": (batch, key_length, key_heads, head_dim),
        "v": (batch, key_length, key_heads, value_dim),
        "d_out": (batch, query_length, heads, value_dim),
    }
    if spec.sinks:
        shapes["sinks"] = (heads,)
    if spec.d_lse:
        shapes["d_lse"] = (batch, query_length, heads)
    tensors = {name: inputs.floats(spec.id, name, shape) for name, shape in shapes.items()}
    if spec.alibi is not None:
        shape = {"n": (heads,), "bn": (batch, heads)}[spec.alibi]
        # The usual geometric slopes for [N]; [B, N] gets different ones in each batch row.
        exponents = np.arange(1, int(np.prod(shape)) + 1, dtype=np.float64) % 5
        tensors["alibi_slopes"] = (0.75 * 2.0**-exponents).reshape(shape).astype(np.float32)
    if spec.bias_shape is not None:
        tensors["bias"] = inputs.bias(spec.id, spec.bias_shape, negative_infinity=spec.negative_infinity)
    if spec.mask_shape is not None:
        tensors["mask"] = inputs.random_mask(spec.id, spec.mask_shape, spec.empty_rows)
    if spec.query_lengths is not None:
        tensors["q_lens"] = np.array(spec.query_lengths, dtype=np.int32)
    if spec.key_lengths is not None:
        tensors["kv_lens"] = np.array(spec.key_lengths, dtype=np.int32)
    return tensors


def manifest_params(spec):
    """The `params` value of a manifest entry."""
    return {
        "scale": spec.scale,
        "is_causal": spec.is_causal,
        "local_window_size": _listed(spec.window),
        "query_offset": spec.offset,
        "softcap": spec.softcap,
        "dropout": None if spec.dropout is None else dict(zip(("rate", "seed", "offset"), spec.dropout)),
        "alibi": spec.alibi,
        "sinks": spec.sinks,
        "d_lse": spec.d_lse,
        "mask_shape": _listed(spec.mask_shape),
        "bias_shape": _listed(spec.bias_shape),
        "query_seq_lengths": _listed(spec.query_lengths),
        "key_value_seq_lengths": _listed(spec.key_lengths),
    }


def _listed(value):
    return None if value is None else list(value)


def make_call(tensors, params):
    """The case as a call of the reference."""

    def wide(name):
        return tensors[name].astype(np.float64) if name in tensors else None

    return reference.Call(
        query=wide("q"),
        key=wide("k"),
        value=wide("v"),
        scale=params["scale"],
        is_causal=params["is_causal"],
        window=params["local_window_size"],
        query_offset=params["query_offset"],
        softcap=params["softcap"],
        dropout=params["dropout"],
        alibi_slopes=wide("alibi_slopes"),
        bias=wide("bias"),
        mask=tensors.get("mask"),
        sinks=wide("sinks"),
        query_lengths=tensors.get("q_lens"),
        key_lengths=tensors.get("kv_lens"),
    )


def build(spec):
    """One case: its manifest entry and its tensors."""
    tensors = make_inputs(spec)
    if not inputs.is_half_exact(tensors):
        raise AssertionError(f"{spec.id}: an input is not exact in bf16 and f16")
    params = manifest_params(spec)
    call = make_call(tensors, params)
    d_out = tensors["d_out"].astype(np.float64)
    d_logsumexp = tensors["d_lse"].astype(np.float64) if spec.d_lse else None
    forward = reference.forward(call)
    gradients = reference.backward(call, forward, d_out, d_logsumexp)
    difference = reference.finite_difference_worst(
        call,
        gradients,
        d_out,
        d_logsumexp,
        lambda name: philox.InputStream(inputs.SEED, spec.id, f"direction of {name}"),
    )
    tensors["out_f64"] = forward.out
    tensors["lse_f64"] = forward.logsumexp
    tensors["row_has_keys"] = forward.row_has_keys
    for name, gradient in gradients.items():
        tensors[GRADIENT_NAMES[name]] = gradient
    if forward.keep is not None:
        tensors["keep_mask"] = forward.keep
    entry = {
        "id": spec.id,
        "file": f"cases/{spec.id}.safetensors",
        "tags": ["extension", *spec.tags],
        "dims": dict(zip(("B", "T", "S", "N", "K", "H", "Hv"), spec.dims)),
        "rank": 4,
        "layout": "BTNH",
        "params": params,
        "inputs_half_exact": True,
        "convention": "zero",
        # In this format a padded query row counts as empty too.
        "has_empty_rows": bool(not forward.row_has_keys.all()),
        "grads": [GRADIENT_NAMES[name] for name in gradients],
        "tensors": storage.describe(tensors),
        "finite_difference_worst": difference,
    }
    return entry, tensors


def generate(report):
    """All cases of the set: (manifest without its cases, [(entry, tensors)], file metadata)."""
    philox.assert_known_answers()
    cases = [build(spec) for spec in SPECS]
    worst = max(entry["finite_difference_worst"] for entry, _ in cases)
    if not worst < 1e-7:
        raise AssertionError(f"analytic gradients and central differences differ by {worst}")
    report(f"extended: {len(cases)} cases, worst central difference {worst:.2e}")
    manifest = {
        "format": FORMAT,
        "generator": "generate.py",
        "jax": None,
        "numpy": np.__version__,
        "reference": REFERENCE,
        "seed": inputs.SEED,
        "finite_difference_worst": worst,
    }
    return manifest, cases, {"reference": REFERENCE, "version": f"numpy {np.__version__}"}
