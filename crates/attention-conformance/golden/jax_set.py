"""Format 1: what `jax.nn.dot_product_attention` can do, expected values from JAX in float64."""

import dataclasses

import numpy as np

import inputs
import reference
import storage

FORMAT = 1
REFERENCE = (
    "jax.nn.dot_product_attention, implementation='xla', CPU, float64 with the float32 softmax cast removed"
)

EMPTY_ROWS_NOTE = (
    "Some query rows have no key to attend to. JAX (and this file's *_f64) gives them the plain mean of V "
    "over ALL S positions (padding included); the convention 'output 0' is in out_zero_f64 / dv_zero_f64. "
    "dq, dk, dbias are the same under both."
)
FULL_ROW_NOTE = (
    "Bias row 2 is -inf throughout: JAX gives NaN there and in its gradients. The *_zero_f64 tensors treat "
    "it as a row with nothing to attend to; there are no other gradients."
)


@dataclasses.dataclass
class Spec:
    """One case of the set. `dims` is (B, T, S, N, K, H); shapes and lengths are those of the manifest."""

    id: str
    tags: tuple
    dims: tuple
    rank: int = 4
    scale: float | None = None
    is_causal: bool = False
    window: int | tuple | None = None
    mask_shape: tuple | None = None
    empty_rows: tuple = ()
    mask_is_bottom_right: bool = False
    bias_shape: tuple | None = None
    negative_infinity: str | None = None
    query_lengths: tuple | None = None
    key_lengths: tuple | None = None
    half_exact: bool = True
    equivalent_params: dict | None = None
    note: str | None = None


