"""Format 3: packed sequences, and keys and values in pages, one sequence at a time by the NumPy reference."""

import dataclasses

import numpy as np

import inputs
import philox
import reference
import storage
from extended_set import BOTTOM_RIGHT, GRADIENT_NAMES

FORMAT = 3
REFERENCE = "NumPy float64, one sequence at a time, analytic gradients, checked by central differences"


@dataclasses.dataclass
class Spec:
    """One case of the set. Lengths are by sequence; `queries` and `keys` say how the rows lie."""

    id: str
    query_lengths: tuple
    key_lengths: tuple
    queries: str = "packed"  # or "dense"
    keys: str = "packed"  # or "dense", "paged"
    heads: tuple = (4, 2, 8, 8)  # (N, K, H, Hv)
    tails: tuple = (0, 0)  # packed rows behind the last sequence, of queries and of keys
    used: tuple | None = None  # how many keys of each packed sequence take part
    page_size: int | None = None
    shared_pages: int = 0  # leading pages that all sequences have in common
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

    @property
    def taking_part(self):
        """The keys of each sequence that take part."""
        return self.key_lengths if self.used is None else self.used

    @property
    def has_gradients(self):
        """Pages have none: sequences may share them."""
        return self.keys != "paged"


PAGED = {"queries": "dense", "keys": "paged"}

# fmt: off
SPECS = (
    Spec("q00_packed_plain", (5, 1, 9), (7, 3, 13)),
    Spec(
        "q01_packed_bottom_right_window", (5, 8, 9), (9, 3, 13), is_causal=True, offset=BOTTOM_RIGHT,
        window=(4, None), tails=(2, 3),
    ),
    Spec(
        "q02_packed_empty_sequences_sinks", (0, 4, 3, 0), (5, 0, 6, 0), sinks=True, d_lse=True, tails=(3, 2),
    ),
    Spec("q03_packed_all_empty", (0, 0), (0, 0), tails=(3, 2), sinks=True, d_lse=True),
    Spec("q04_packed_no_sequences", (), (), tails=(2, 3)),
    Spec("q05_packed_dropout_offset", (6, 1, 7), (9, 17, 5), dropout=(0.3, 0x1234_5678_9ABC, 7), offset=-2,
         is_causal=True, tails=(1, 0)),
    Spec("q06_packed_alibi_bn_softcap", (5, 2, 6), (7, 9, 4), alibi="bn", softcap=1.5, offset=BOTTOM_RIGHT),
    Spec("q07_packed_mask_bias_per_sequence", (5, 0, 6), (7, 2, 9), mask_shape=(3, 1, 6, 9), empty_rows=(2,),
         bias_shape=(3, 4, 1, 9), negative_infinity="some"),
    Spec("q08_packed_bias_of_all", (3, 6), (7, 5), bias_shape=(1, 1, 6, 7), mask_shape=(1, 1, 1, 7),
         d_lse=True, tails=(0, 1)),
    Spec("q09_packed_seqused_dropout", (6, 9, 2), (10, 9, 4), used=(7, 4, 0), is_causal=True,
         offset=BOTTOM_RIGHT, dropout=(0.25, 11, 0), tails=(1, 2)),
    Spec(
        "q10_packed_everything_mqa", (7, 0, 9), (6, 5, 11), heads=(3, 1, 8, 12), scale=0.4, is_causal=True,
        window=(5, None), offset=3, softcap=2.5, dropout=(0.2, 77, 6), alibi="n", sinks=True, d_lse=True,
        mask_shape=(3, 1, 9, 11), empty_rows=(4,), bias_shape=(1, 3, 9, 11), negative_infinity="some",
        tails=(4, 5),
    ),
    Spec("q11_packed_one_long", (1, 2, 67, 1), (3, 1, 70, 2), heads=(2, 1, 8, 4), is_causal=True,
         offset=BOTTOM_RIGHT),
    Spec("q12_packed_queries_dense_keys", (4, 1, 6), (7, 0, 5), keys="dense", is_causal=True,
         offset=BOTTOM_RIGHT, alibi="n", tails=(2, 0)),
    Spec("q20_paged_decode_page_1", (1, 1, 1), (9, 1, 4), page_size=1, is_causal=True, offset=BOTTOM_RIGHT,
         **PAGED),
    Spec("q21_paged_prefill_page_13", (6, 2, 5), (30, 13, 5), page_size=13, window=(9, 3),
         offset=BOTTOM_RIGHT, **PAGED),
    Spec("q22_paged_shared_prefix", (2, 1, 2), (13, 9, 8), page_size=4, shared_pages=2, is_causal=True,
         offset=BOTTOM_RIGHT, sinks=True, **PAGED),
    Spec("q23_paged_packed_queries", (3, 0, 5, 1), (7, 4, 12, 0), queries="packed", keys="paged", page_size=4,
         dropout=(0.4, 5, 1), is_causal=True, offset=BOTTOM_RIGHT, tails=(2, 0)),
    Spec(
        "q24_paged_everything", (5, 0, 3), (14, 6, 9), heads=(4, 2, 8, 12), page_size=2, scale=-0.3,
        is_causal=True, window=(6, 1), offset=BOTTOM_RIGHT, softcap=2.0, dropout=(0.35, 2**40 + 1, 1),
        alibi="bn", sinks=True, mask_shape=(3, 1, 1, 14), bias_shape=(1, 4, 5, 14), negative_infinity="some",
        **PAGED,
    ),
    Spec("q25_paged_no_keys", (2, 2), (0, 0), page_size=16, sinks=True, **PAGED),
)
# fmt: on


