//! Cases whose results are compared bit by bit with those of calls that must give the same ones.

use attention_core::{DType, Dropout, QueryOffset, Window};

use super::case::Edit;
use super::{AlibiShape, BiasContent, Broadcast, Case, MaskContent, dims};

/// Alone and, the last, together.
const OPTIONS: [(&str, Edit); 16] = [
    ("plain", |_| ()),
    ("causal", |case| {
        case.options.causal = true;
        case.options.query_offset = QueryOffset::BottomRight;
    }),
    ("window", |case| case.options.window = Window::new(6, 3)),
    ("mask", |case| case.options.mask = Some(Broadcast { rank: 4, full: [true, false, true, true] })),
    ("padding-mask", |case| {
        case.options.mask = Some(Broadcast { rank: 4, full: [true, false, false, true] });
        case.content.mask = MaskContent::Sparse;
    }),
    ("bias", |case| case.options.bias = Some(Broadcast { rank: 4, full: [true, false, true, true] })),
    ("bias-of-keys", |case| {
        case.options.bias = Some(Broadcast { rank: 1, full: [false, false, false, true] });
        case.options.bias_dtype = Some(DType::F32);
    }),
    ("bias-negative-infinity", |case| {
        case.options.bias = Some(Broadcast::FULL);
        case.content.bias = BiasContent::NegativeInfinity;
    }),
    ("bias-mask", |case| {
        case.options.bias = Some(Broadcast { rank: 2, full: [false, false, true, true] });
        case.options.mask = Some(Broadcast { rank: 1, full: [false, false, false, true] });
    }),
    ("bias-softcap", |case| {
        case.options.bias = Some(Broadcast { rank: 3, full: [false, true, true, true] });
        case.options.softcap = Some(2.0);
    }),
    ("softcap", |case| case.options.softcap = Some(1.5)),
    ("alibi", |case| case.options.alibi = Some(AlibiShape::Heads)),
    ("sinks", |case| {
        case.options.sinks = true;
        case.options.d_lse = true;
    }),
    ("lengths", |case| {
        case.options.query_lengths = Some(halves(case.dims.query_length));
        case.options.key_value_lengths = Some(halves(case.dims.key_length));
    }),
    ("dropout", |case| case.options.dropout = Some(Dropout::new(0.3, 5))),
    ("everything", |case| {
        case.options.causal = true;
        case.options.query_offset = QueryOffset::Fixed(30);
        case.options.window.left = Some(40);
        case.options.softcap = Some(3.0);
        case.options.alibi = Some(AlibiShape::BatchHeads);
        case.options.mask = Some(Broadcast { rank: 4, full: [true, false, false, true] });
        case.options.bias = Some(Broadcast { rank: 4, full: [false, true, true, true] });
        case.options.sinks = true;
        case.options.d_lse = true;
        case.options.dropout = Some(Dropout::new(0.2, 7));
        case.options.key_value_lengths = Some(halves(case.dims.key_length));
    }),
];

const IN_BLOCKS: [&str; 6] =
    ["plain", "mask", "bias", "bias-negative-infinity", "bias-softcap", "everything"];

fn halves(length: usize) -> Vec<usize> {
    vec![length, length.div_ceil(2)]
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (size, sizes) in [
        ("decode", [2, 1, 45, 4, 2, 16]),
        ("small", [2, 9, 13, 4, 2, 8]),
        // More keys than backends take for a small problem. Few of the options: many calls are compared.
        ("blocks", [2, 34, 70, 2, 1, 8]),
    ] {
        for (name, edit) in OPTIONS {
            if size == "blocks" && !IN_BLOCKS.contains(&name) {
                continue;
            }
            let mut case = Case::new(format!("bits/{name}-{size}"), dims(sizes));
            edit(&mut case);
            case.variations = true;
            cases.push(case);
        }
    }
    // More keys than a block of any backend has, as many rows as decoding kernels take.
    for (name, edit) in [OPTIONS[0], OPTIONS[5]] {
        let mut case = Case::new(format!("bits/{name}-many-keys"), dims([1, 1, 1300, 2, 1, 8]));
        edit(&mut case);
        case.variations = true;
        cases.push(case);
    }
    cases
}