# fmt: off
SPECS = (
    Spec("j00_plain_h16", ("plain",), (1, 8, 8, 2, 2, 16)),
    Spec("j01_plain_h7", ("plain",), (2, 6, 9, 3, 3, 7)),
    Spec("j02_plain_h33", ("plain",), (1, 7, 10, 2, 2, 33)),
    Spec("j03_plain_h80", ("plain",), (1, 6, 7, 2, 2, 80)),
    Spec("j04_plain_h128", ("plain",), (1, 5, 9, 2, 2, 128)),
    Spec("j05_full_precision_inputs", ("plain",), (2, 9, 7, 2, 2, 16), half_exact=False),
    Spec("j06_longer_than_a_block", ("plain", "gqa"), (1, 67, 131, 2, 1, 32)),
    Spec("j07_rank3", ("plain",), (1, 8, 11, 2, 2, 16), rank=3),
    Spec(
        "j08_rank3_gqa_bias_mask_seqlen", ("bias", "mask", "gqa", "seqlen"), (1, 9, 10, 4, 2, 16), rank=3,
        mask_shape=(9, 10), bias_shape=(4, 9, 10), query_lengths=(7,), key_lengths=(8,),
    ),
    Spec("j09_scale_zero", ("scale",), (1, 6, 9, 2, 2, 16), scale=0.0),
    Spec("j10_scale_negative", ("scale",), (1, 6, 9, 2, 2, 16), scale=-0.4),
    Spec("j11_scale_large", ("scale",), (1, 6, 9, 2, 2, 16), scale=1.75),
    Spec("j12_causal_square", ("causal",), (2, 12, 12, 2, 2, 16), is_causal=True),
    Spec(
        "j13_causal_wide", ("causal",), (1, 6, 13, 2, 2, 16), is_causal=True,
        note="top-left: keys 6 and up unused.",
    ),
    Spec(
        "j14_causal_tall", ("causal",), (1, 13, 6, 2, 2, 16), is_causal=True,
        note="top-left: no row is empty.",
    ),
    Spec("j15_gqa", ("gqa",), (2, 7, 9, 6, 2, 16)),
    Spec("j16_mqa", ("gqa",), (2, 7, 9, 4, 1, 16)),
    Spec("j17_causal_gqa", ("causal", "gqa"), (1, 19, 19, 6, 3, 16), is_causal=True),
    Spec("j18_decode", ("seqlen",), (3, 1, 37, 2, 2, 16), key_lengths=(37, 20, 1)),
    Spec("j19_decode_mqa_h128", ("gqa",), (1, 1, 18, 4, 1, 128)),
    Spec(
        "j20_single_key", ("plain",), (2, 7, 1, 2, 2, 16),
        note="the softmax of one logit: dq and dk are 0.",
    ),
    Spec("j21_mask_S", ("mask",), (2, 7, 9, 2, 2, 16), mask_shape=(9,)),
    Spec("j22_mask_TS", ("mask",), (2, 7, 9, 2, 2, 16), mask_shape=(7, 9)),
    Spec("j23_mask_NTS", ("mask",), (2, 7, 9, 2, 2, 16), mask_shape=(2, 7, 9)),
    Spec("j24_mask_B11S", ("mask",), (2, 7, 9, 2, 2, 16), mask_shape=(2, 1, 1, 9)),
    Spec("j25_mask_1NTS_gqa", ("mask", "gqa"), (2, 7, 9, 4, 2, 16), mask_shape=(1, 4, 7, 9)),
    Spec("j26_mask_B1TS", ("mask", "gqa"), (2, 7, 9, 4, 2, 16), mask_shape=(2, 1, 7, 9)),
    Spec("j27_mask_BNTS_mqa", ("mask", "gqa"), (2, 7, 9, 3, 1, 16), mask_shape=(2, 3, 7, 9)),
    Spec(
        "j28_mask_BNT1", ("mask", "empty_rows"), (2, 7, 9, 2, 2, 16), mask_shape=(2, 2, 7, 1),
        empty_rows=(1, 5),
    ),
    Spec(
        "j29_mask_bottom_right", ("mask",), (1, 6, 10, 2, 2, 16), mask_shape=(6, 10),
        mask_is_bottom_right=True,
        equivalent_params={"is_causal": True, "query_offset": "bottom_right", "mask_shape": None},
        note="the mask is bottom-right causal alignment.",
    ),
    Spec(
        "j30_empty_some_rows", ("mask", "empty_rows"), (2, 8, 7, 2, 2, 16), mask_shape=(2, 1, 8, 7),
        empty_rows=(0, 5),
    ),
    Spec(
        "j31_empty_rows_bias_gqa", ("mask", "bias", "gqa", "empty_rows"), (2, 8, 7, 4, 2, 16),
        mask_shape=(8, 7), empty_rows=(3, 7), bias_shape=(2, 4, 8, 7),
    ),
    Spec(
        "j32_empty_rows_padded_rows", ("mask", "seqlen", "empty_rows"), (2, 8, 7, 2, 2, 16),
        mask_shape=(8, 7), empty_rows=(1, 6), query_lengths=(8, 5), key_lengths=(7, 4),
    ),
    Spec("j33_kvlen_zero", ("seqlen", "gqa", "empty_rows"), (2, 6, 8, 4, 2, 16), key_lengths=(0, 8)),
    Spec("j34_bias_S", ("bias",), (2, 7, 9, 2, 2, 16), bias_shape=(9,)),
    Spec("j35_bias_TS", ("bias", "gqa"), (2, 7, 9, 4, 2, 16), bias_shape=(7, 9)),
    Spec("j36_bias_NTS", ("bias", "gqa"), (2, 7, 9, 4, 2, 16), bias_shape=(4, 7, 9)),
    Spec("j37_bias_B11S", ("bias",), (2, 7, 9, 2, 2, 16), bias_shape=(2, 1, 1, 9)),
    Spec("j38_bias_1N1S_gqa", ("bias", "gqa"), (2, 7, 9, 4, 2, 16), bias_shape=(1, 4, 1, 9)),
    Spec("j39_bias_B1TS_mqa", ("bias", "gqa"), (2, 7, 9, 4, 1, 16), bias_shape=(2, 1, 7, 9)),
    Spec(
        "j40_bias_BNT1_gqa", ("bias", "gqa"), (2, 7, 9, 4, 2, 16), bias_shape=(2, 4, 7, 1),
        note="constant along each row: dbias is 0 but for rounding.",
    ),
    Spec("j41_bias_BNTS_gqa", ("bias", "gqa"), (2, 7, 9, 4, 2, 16), bias_shape=(2, 4, 7, 9)),
    Spec(
        "j42_bias_full_precision_inputs", ("bias",), (1, 7, 9, 2, 2, 16), bias_shape=(1, 2, 7, 9),
        half_exact=False,
    ),
    Spec(
        "j43_bias_neginf_entries", ("bias",), (2, 7, 9, 2, 2, 16), bias_shape=(1, 2, 7, 9),
        negative_infinity="some",
        note="no row is -inf throughout; the -inf entries act as a mask and have dbias 0.",
    ),
    Spec(
        "j44_bias_neginf_full_row", ("bias", "empty_rows"), (1, 5, 6, 2, 2, 16), bias_shape=(1, 1, 5, 6),
        negative_infinity="row_2", note=FULL_ROW_NOTE,
    ),
    Spec("j45_window_4", ("window",), (1, 16, 16, 2, 2, 16), window=4),
    Spec("j46_window_3_1_wide", ("window",), (1, 9, 14, 2, 2, 16), window=(3, 1)),
    Spec(
        "j47_window_0_0", ("window",), (1, 7, 7, 2, 2, 16), window=(0, 0),
        note="every row attends to one key.",
    ),
    Spec(
        "j48_window_3_2_causal", ("window", "causal", "gqa"), (1, 16, 16, 4, 2, 16), window=(3, 2),
        is_causal=True,
    ),
    Spec("j49_window_tall", ("window", "empty_rows"), (1, 14, 6, 2, 2, 16), window=(2, 1)),
    Spec("j50_qlens", ("seqlen",), (3, 7, 8, 2, 2, 16), query_lengths=(7, 4, 1)),
    Spec("j51_kvlens", ("seqlen",), (3, 7, 8, 2, 2, 16), key_lengths=(8, 5, 1)),
    Spec(
        "j52_both_lens_gqa", ("seqlen", "gqa"), (2, 7, 8, 4, 2, 16), query_lengths=(3, 7),
        key_lengths=(8, 6),
    ),
    Spec("j53_qlen_zero", ("seqlen",), (2, 7, 8, 2, 2, 16), query_lengths=(0, 7)),
    Spec(
        "j54_lens_causal_window", ("seqlen", "causal", "window"), (2, 17, 17, 2, 2, 16), is_causal=True,
        window=(5, 0), query_lengths=(17, 11), key_lengths=(17, 11),
    ),
    Spec(
        "j55_combo_all", ("bias", "mask", "causal", "gqa", "window", "seqlen", "scale"),
        (2, 19, 19, 6, 3, 24), scale=0.3, is_causal=True, window=(8, 3), mask_shape=(1, 1, 19, 19),
        bias_shape=(2, 6, 19, 19), query_lengths=(19, 13), key_lengths=(19, 14),
    ),
)
# fmt: on