def starts(lengths):
    """int32 [B + 1]: where each sequence starts, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


class Rows:
    """Where the rows of each sequence are: `of[b]` are indices into the tensor's first axes, flattened."""

    def __init__(self, axes, of):
        self.axes, self.of = tuple(axes), of

    @classmethod
    def packed(cls, lengths, tail):
        """One sequence behind the other in `[total, ..]`."""
        begins = starts(lengths)
        return cls((int(begins[-1]) + tail,), [np.arange(a, b) for a, b in zip(begins, begins[1:])])

    @classmethod
    def dense(cls, lengths):
        """`[B, longest, ..]`."""
        longest = max(lengths, default=0)
        of = [index * longest + np.arange(length) for index, length in enumerate(lengths)]
        return cls((len(lengths), longest), of)

    @classmethod
    def paged(cls, case_id, lengths, page_size, shared):
        """`[pages, page_size, ..]`, and the block table: pages in no order, two of them without a sequence."""
        needed = [-(-length // page_size) for length in lengths]
        together = min(shared, max(needed, default=0))
        pages = together + sum(max(count - shared, 0) for count in needed) + 2
        order = np.argsort(philox.InputStream(inputs.SEED, case_id, "pages").uniform((pages,)), kind="stable")
        table = np.full((len(lengths), max(needed, default=0) + 1), -1, dtype=np.int32)
        unused = list(order[together:])
        for row, count in zip(table, needed):
            for entry in range(count):
                row[entry] = order[entry] if entry < together else unused.pop(0)
        keys = [np.arange(length) for length in lengths]
        of = [row[key // page_size] * page_size + key % page_size for row, key in zip(table, keys)]
        return cls((pages, page_size), of), table

    def poisoned(self, tensor):
        """The tensor with NaN in every row that no sequence has."""
        shape = tensor.shape
        rows = tensor.reshape(-1, *shape[len(self.axes) :]).copy()
        nobody = np.ones(len(rows), dtype=bool)
        for of in self.of:
            nobody[of] = False
        rows[nobody] = np.nan
        return rows.reshape(shape)

    def take(self, tensor, sequence):
        """The rows of one sequence, in float64 as a batch of one."""
        rows = tensor.reshape(-1, *tensor.shape[len(self.axes) :])
        return rows[self.of[sequence]][None].astype(np.float64)

    def put(self, tensor, sequence, values):
        """Writes the rows of one sequence."""
        tensor.reshape(-1, *tensor.shape[len(self.axes) :])[self.of[sequence]] = values[0]


def places(spec):
    """Rows of queries, rows of the keys that take part, and the tensors that say where they are."""
    tensors = {}
    if spec.queries == "packed":
        queries = Rows.packed(spec.query_lengths, spec.tails[0])
        tensors["cu_seqlens_q"] = starts(spec.query_lengths)
    else:
        queries = Rows.dense(spec.query_lengths)
        tensors["q_lens"] = np.array(spec.query_lengths, dtype=np.int32)
    if spec.keys == "packed":
        keys = Rows.packed(spec.key_lengths, spec.tails[1])
        tensors["cu_seqlens_k"] = starts(spec.key_lengths)
    elif spec.keys == "dense":
        keys = Rows.dense(spec.key_lengths)
    else:
        keys, tensors["block_table"] = Rows.paged(spec.id, spec.key_lengths, spec.page_size, spec.shared_pages)
    if spec.keys != "packed":
        tensors["kv_lens"] = np.array(spec.key_lengths, dtype=np.int32)
    if spec.used is not None:
        tensors["seqused_k"] = np.array(spec.used, dtype=np.int32)
    keys.of = [of[:count] for of, count in zip(keys.of, spec.taking_part)]
    return queries, keys, tensors


def make_inputs(spec):
    """The rows, and the input tensors under their names in the file."""
    heads, key_heads, head_dim, value_dim = spec.heads
    queries, keys, numbers = places(spec)
    suffix = "_pages" if spec.keys == "paged" else ""
    shapes = {
        "q": (queries, (heads, head_dim)),
        f"k{suffix}": (keys, (key_heads, head_dim)),
        f"v{suffix}": (keys, (key_heads, value_dim)),
    }
    if spec.has_gradients:
        shapes["d_out"] = (queries, (heads, value_dim))
    if spec.d_lse:
        shapes["d_lse"] = (queries, (heads,))
    tensors = {
        name: rows.poisoned(inputs.floats(spec.id, name, (*rows.axes, *rest)))
        for name, (rows, rest) in shapes.items()
    }
    batch = len(spec.query_lengths)
    if spec.sinks:
        tensors["sinks"] = inputs.floats(spec.id, "sinks", (heads,))
    if spec.alibi is not None:
        shape = {"n": (heads,), "bn": (batch, heads)}[spec.alibi]
        exponents = np.arange(1, int(np.prod(shape)) + 1, dtype=np.float64) % 5
        tensors["alibi_slopes"] = (0.75 * 2.0**-exponents).reshape(shape).astype(np.float32)
    if spec.bias_shape is not None:
        tensors["bias"] = inputs.bias(spec.id, spec.bias_shape, negative_infinity=spec.negative_infinity)
    if spec.mask_shape is not None:
        tensors["mask"] = inputs.random_mask(spec.id, spec.mask_shape, spec.empty_rows)
    return queries, keys, {**tensors, **numbers}


def of_sequence(shape, sequence, query_length, key_length):
    """Where a tensor that broadcasts to [B, N, longest T, longest S] has what one sequence reads."""
    first = sequence if shape[0] > 1 else 0
    rows = slice(None) if shape[2] == 1 else slice(query_length)
    columns = slice(None) if shape[3] == 1 else slice(key_length)
    return slice(first, first + 1), slice(None), rows, columns


def make_call(spec, queries, keys, tensors, sequence):
    """One sequence as a call of the reference, a batch of one."""
    query_length, key_length = spec.query_lengths[sequence], spec.taking_part[sequence]
    suffix = "_pages" if spec.keys == "paged" else ""

    def broadcast(name):
        if name not in tensors:
            return None
        return tensors[name][of_sequence(tensors[name].shape, sequence, query_length, key_length)]

    slopes, bias = tensors.get("alibi_slopes"), broadcast("bias")
    if spec.alibi == "bn":
        slopes = slopes[sequence : sequence + 1]
    dropout = None
    if spec.dropout is not None:
        dropout = dict(zip(("rate", "seed", "offset"), spec.dropout))
        dropout["first_head"] = sequence * spec.heads[0]
    return reference.Call(
        query=queries.take(tensors["q"], sequence),
        key=keys.take(tensors[f"k{suffix}"], sequence),
        value=keys.take(tensors[f"v{suffix}"], sequence),
        scale=spec.scale,
        is_causal=spec.is_causal,
        window=spec.window,
        query_offset=spec.offset,
        softcap=spec.softcap,
        dropout=dropout,
        alibi_slopes=None if slopes is None else slopes.astype(np.float64),
        bias=None if bias is None else bias.astype(np.float64),
        mask=broadcast("mask"),
        sinks=tensors["sinks"].astype(np.float64) if spec.sinks else None,
    )


def manifest_params(spec):
    """The `params` value of a manifest entry."""

    def listed(value):
        return None if value is None else list(value)

    return {
        "scale": spec.scale,
        "is_causal": spec.is_causal,
        "local_window_size": listed(spec.window),
        "query_offset": spec.offset,
        "softcap": spec.softcap,
        "dropout": None if spec.dropout is None else dict(zip(("rate", "seed", "offset"), spec.dropout)),
        "alibi": spec.alibi,
        "sinks": spec.sinks,
        "d_lse": spec.d_lse,
        "mask_shape": listed(spec.mask_shape),
        "bias_shape": listed(spec.bias_shape),
        "sequences": "paged" if spec.keys == "paged" else "packed",
        "page_size": spec.page_size,
        "query_lengths": list(spec.query_lengths),
        "key_value_lengths": list(spec.key_lengths),
        "used_key_value_lengths": listed(spec.used),
    }


def build(spec):
    """One case: its manifest entry and its tensors."""
    heads, key_heads, head_dim, value_dim = spec.heads
    queries, keys, tensors = make_inputs(spec)
    if not inputs.is_half_exact(tensors):
        raise AssertionError(f"{spec.id}: an input is not exact in bf16 and f16")
    rows = (*queries.axes, heads)
    results = {
        "out_f64": np.zeros((*rows, value_dim)),
        "lse_f64": np.full(rows, -np.inf),
        "row_has_keys": np.zeros(rows, dtype=bool),
    }
    gradients = {}
    if spec.has_gradients:
        gradients = {
            "query": np.zeros(tensors["q"].shape),
            "key": np.zeros(tensors["k"].shape),
            "value": np.zeros(tensors["v"].shape),
        }
        if spec.bias_shape is not None:
            gradients["bias"] = np.zeros(spec.bias_shape)
        if spec.sinks:
            gradients["sinks"] = np.zeros(heads)
    difference = 0.0
    for sequence, query_length in enumerate(spec.query_lengths):
        call = make_call(spec, queries, keys, tensors, sequence)
        forward = reference.forward(call)
        queries.put(results["out_f64"], sequence, forward.out)
        queries.put(results["lse_f64"], sequence, forward.logsumexp)
        queries.put(results["row_has_keys"], sequence, forward.row_has_keys)
        if forward.keep is not None:
            results[f"keep_mask_{sequence}"] = forward.keep[0]
        if not spec.has_gradients:
            continue
        d_out = queries.take(tensors["d_out"], sequence)
        d_logsumexp = queries.take(tensors["d_lse"], sequence) if spec.d_lse else None
        found = reference.backward(call, forward, d_out, d_logsumexp)
        queries.put(gradients["query"], sequence, found["query"])
        keys.put(gradients["key"], sequence, found["key"])
        keys.put(gradients["value"], sequence, found["value"])
        if "bias" in found:
            key_length = spec.taking_part[sequence]
            at = of_sequence(spec.bias_shape, sequence, query_length, key_length)
            gradients["bias"][at] += found["bias"]
        if "sinks" in found:
            gradients["sinks"] += found["sinks"]
        worst = reference.finite_difference_worst(
            call,
            found,
            d_out,
            d_logsumexp,
            lambda name, of=sequence: philox.InputStream(inputs.SEED, spec.id, f"direction of {name} {of}"),
        )
        difference = max(difference, worst)
    results.update({GRADIENT_NAMES[name]: gradient for name, gradient in gradients.items()})
    tensors.update(results)
    entry = {
        "id": spec.id,
        "file": f"cases/{spec.id}.safetensors",
        "tags": [spec.keys if spec.keys == "paged" else "packed"],
        "dims": dict(zip(("B", "N", "K", "H", "Hv"), (len(spec.query_lengths), *spec.heads))),
        "params": manifest_params(spec),
        "inputs_half_exact": True,
        "convention": "zero",
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
    report(f"sequences: {len(cases)} cases, worst central difference {worst:.2e}")
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
