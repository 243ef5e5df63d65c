//! Cases about choices: sizes and options at which backends take another kernel, for their own sake. What
//! runs is said by the variants of a report; a variant that no case reaches fails a whole run.

use attention_core::{DType, Dimensions, Dropout, Gradients, Role};

use super::case::Edit;
use super::{
    AlibiShape, BiasContent, Broadcast, Case, Far, Layout, Layouts, MaskContent, Saved, Sizes, Values, dims,
};

/// Masks and biases together, for which some backends have kernels that look for every option.
fn several(case: &mut Case) {
    case.options.mask = Some(Broadcast { rank: 4, full: [true, false, false, true] });
    case.options.bias = Some(Broadcast { rank: 4, full: [false, false, true, true] });
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let options: [(&str, Edit); 3] = [
        ("plain", |_| ()),
        ("mask", |case| case.options.mask = Some(Broadcast { rank: 4, full: [true, false, false, true] })),
        ("several", several),
    ];
    // Few rows of few heads over many keys, which are cut into parts: from 17 rows, from 65 and from 129 on,
    // kernels are others.
    for rows in [5, 30, 80, 130] {
        for width in [64, 128] {
            for (name, edit) in options {
                let sizes = dims([1, rows, 600, 1, 1, width]);
                let mut case = Case::new(format!("choices/rows-{rows}-h{width}-{name}"), sizes);
                edit(&mut case);
                cases.push(case);
            }
        }
    }
    // As many, over keys that are one part.
    for width in [64, 128] {
        for (name, edit) in [options[0], options[2]] {
            let mut case =
                Case::new(format!("choices/keys-140-h{width}-{name}"), dims([1, 130, 140, 1, 1, width]));
            edit(&mut case);
            cases.push(case);
        }
    }
    // One of the gradients that share a kernel.
    for (rows, width) in [(130, 64), (130, 128), (5, 192), (5, 256)] {
        for (name, gradients) in [("dk", Gradients::KEY), ("dv", Gradients::VALUE)] {
            let sizes = dims([1, rows, rows + 10, 2, 2, width]);
            let mut case = Case::new(format!("choices/{name}-h{width}"), sizes);
            case.options.gradients = gradients;
            cases.push(case.clone());
            if name == "dk" {
                case.name.push_str("-several");
                several(&mut case);
                cases.push(case);
            }
        }
    }
    // Widths beside each other of which one decides about tiles; keys that are cut where heads are wide; and
    // rows and keys of few and many at once.
    for (sizes, value_head_dim) in [
        ([1, 5, 6, 1, 1, 448], 64),
        ([1, 5, 6, 1, 1, 32], 512),
        ([1, 5, 6, 1, 1, 256], 32),
        ([1, 5, 6, 1, 1, 32], 256),
        ([1, 3, 600, 1, 1, 200], 200),
        ([1, 3, 600, 1, 1, 300], 32),
        ([1, 70, 600, 1, 1, 32], 96),
        ([1, 150, 170, 1, 1, 96], 96),
    ] {
        let [_, rows, keys, .., head_dim] = sizes;
        let name = format!("choices/rows-{rows}-keys-{keys}-h{head_dim}-hv{value_head_dim}");
        cases.push(Case::new(name, Dimensions { value_head_dim, ..dims(sizes) }));
    }
    for width in [96, 112] {
        let mut case = Case::new(format!("choices/dk-h{width}"), dims([1, 5, 6, 2, 2, width]));
        case.options.gradients = Gradients::KEY;
        cases.push(case);
    }
    // A scale below 0 with one option more, of all gradients and of those of keys and values alone.
    let mut case = Case::new("choices/mask-scale", dims([2, 70, 140, 2, 1, 16]));
    case.options.mask = Some(Broadcast::FULL);
    case.options.scale = Some(-0.25);
    cases.push(case);
    let mut case = Case::new("choices/dk-dv-dropout-scale", dims([2, 70, 140, 2, 1, 16]));
    case.options.dropout = Some(Dropout::new(0.3, 11));
    case.options.scale = Some(-0.25);
    case.options.gradients = Gradients::KEY | Gradients::VALUE;
    cases.push(case);
    let mut case = Case::new("choices/dbias-h192", dims([1, 5, 6, 2, 1, 192]));
    case.options.bias = Some(Broadcast::FULL);
    cases.push(case);
    // Keys that are a part of a row's, whose probabilities come from the given logsumexp: few rows and more,
    // f32 computed in f64 and in itself.
    for sizes in [[2, 1, 20, 4, 2, 16], [1, 3, 1500, 4, 2, 16], [2, 20, 30, 4, 2, 16], [1, 90, 140, 2, 1, 64]]
    {
        let [_, rows, keys, ..] = sizes;
        for (name, edit) in [options[0], options[2]] {
            let mut case = Case::new(format!("choices/more-keys-{rows}x{keys}-{name}"), dims(sizes));
            case.options.sinks = true;
            case.options.d_lse = true;
            case.saved = Saved::MoreKeys;
            edit(&mut case);
            cases.push(case);
        }
    }
    // Batch rows of more logits than f32 is computed in f64 for: rows of a bias with one number for all keys,
    // logsumexps above which a sink is weighed with its row's own sum, and strided keys that are not packed.
    for (name, queries) in [("one", false), ("rows", true)] {
        let mut case = Case::new(format!("choices/bias-{name}"), dims([2, 70, 66, 4, 2, 16]));
        case.options.bias = Some(Broadcast { rank: 4, full: [true, true, queries, false] });
        cases.push(case);
    }
    for rows in [4, 70] {
        let mut case = Case::new(format!("choices/large-sinks-{rows}"), dims([1, rows, 1100, 2, 1, 16]));
        case.options.sinks = true;
        case.options.bias = Some(Broadcast { rank: 4, full: [false, true, false, false] });
        case.content.bias = BiasContent::Far { far: Far::Rows, start: 2 };
        case.content.sinks = Sizes::Far { start: 2 };
        case.options.scale = Some(0.0);
        cases.push(case);
        let mut case = Case::new(format!("choices/strided-{rows}"), dims([1, rows, 1100, 2, 1, 16]));
        case.layouts = Layouts::operands(Layout::InnerStride);
        cases.push(case);
    }
    // A bias of more digits than the logits, strided, and more keys than one task sums its gradient for.
    let mut case = Case::new("choices/bias-f64-strided", dims([2, 9, 20, 2, 1, 16]));
    case.options.bias = Some(Broadcast::FULL);
    case.options.bias_dtype = Some(DType::F64);
    case.layouts = Layouts::default().with(Role::Bias, Layout::InnerStride);
    cases.push(case);
    let mut case = Case::new("choices/dbias-4200-keys", dims([1, 3, 4200, 2, 1, 8]));
    case.options.bias = Some(Broadcast { rank: 4, full: [false, false, true, true] });
    cases.push(case);
    // Decoding of batch rows that f32 is not computed in f64 for: each number of rows that shares a pass over
    // the keys, and a value that is not finite in whole vectors of columns and behind them.
    for (rows, sizes) in
        [(1, [1, 1, 4200, 4, 4, 40]), (2, [1, 2, 2100, 2, 2, 40]), (4, [1, 1, 4200, 8, 2, 40])]
    {
        let mut case = Case::new(format!("choices/few-{rows}"), dims(sizes));
        cases.push(case.clone());
        case.name.push_str("-nan");
        case.content.values = Values::NanInOneValue;
        cases.push(case);
    }
    // As large: no product counts, and no key takes part.
    let mut case = Case::new("choices/scale-zero", dims([1, 70, 66, 2, 1, 16]));
    case.options.scale = Some(0.0);
    cases.push(case);
    let mut case = Case::new("choices/mask-none", dims([1, 70, 66, 2, 1, 16]));
    case.options.mask = Some(Broadcast::FULL);
    case.content.mask = MaskContent::AllFalse;
    cases.push(case);
    // More heads than threads, so that one thread can have all gradients of a head.
    cases.push(Case::new("choices/heads-96", Dimensions { batch: 3, ..dims([1, 70, 60, 32, 32, 8]) }));
    // Heads that are cut into tasks of many rows and one of few.
    cases.push(Case::new("choices/rows-515", dims([1, 515, 20, 2, 1, 16])));
    // Where every key is behind its row, cuDNN has ALiBi itself; heads of their own, whose gradients it does
    // not round twice.
    for (name, lengths) in [("", None), ("-lengths", Some([40, 23]))] {
        let sizes = Dimensions { batch: 2, ..dims([1, 40, 40, 2, 2, 64]) };
        let mut case = Case::new(format!("choices/alibi-causal{name}"), sizes);
        case.options.causal = true;
        case.options.alibi = Some(AlibiShape::Heads);
        case.options.query_lengths = lengths.map(Vec::from);
        case.options.key_value_lengths = lengths.map(Vec::from);
        cases.push(case);
    }
    cases
}