def make_inputs(spec):
    """The input tensors of a case, under their names in its file."""
    batch, query_length, key_length, heads, key_heads, head_dim = spec.dims
    lead = (batch,) if spec.rank == 4 else ()
    key_shape = lead + (key_length, key_heads, head_dim)
    query_shape = lead + (query_length, heads, head_dim)
    tensors = {
        name: inputs.floats(spec.id, name, shape, spec.half_exact)
        for name, shape in (("q", query_shape), ("k", key_shape), ("v", key_shape), ("d_out", query_shape))
    }
    if spec.bias_shape is not None:
        tensors["bias"] = inputs.bias(spec.id, spec.bias_shape, spec.half_exact, spec.negative_infinity)
    if spec.mask_is_bottom_right:
        tensors["mask"] = np.tri(query_length, key_length, key_length - query_length, dtype=bool)
    elif spec.mask_shape is not None:
        tensors["mask"] = inputs.random_mask(spec.id, spec.mask_shape, spec.empty_rows)
    if spec.query_lengths is not None:
        tensors["q_lens"] = np.array(spec.query_lengths, dtype=np.int32)
    if spec.key_lengths is not None:
        tensors["kv_lens"] = np.array(spec.key_lengths, dtype=np.int32)
    return tensors


def manifest_params(spec):
    """The `params` value of a manifest entry."""
    as_passed = _listed(spec.window) if isinstance(spec.window, tuple) else spec.window
    return {
        "scale": spec.scale,
        "is_causal": spec.is_causal,
        "local_window_size": [spec.window, spec.window] if isinstance(spec.window, int) else as_passed,
        "local_window_size_as_passed": as_passed,
        "mask_shape": _listed(spec.mask_shape),
        "bias_shape": _listed(spec.bias_shape),
        "query_seq_lengths": _listed(spec.query_lengths),
        "key_value_seq_lengths": _listed(spec.key_lengths),
    }


