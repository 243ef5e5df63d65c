"""The formula of docs/semantics.md in NumPy float64: forward, analytic backward, central differences.

It materialises everything and is written to be read beside the text, step by step. Rank 4 only: a case
without a batch axis is given one by the caller.
"""

import dataclasses

import numpy as np

from philox import dropout_threshold, keep_mask

BOTTOM_RIGHT = "bottom_right"


@dataclasses.dataclass
class Call:
    """One attention call with its data. Floats are float64; shapes as in docs/semantics.md."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    scale: float | None = None
    is_causal: bool = False
    window: tuple | None = None
    query_offset: int | str = 0
    softcap: float | None = None
    dropout: dict | None = None
    alibi_slopes: np.ndarray | None = None
    bias: np.ndarray | None = None
    mask: np.ndarray | None = None
    sinks: np.ndarray | None = None
    query_lengths: np.ndarray | None = None
    key_lengths: np.ndarray | None = None

    @property
    def dims(self):
        """(B, T, S, N, K)."""
        batch, query_length, heads, _ = self.query.shape
        _, key_length, key_heads, _ = self.key.shape
        return batch, query_length, key_length, heads, key_heads

    @property
    def scale_value(self):
        """The scale, 1/sqrt(H) where none was given."""
        return 1.0 / np.sqrt(self.query.shape[3]) if self.scale is None else self.scale


@dataclasses.dataclass
class Forward:
    """What the forward pass gives, and what the backward pass needs of it."""

    out: np.ndarray  # [B, T, N, Hv]
    logsumexp: np.ndarray  # [B, T, N]
    row_has_keys: np.ndarray  # [B, T, N]
    padded_rows: np.ndarray  # [B, T, N]
    keep: np.ndarray | None  # [B, N, T, S]
    probabilities: np.ndarray  # p, before dropout
    dropped: np.ndarray  # p', after dropout
    dropout_factor: np.ndarray  # d p' / d p
    softcap_slope: np.ndarray  # d softcap(x) / d x
    sink_probability: np.ndarray  # [B, N, T]


def forward(call):
    """Steps 1 to 5 of the formula."""
    batch, query_length, key_length, heads, key_heads = call.dims
    full_shape = (batch, heads, query_length, key_length)
    group = heads // key_heads
    key = np.repeat(call.key, group, axis=2)
    value = np.repeat(call.value, group, axis=2)
    query_lengths = _lengths(call.query_lengths, batch, query_length)
    key_lengths = _lengths(call.key_lengths, batch, key_length)

    # Step 1: positions, [B, 1, T, 1] against [S].
    offset = key_lengths - query_lengths if call.query_offset == BOTTOM_RIGHT else call.query_offset
    offset = np.broadcast_to(np.asarray(offset, dtype=np.int64), (batch,))
    row = np.arange(query_length)[None, None, :, None]
    column = np.arange(key_length)[None, None, None, :]
    position = row + offset[:, None, None, None]

    # Step 2: scale, softcap, ALiBi, bias.
    logits = call.scale_value * np.einsum("btnh,bsnh->bnts", call.query, key)
    softcap_slope = np.ones(full_shape)
    if call.softcap is not None:
        capped = np.tanh(logits / call.softcap)
        logits = call.softcap * capped
        softcap_slope = 1.0 - capped * capped
    if call.alibi_slopes is not None:
        slopes = np.broadcast_to(call.alibi_slopes, (batch, heads))[:, :, None, None]
        logits = logits - slopes * np.abs(position - column)
    if call.bias is not None:
        logits = logits + call.bias

    # Step 3: what may take part.
    padded = row >= query_lengths[:, None, None, None]
    allowed = ~padded & (column < key_lengths[:, None, None, None])
    if call.mask is not None:
        allowed = allowed & call.mask
    if call.is_causal:
        allowed = allowed & (column <= position)
    if call.window is not None:
        left, right = call.window
        if left is not None:
            allowed = allowed & (position - left <= column)
        if right is not None:
            allowed = allowed & (column <= position + right)
    allowed = np.broadcast_to(allowed, full_shape) & (logits != -np.inf)
    padded = np.broadcast_to(padded[..., 0], full_shape[:3])

    # Step 4: LSE over the allowed keys and the sink. The sink of a padded query row does not count.
    sink = np.full(full_shape[:3], -np.inf)
    if call.sinks is not None:
        sink = np.where(padded, -np.inf, call.sinks[None, :, None])
    logits = np.where(allowed, logits, -np.inf)
    largest = np.maximum(logits.max(axis=3, initial=-np.inf), sink)
    has_terms = largest != -np.inf
    shift = np.where(has_terms, largest, 0.0)
    total = np.exp(logits - shift[..., None]).sum(axis=3) + np.exp(sink - shift)
    logsumexp = np.where(has_terms, shift + np.log(np.where(has_terms, total, 1.0)), -np.inf)

    # Step 5: probabilities, dropout, output. A row without terms has only -inf logits, so its p are 0.
    finite_logsumexp = np.where(has_terms, logsumexp, 0.0)
    probabilities = np.exp(logits - finite_logsumexp[..., None])
    keep, dropout_factor = None, np.ones(full_shape)
    if call.dropout is not None:
        keep = keep_mask(batch, heads, query_length, key_length, **call.dropout)
        dropout_factor = keep * (65536.0 / (65536 - dropout_threshold(call.dropout["rate"])))
    dropped = probabilities * dropout_factor
    return Forward(
        out=np.einsum("bnts,bsnh->btnh", dropped, value),
        logsumexp=logsumexp.transpose(0, 2, 1),
        row_has_keys=allowed.any(axis=3).transpose(0, 2, 1),
        padded_rows=padded.transpose(0, 2, 1),
        keep=keep,
        probabilities=probabilities,
        dropped=dropped,
        dropout_factor=dropout_factor,
        softcap_slope=softcap_slope,
        sink_probability=np.exp(sink - finite_logsumexp),
    )


def backward(call, result, d_out, d_logsumexp=None):
    """Step 6: the exact derivatives, a dict with query, key, value and, where present, bias and sinks."""
    batch, query_length, key_length, heads, key_heads = call.dims
    group = heads // key_heads
    key = np.repeat(call.key, group, axis=2)
    value = np.repeat(call.value, group, axis=2)

    d_probabilities = np.einsum("btnh,bsnh->bnts", d_out, value) * result.dropout_factor
    # The row's own term: - sum_j p_j dP_j from the softmax, + dLSE where the LSE is finite.
    row_term = -(result.probabilities * d_probabilities).sum(axis=3)
    if d_logsumexp is not None:
        usable = np.where(np.isneginf(result.logsumexp), 0.0, d_logsumexp)
        row_term = row_term + usable.transpose(0, 2, 1)
    d_logits = result.probabilities * (d_probabilities + row_term[..., None])
    d_products = call.scale_value * result.softcap_slope * d_logits

    def sum_groups(gradient):
        return gradient.reshape(batch, key_length, key_heads, group, gradient.shape[3]).sum(axis=3)

    gradients = {
        "query": np.einsum("bnts,bsnh->btnh", d_products, key),
        "key": sum_groups(np.einsum("bnts,btnh->bsnh", d_products, call.query)),
        "value": sum_groups(np.einsum("bnts,btnh->bsnh", result.dropped, d_out)),
    }
    if call.bias is not None:
        gradients["bias"] = sum_to_shape(d_logits, call.bias.shape)
    if call.sinks is not None:
        gradients["sinks"] = (result.sink_probability * row_term).sum(axis=(0, 2))
    return gradients


def sum_to_shape(array, shape):
    """The transpose of broadcasting `shape` to the shape of `array`."""
    leading = array.ndim - len(shape)
    array = array.sum(axis=tuple(range(leading)))
    repeated = tuple(axis for axis, size in enumerate(shape) if size == 1 and array.shape[axis] != 1)
    return array.sum(axis=repeated, keepdims=True)


def _lengths(lengths, batch, default):
    return np.full(batch, default) if lengths is None else np.asarray(lengths, dtype=np.int64)


def finite_difference_worst(call, gradients, d_out, d_logsumexp, stream_for, entries=48, step=1e-5):
    """The worst `|difference - gradient| / max(1, |gradient|)` of central differences.

    For each input with a gradient: up to `entries` single elements spread over the tensor, and one direction
    that moves every element. `stream_for(name)` gives the random stream of the direction.
    """
    worst = 0.0
    for name, gradient in gradients.items():
        original = getattr(call, name)
        if original.size == 0:
            continue
        # An element of the bias that is -inf stays there, in every direction.
        movable = np.isfinite(original)
        directions = [stream_for(name).bell(original.shape) * movable / np.sqrt(original.size)]
        candidates = np.flatnonzero(movable)
        for index in candidates[:: max(1, len(candidates) // entries)]:
            direction = np.zeros(original.size)
            direction[index] = 1.0
            directions.append(direction.reshape(original.shape))
        for direction in directions:
            high = forward(dataclasses.replace(call, **{name: original + step * direction}))
            low = forward(dataclasses.replace(call, **{name: original - step * direction}))
            # Differences before sums: what an element does not touch then cancels exactly.
            change = ((high.out - low.out) * d_out).sum()
            if d_logsumexp is not None:
                finite = ~np.isneginf(high.logsumexp)
                change += ((high.logsumexp[finite] - low.logsumexp[finite]) * d_logsumexp[finite]).sum()
            expected = (np.where(movable, gradient, 0.0) * direction).sum()
            error = abs(change / (2.0 * step) - expected) / max(1.0, abs(expected))
            if not np.isfinite(error):
                raise AssertionError(f"the central difference of {name} is not finite")
            worst = max(worst, float(error))
    return worst
