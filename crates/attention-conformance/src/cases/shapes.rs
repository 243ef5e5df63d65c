//! Cases about sizes: head dimensions, grouping, empty and tiny axes, and the edges of every tile size.

use attention_core::{DType, Dimensions, Dropout, QueryOffset, Window};

use super::case::Edit;
use super::{AlibiShape, Broadcast, Case, dims};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    head_dims(&mut cases);
    groups(&mut cases);
    small_axes(&mut cases);
    tile_edges(&mut cases);
    large(&mut cases);
    cases
}

fn head_dims(cases: &mut Vec<Case>) {
    for h in
        [1, 2, 3, 4, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 72, 80, 96, 112, 127, 128, 129]
    {
        cases.push(Case::new(format!("head-dim/{h}"), dims([2, 7, 9, 2, 2, h])));
    }
    for h in [160, 192, 256, 257] {
        cases.push(Case::new(format!("head-dim/{h}"), dims([1, 5, 6, 2, 1, h])));
    }
    for (h, hv) in [(16, 8), (16, 1), (1, 16), (8, 33), (64, 128), (128, 64), (33, 7), (192, 128), (24, 40)] {
        let sizes = Dimensions { value_head_dim: hv, ..dims([2, 6, 11, 4, 2, h]) };
        let mut case = Case::new(format!("value-head-dim/h{h}-hv{hv}"), sizes);
        cases.push(case.clone());
        case.name.push_str("-causal");
        case.options.causal = true;
        cases.push(case);
    }
    // Latent attention (DeepSeek-V2, arXiv 2405.04434): every head has the same key, most of which is the
    // value.
    for (name, sizes) in [("several", [1, 37, 45, 4, 1, 576]), ("decode", [2, 1, 700, 16, 1, 576])] {
        let sizes = Dimensions { value_head_dim: 512, ..dims(sizes) };
        let mut case = Case::new(format!("value-head-dim/latent-{name}"), sizes);
        case.options.causal = true;
        case.options.query_offset = QueryOffset::BottomRight;
        cases.push(case);
    }
}

fn groups(cases: &mut Vec<Case>) {
    for (n, k) in
        [(1, 1), (2, 1), (3, 1), (8, 1), (2, 2), (4, 2), (6, 2), (6, 3), (8, 4), (12, 3), (5, 5), (7, 1)]
    {
        for (t, s) in [(5, 9), (1, 12), (17, 17)] {
            let mut case = Case::new(format!("groups/n{n}-k{k}-t{t}-s{s}"), dims([2, t, s, n, k, 8]));
            case.options.causal = t == s;
            cases.push(case);
        }
    }
}

fn small_axes(cases: &mut Vec<Case>) {
    let axes = [
        ("no-queries", [2, 0, 5, 2, 2, 8]),
        ("no-keys", [2, 5, 0, 2, 2, 8]),
        ("no-queries-no-keys", [2, 0, 0, 2, 2, 8]),
        ("no-batch", [0, 5, 6, 2, 2, 8]),
        ("no-heads", [2, 5, 6, 0, 0, 8]),
        ("no-query-heads", [2, 5, 6, 0, 2, 8]),
        ("one-query", [3, 1, 13, 4, 2, 16]),
        ("one-key", [3, 6, 1, 4, 2, 16]),
        ("one-of-each", [1, 1, 1, 1, 1, 1]),
        ("more-queries-than-keys", [2, 21, 6, 2, 2, 16]),
        ("more-keys-than-queries", [2, 6, 37, 2, 2, 16]),
        ("batch-of-7", [7, 3, 4, 2, 1, 8]),
    ];
    for (name, sizes) in axes {
        let sizes = dims(sizes);
        cases.push(Case::new(format!("small/{name}"), sizes));
        let mut case = Case::new(format!("small/{name}-causal-window"), sizes);
        case.options.causal = true;
        case.options.window = Window { left: Some(3), right: None };
        cases.push(case);
        let mut case = Case::new(format!("small/{name}-all-tensors"), sizes);
        case.options.mask = Some(Broadcast::FULL);
        case.options.bias = Some(Broadcast { rank: 3, full: [false, true, true, true] });
        case.options.bias_dtype = Some(DType::F32);
        case.options.sinks = true;
        case.options.d_lse = true;
        case.options.query_lengths =
            Some((0..sizes.batch).map(|b| sizes.query_length - b.min(sizes.query_length)).collect());
        case.options.key_value_lengths =
            Some((0..sizes.batch).map(|b| sizes.key_length.saturating_sub(2 * b)).collect());
        cases.push(case);
    }
}

fn tile_edges(cases: &mut Vec<Case>) {
    for edge in [8, 16, 32, 64, 128] {
        for (index, size) in [edge - 1, edge, edge + 1].into_iter().enumerate() {
            // Queries and keys walk over the edge apart, then together with causal masking.
            cases.push(Case::new(format!("tile/t{size}"), dims([1, size, 7 + index, 2, 1, 8])));
            cases.push(Case::new(format!("tile/s{size}"), dims([1, 5 + index, size, 2, 1, 8])));
            let mut case = Case::new(format!("tile/t{size}-s{size}-causal"), dims([1, size, size, 1, 1, 16]));
            case.options.causal = true;
            cases.push(case);
            let mut case = Case::new(format!("tile/s{size}-lengths"), dims([2, 4, size + 5, 2, 2, 8]));
            case.options.key_value_lengths = Some(vec![size, size + 5]);
            cases.push(case);
            let mut case = Case::new(format!("tile/window-{size}"), dims([1, 9, size + 12, 1, 1, 8]));
            case.options.query_offset = attention_core::QueryOffset::BottomRight;
            case.options.window = Window { left: Some(size), right: Some(0) };
            cases.push(case);
        }
    }
}

fn large(cases: &mut Vec<Case>) {
    let mut case = Case::new("large/causal-gqa", dims([1, 200, 200, 4, 2, 64]));
    case.options.causal = true;
    cases.push(case);
    cases.push(Case::new("large/decode", dims([2, 1, 1024, 8, 2, 64])));
    cases.push(Case::new("large/many-keys", dims([1, 3, 1500, 2, 2, 32])));
    let mut case = Case::new("large/many-queries", dims([1, 700, 20, 2, 1, 32]));
    case.options.window = Window::new(300, 40);
    cases.push(case);
    let mut case = Case::new("large/mask-bias", dims([2, 130, 140, 2, 2, 128]));
    case.options.mask = Some(Broadcast { rank: 4, full: [true, false, false, true] });
    case.options.bias = Some(Broadcast { rank: 4, full: [false, true, true, true] });
    cases.push(case);
    // Options alone, where tiles are the largest.
    let options: [(&str, Edit); 4] = [
        ("dropout", |case| case.options.dropout = Some(Dropout::new(0.25, 42))),
        ("softcap", |case| case.options.softcap = Some(2.0)),
        ("alibi", |case| case.options.alibi = Some(AlibiShape::Heads)),
        ("sinks", |case| case.options.sinks = true),
    ];
    for (name, edit) in options {
        let mut case = Case::new(format!("large/{name}"), dims([1, 150, 170, 4, 2, 64]));
        edit(&mut case);
        cases.push(case);
    }
}