def _listed(value):
    return None if value is None else list(value)


@dataclasses.dataclass
class Oracle:
    """What the NumPy reference says about a case, in the "zero" convention; no batch axis for rank 3."""

    row_has_keys: np.ndarray
    padded: np.ndarray
    results: dict  # out, lse, dq, dk, dv and, with a bias, dbias

    @property
    def empty(self):
        """Rows that have nothing to attend to and are not padding."""
        return ~self.row_has_keys & ~self.padded


def oracle(spec, tensors, params):
    """The NumPy reference on the same case."""

    def batched(name):
        array = tensors[name].astype(np.float64)
        return array if spec.rank == 4 else array[None]

    def unbatched(array):
        return array if spec.rank == 4 else array[0]

    call = reference.Call(
        query=batched("q"),
        key=batched("k"),
        value=batched("v"),
        scale=params["scale"],
        is_causal=params["is_causal"],
        window=params["local_window_size"],
        bias=tensors["bias"].astype(np.float64) if "bias" in tensors else None,
        mask=tensors.get("mask"),
        query_lengths=tensors.get("q_lens"),
        key_lengths=tensors.get("kv_lens"),
    )
    forward = reference.forward(call)
    gradients = reference.backward(call, forward, batched("d_out"))
    results = {
        "out": unbatched(forward.out),
        "lse": unbatched(forward.logsumexp),
        "dq": unbatched(gradients["query"]),
        "dk": unbatched(gradients["key"]),
        "dv": unbatched(gradients["value"]),
    }
    if "bias" in gradients:
        results["dbias"] = gradients["bias"]
    return Oracle(unbatched(forward.row_has_keys), unbatched(forward.padded_rows), results)


def mean_over_values(spec, tensors, by_numpy):
    """(out, dv) as JAX has them, the mean of V over all S in empty rows, from the reference's results."""
    _, _, key_length, heads, key_heads, _ = spec.dims
    group = heads // key_heads
    empty, results = by_numpy.empty, by_numpy.results
    value = np.repeat(tensors["v"].astype(np.float64), group, axis=-2)
    out = np.where(empty[..., None], value.mean(axis=-3, keepdims=True), results["out"])
    d_out = tensors["d_out"].astype(np.float64)
    from_empty = np.where(empty[..., None], d_out, 0.0).sum(axis=-3, keepdims=True) / key_length
    grouped = from_empty.reshape(from_empty.shape[:-2] + (key_heads, group, from_empty.shape[-1]))
    return out, results["dv"] + grouped.sum(axis=-2)


def build(spec, jax_reference, exact_attention):
    """One case: its manifest entry, its tensors and its worst difference from the NumPy reference."""
    tensors = make_inputs(spec)
    params = manifest_params(spec)
    half_exact = inputs.is_half_exact(tensors)
    by_numpy = oracle(spec, tensors, params)
    has_empty_rows = bool(by_numpy.empty.any())
    if half_exact != spec.half_exact or ("empty_rows" in spec.tags) != has_empty_rows:
        raise AssertionError(f"{spec.id}: the case is not what its specification says")

    def exact(arrays):
        return jax_reference.evaluate(exact_attention, jax_reference.jnp.float64, arrays, params)

    if spec.negative_infinity == "row_2":
        expected, truth, grads, worst = expected_of_full_row(spec, tensors, by_numpy, exact)
    else:
        expected, truth, grads, worst = expected_of_case(spec, tensors, by_numpy, exact)
    gradient_names = [name for name in truth if name not in ("out", "lse")]
    errors, outputs = yardsticks(spec, tensors, params, truth, by_numpy, half_exact, jax_reference)
    entry = {
        "id": spec.id,
        "file": f"cases/{spec.id}.safetensors",
        "tags": list(spec.tags),
        "dims": dict(zip("BTSNKH", spec.dims)),
        "rank": spec.rank,
        "layout": "BTNH",
        "params": params,
        "equivalent_params": spec.equivalent_params,
        "inputs_half_exact": half_exact,
        "has_empty_rows": has_empty_rows,
        "n_empty_rows": int(by_numpy.empty.sum()),
        "n_padded_query_rows": int(by_numpy.padded.sum()),
        "grads": grads,
        "tensors": storage.describe({**tensors, **expected, **outputs}),
        "max_abs": {name: float(np.abs(truth[name]).max()) for name in ["out", *gradient_names]},
        "jax_max_abs_err": errors,
        "semantics_note": spec.note or (EMPTY_ROWS_NOTE if has_empty_rows else None),
    }
    return entry, {**tensors, **expected, **outputs}, worst


def expected_of_case(spec, tensors, by_numpy, exact):
    """What a file holds besides its inputs and the yardsticks, from JAX in float64.

    Returns (tensors by name, JAX's results by short name, the value of `grads`, worst difference from the
    NumPy reference).
    """
    empty = by_numpy.empty
    truth = exact(tensors)
    truth["lse"] = np.where(by_numpy.row_has_keys, truth["lse"], -np.inf)
    gradient_names = [name for name in truth if name not in ("out", "lse")]
    expected = {"out_f64": truth["out"], "lse_f64": truth["lse"], "row_has_keys": by_numpy.row_has_keys}
    expected.update({f"{name}_f64": truth[name] for name in gradient_names})
    grads = [f"{name}_f64" for name in gradient_names]
    out, dv = mean_over_values(spec, tensors, by_numpy)
    worst = worst_difference(truth, {**by_numpy.results, "out": out, "dv": dv})
    if empty.any():
        # Without its cotangent an empty row contributes nothing: that is the gradient of "output 0".
        zero = exact({**tensors, "d_out": np.where(empty[..., None], np.float32(0.0), tensors["d_out"])})
        zero["out"] = np.where(empty[..., None], 0.0, truth["out"])
        zero["lse"] = truth["lse"]
        worst = max(worst, worst_difference(zero, by_numpy.results))
        expected.update(out_zero_f64=zero["out"], dv_zero_f64=zero["dv"])
        grads.append("dv_zero_f64")
    return expected, truth, grads, worst


def expected_of_full_row(spec, tensors, by_numpy, exact):
    """As `expected_of_case`, for a bias with rows of -inf, where JAX's own output and gradients are NaN.

    The "zero" convention comes from JAX with those rows masked out, given a bias of 0 and no cotangent.
    """
    empty = by_numpy.empty
    own = exact(tensors)
    if not np.array_equal(np.isnan(own["out"]).all(axis=-1), empty):
        raise AssertionError(f"{spec.id}: JAX's NaN rows are not the empty rows")
    closed = np.isneginf(tensors["bias"])
    truth = exact(
        {
            **tensors,
            "bias": np.where(closed, np.float32(0.0), tensors["bias"]),
            "mask": ~closed,
            "d_out": np.where(empty[..., None], np.float32(0.0), tensors["d_out"]),
        }
    )
    truth["out"] = np.where(empty[..., None], 0.0, truth["out"])
    truth["lse"] = np.where(empty, -np.inf, truth["lse"])
    gradient_names = [name for name in truth if name not in ("out", "lse")]
    expected = {"out_f64": own["out"], "lse_f64": truth["lse"], "row_has_keys": by_numpy.row_has_keys}
    expected["out_zero_f64"] = truth["out"]
    expected.update({f"{name}_zero_f64": truth[name] for name in gradient_names})
    grads = [f"{name}_zero_f64" for name in gradient_names]
    return expected, truth, grads, worst_difference(truth, by_numpy.results)


def yardsticks(spec, tensors, params, truth, by_numpy, half_exact, jax_reference):
    """Unmodified JAX on the case: its plain max abs errors, and its outputs under their names in the file.

    The LSE is compared where a row has keys. Beside a bias row of -inf JAX has NaN, and only the output of
    the other rows can be compared.
    """
    jnp = jax_reference.jnp
    rows = by_numpy.row_has_keys
    only_rows_with_keys = ("lse", "out") if spec.negative_infinity == "row_2" else ("lse",)
    runs = {"jax_f64_native": jnp.float64, "jax_f32": jnp.float32}
    if half_exact:
        runs["jax_bf16"] = jnp.bfloat16
    errors, outputs = {}, {}
    for label, dtype in runs.items():
        got = jax_reference.evaluate(jax_reference.jax.nn.dot_product_attention, dtype, tensors, params)
        errors[label] = {}
        for name in truth:
            if name == "lse" and label == "jax_f64_native":
                continue
            if spec.negative_infinity == "row_2" and name not in only_rows_with_keys:
                continue
            left, right = got[name], truth[name]
            if name in only_rows_with_keys:
                left, right = left[rows], right[rows]
            errors[label][name] = difference(left, right)
        if label != "jax_f64_native":
            outputs[f"{label}_out"] = got["out"].astype(np.float32)
    return errors, outputs


def worst_difference(left, right):
    """The largest difference between two dicts of results with the same names."""
    return max(difference(left[name], right[name]) for name in left)


def difference(left, right):
    """The largest absolute difference; equal infinities differ by 0, and a NaN on either side is an error."""
    if left.shape != right.shape:
        raise AssertionError(f"shapes {left.shape} and {right.shape}")
    with np.errstate(invalid="ignore"):
        result = float(np.where(left == right, 0.0, np.abs(left - right)).max(initial=0.0))
    if np.isnan(result):
        raise AssertionError("NaN among results that are compared")
    return result


def generate(report):
    """All cases of the set: (manifest without its cases, [(entry, tensors)], file metadata)."""
    # Here and not at the top, because the extended set must not need JAX.
    import jax_reference

    exact_attention = jax_reference.without_softmax_cast()
    cases, worst = [], 0.0
    for spec in SPECS:
        entry, tensors, case_difference = build(spec, jax_reference, exact_attention)
        if not case_difference < 1e-12:
            raise AssertionError(f"{spec.id}: JAX and the NumPy reference differ by {case_difference}")
        cases.append((entry, tensors))
        worst = max(worst, case_difference)
    report(f"jax: {len(cases)} cases, worst difference from the NumPy reference {worst:.2e}")
    version = jax_reference.jax.__version__
    manifest = {
        "format": FORMAT,
        "generator": "generate.py",
        "jax": version,
        "numpy": np.__version__,
        "reference": REFERENCE,
        "seed": inputs.SEED,
        "oracle_max_abs_diff": worst,
    }
    return manifest, cases, {"reference": REFERENCE, "version": f"jax {version}, numpy {np.__version__}"}
