//! Cases about sequences that are packed one behind the other: how they lie, each option, and pairs of
//! options.

use attention_core::{DType, Dropout, QueryOffset, Role, Window};

use super::case::Edit;
use super::{
    AlibiShape, BiasContent, Broadcast, Case, KeyRows, Layout, Layouts, Saved, Sequences, Values, dims,
};

/// For B, N, T and S.
const PER_SEQUENCE: Broadcast = Broadcast { rank: 4, full: [true, false, true, true] };
const OF_KEYS: Broadcast = Broadcast { rank: 4, full: [true, false, false, true] };
const FOR_ALL: Broadcast = Broadcast { rank: 4, full: [false, true, true, true] };

/// The options that a call of sequences may have, to be taken alone and two by two.
pub(super) const OPTIONS: [(&str, Edit); 14] = [
    ("causal", |case| case.options.causal = true),
    ("bottom-right", |case| {
        case.options.causal = true;
        case.options.query_offset = QueryOffset::BottomRight;
    }),
    ("offsets", |case| {
        case.options.causal = true;
        case.options.query_offsets = Some((0..case.dims.batch as i64).map(|row| 3 - 2 * row).collect());
    }),
    ("window", |case| case.options.window = Window::new(3, 1)),
    ("alibi", |case| case.options.alibi = Some(AlibiShape::Heads)),
    ("alibi-sequences", |case| case.options.alibi = Some(AlibiShape::BatchHeads)),
    ("softcap", |case| case.options.softcap = Some(1.5)),
    ("sinks", |case| case.options.sinks = true),
    ("mask", |case| case.options.mask = Some(PER_SEQUENCE)),
    ("mask-all", |case| case.options.mask = Some(Broadcast { rank: 4, full: [false, false, true, true] })),
    ("bias", |case| case.options.bias = Some(OF_KEYS)),
    ("bias-all", |case| case.options.bias = Some(FOR_ALL)),
    ("dropout", |case| case.options.dropout = Some(Dropout::new(0.3, 5))),
    ("d-lse", |case| case.options.d_lse = true),
];

/// Most options at once.
pub(super) fn everything(case: &mut Case) {
    case.options.causal = true;
    case.options.query_offset = QueryOffset::BottomRight;
    case.options.window.left = Some(8);
    case.options.softcap = Some(3.0);
    case.options.alibi = Some(AlibiShape::BatchHeads);
    case.options.mask = Some(OF_KEYS);
    case.options.bias = Some(FOR_ALL);
    case.options.sinks = true;
    case.options.d_lse = true;
    case.options.dropout = Some(Dropout::new(0.2, 7));
}

/// A case of sequences of these lengths, grouped.
pub(super) fn of_lengths(name: impl Into<String>, queries: &[usize], keys: &[usize]) -> Case {
    let most = |lengths: &[usize]| lengths.iter().copied().max().unwrap_or(0);
    let mut case = Case::new(name, dims([queries.len(), most(queries), most(keys), 4, 2, 8]));
    case.options.query_lengths = Some(queries.to_vec());
    case.options.key_value_lengths = Some(keys.to_vec());
    case.sequences = Some(Sequences::PACKED);
    case
}

/// With one head of the width that kernels have tiles of their own for.
pub(super) fn of_tiles(mut case: Case) -> Case {
    (case.dims.query_heads, case.dims.key_heads) = (1, 1);
    (case.dims.head_dim, case.dims.value_head_dim) = (64, 64);
    case
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    lengths(&mut cases);
    places(&mut cases);
    options(&mut cases);
    bits(&mut cases);
    cases
}

fn lengths(cases: &mut Vec<Case>) {
    let lists: [(&str, &[usize], &[usize]); 10] = [
        ("plain", &[5, 1, 9], &[7, 3, 13]),
        ("alike", &[6, 11, 3], &[6, 11, 3]),
        ("one", &[7], &[9]),
        ("without-queries", &[0, 4, 0, 3], &[5, 6, 2, 4]),
        ("without-keys", &[3, 4, 2], &[0, 6, 0]),
        ("without-both", &[4, 0, 5], &[6, 0, 3]),
        ("all-empty", &[0, 0, 0], &[0, 0, 0]),
        ("no-sequences", &[], &[]),
        ("decode", &[1, 1, 1, 1], &[45, 1, 16, 0]),
        ("many-short", &[1, 3, 2, 1, 0, 2, 1, 1, 3, 2, 1, 1], &[2, 1, 1, 3, 2, 0, 1, 4, 1, 2, 1, 3]),
    ];
    for (name, queries, keys) in lists {
        let mut case = of_lengths(format!("packed/{name}"), queries, keys);
        case.options.sinks = name.starts_with("without");
        case.options.d_lse = true;
        cases.push(case.clone());
        case.name.push_str("-bottom-right");
        OPTIONS[1].1(&mut case);
        cases.push(case);
    }
    // A bound that no sequence reaches, and no tensor, and tensors without any row.
    let mut case = of_lengths("packed/longest-of-the-tensor", &[5, 0, 9], &[7, 3, 13]);
    (case.dims.query_length, case.dims.key_length) = (17, 25);
    cases.push(case);
    let mut case = of_lengths("packed/no-rows", &[0, 0], &[0, 0]);
    (case.dims.query_length, case.dims.key_length) = (4, 6);
    case.sequences = Some(Sequences { query_tail: Some(0), keys: KeyRows::Packed { tail: 0, unused: None } });
    cases.push(case);
    // One long sequence among short ones, and lengths at the edges of tiles.
    let long: ([usize; 5], [usize; 5]) = ([1, 2, 150, 1, 3], [2, 1, 170, 4, 1]);
    for (name, edit) in
        [("plain", (|_| ()) as Edit), ("bottom-right", OPTIONS[1].1), ("everything", everything)]
    {
        let mut case = of_lengths(format!("packed/one-long-{name}"), &long.0, &long.1);
        (case.dims.query_heads, case.dims.key_heads) = (2, 1);
        edit(&mut case);
        cases.push(case);
    }
    // All keys are of one sequence among empty ones, more than a tile has, and no row or key is behind it:
    // scratch for sequences of at least one key would be too small.
    for (name, edit) in [("plain", (|_| ()) as Edit), ("bottom-right", OPTIONS[1].1)] {
        let mut case = of_lengths(format!("packed/one-among-empty-{name}"), &[0, 140, 0, 0], &[0, 130, 0, 0]);
        case.sequences =
            Some(Sequences { query_tail: Some(0), keys: KeyRows::Packed { tail: 0, unused: None } });
        edit(&mut case);
        cases.push(case);
    }
    // Enough rows and keys for every tile of kernels on a GPU, and for keys that are split.
    for (name, queries, keys) in [
        ("long", &[200, 1, 300][..], &[1300, 700, 300][..]),
        ("large", &[130, 140], &[140, 130]),
        ("few-rows-long", &[20, 1], &[700, 33]),
    ] {
        cases.push(of_tiles(of_lengths(format!("packed/{name}"), queries, keys)));
    }
    // The same without grouped heads, whose gradients not every backend sums exactly: empty sequences between
    // others, rows of no sequence, and each structure.
    type Edited = (&'static str, &'static [usize], &'static [usize], Edit);
    let few: [Edited; 7] = [
        ("without-queries", &[0, 40, 0, 70], &[30, 65, 2, 130], |_| ()),
        ("without-keys", &[30, 40, 2, 0], &[0, 65, 0, 0], |_| ()),
        ("without-both-causal", &[20, 0, 3, 65], &[17, 0, 9, 64], OPTIONS[0].1),
        ("bottom-right", &[0, 33, 3, 64], &[5, 40, 0, 20], OPTIONS[1].1),
        ("window", &[9, 0, 70, 5], &[13, 4, 70, 0], OPTIONS[3].1),
        ("sinks", &[9, 0, 70, 5], &[13, 4, 66, 0], OPTIONS[7].1),
        ("used", &[9, 0, 70, 5], &[13, 4, 50, 0], |case| {
            let unused = Some(vec![20, 1, 0, 3]);
            case.dims.key_length = 64;
            case.sequences =
                Some(Sequences { query_tail: Some(30), keys: KeyRows::Packed { tail: 70, unused } });
        }),
    ];
    for (name, queries, keys, edit) in few {
        let mut case = of_tiles(of_lengths(format!("packed/tiles-{name}"), queries, keys));
        edit(&mut case);
        cases.push(case);
    }
    for edge in [16, 32, 64, 128] {
        for causal in [false, true] {
            let name = format!("packed/edge-{edge}{}", if causal { "-causal" } else { "" });
            let lengths = [edge - 1, edge, edge + 1];
            let mut case = of_lengths(name, &lengths, &[edge + 1, edge - 1, edge]);
            let width = if edge == 128 { 8 } else { 64 };
            case.dims =
                attention_core::Dimensions { query_heads: 1, key_heads: 1, head_dim: width, ..case.dims };
            case.dims.value_head_dim = width;
            case.options.causal = causal;
            cases.push(case);
        }
    }
}

/// Where rows are: tails, used keys, dense keys, strides.
fn places(cases: &mut Vec<Case>) {
    let mut add = |name: &str, query_tail: usize, keys: KeyRows, edit: Edit| {
        let mut case = of_lengths(format!("packed/{name}"), &[5, 1, 9], &[7, 3, 11]);
        case.dims.key_length = 13;
        case.sequences = Some(Sequences { query_tail: Some(query_tail), keys });
        edit(&mut case);
        cases.push(case);
    };
    let packed = |tail: usize| KeyRows::Packed { tail, unused: None };
    let used = |unused: [usize; 3]| KeyRows::Packed { tail: 2, unused: Some(unused.to_vec()) };
    add("tail-none", 0, packed(0), |_| ());
    add("tail-of-queries", 40, packed(0), |case| (case.options.sinks, case.options.d_lse) = (true, true));
    add("tail-of-keys", 0, packed(70), |_| ());
    add("tail-clean", 6, packed(5), |case| case.content.garbage = false);
    for (name, edit) in [OPTIONS[0], OPTIONS[1], OPTIONS[10], OPTIONS[12]] {
        add(&format!("used-{name}"), 3, used([3, 0, 2]), edit);
        add(&format!("dense-keys-{name}"), 3, KeyRows::Dense, edit);
    }
    add("used-all", 0, used([0, 0, 0]), |_| ());
    add("used-none", 0, used([5, 6, 0]), |case| {
        case.options.key_value_lengths = Some(vec![0, 0, 0]);
        case.options.sinks = true;
    });
    add("used-everything", 1, used([3, 0, 2]), everything);
    add("dense-keys-everything", 1, KeyRows::Dense, everything);
    for (name, layout) in [
        ("transposed", Layout::Transposed),
        ("padded", Layout::Padded),
        ("inner-stride", Layout::InnerStride),
        ("reversed", Layout::Reversed { axis: 1 }),
    ] {
        let mut case = of_lengths(format!("packed/layout-{name}"), &[5, 0, 9], &[7, 3, 13]);
        case.layouts = Layouts::everything(layout);
        case.options.bias = Some(PER_SEQUENCE);
        cases.push(case);
    }
    let mut case = of_lengths("packed/fused-qkv", &[6, 11, 3], &[6, 11, 3]);
    case.layouts = Layouts::fused_qkv(4, 2);
    cases.push(case);
    for (name, value_width) in [("smaller", 3), ("larger", 24)] {
        let mut case = of_lengths(format!("packed/value-dim-{name}"), &[5, 1, 9], &[7, 3, 13]);
        case.dims.value_head_dim = value_width;
        cases.push(case);
    }
    // Starts of each integer.
    for (index, dtype) in DType::INTEGERS.into_iter().enumerate() {
        let mut case = of_lengths(format!("packed/starts-{dtype}"), &[5, 1, 9], &[7, 3, 13]);
        case.layouts = Layouts::default()
            .with(
                Role::QueryStarts,
                [Layout::Contiguous, Layout::InnerStride, Layout::Reversed { axis: 0 }][index],
            )
            .with(Role::KeyValueStarts, Layout::InnerStride);
        super::laid_out::draw_dtype(&mut case, Role::QueryStarts, dtype);
        cases.push(case);
    }
}

fn options(cases: &mut Vec<Case>) {
    for (index, (first, edit_first)) in OPTIONS.iter().enumerate() {
        let mut case = of_lengths(format!("packed/{first}"), &[5, 0, 9], &[7, 3, 13]);
        edit_first(&mut case);
        cases.push(case);
        for (second, edit_second) in &OPTIONS[index + 1..] {
            // The same option twice says nothing new.
            if second.starts_with(first) || first.starts_with("bottom") && *second == "offsets" {
                continue;
            }
            let mut case = of_lengths(format!("packed/{first}-{second}"), &[3, 0, 5], &[4, 2, 7]);
            (case.dims.query_heads, case.dims.key_heads) = (2, 1);
            edit_first(&mut case);
            edit_second(&mut case);
            cases.push(case);
        }
    }
    for (name, edit) in [("plain", (|_| ()) as Edit), ("everything", everything)] {
        let mut case = of_lengths(format!("packed/end-to-end-{name}"), &[5, 0, 9], &[7, 3, 13]);
        case.saved = Saved::Backend;
        edit(&mut case);
        cases.push(case);
    }
    let mut case = of_lengths("packed/bias-negative-infinity", &[5, 4, 9], &[7, 3, 13]);
    case.options.bias = Some(PER_SEQUENCE);
    case.content.bias = BiasContent::NegativeInfinityRows;
    cases.push(case);
    // The output is the row of probabilities, so the bits can be read off it.
    let mut case = of_lengths("packed/dropout-bits", &[5, 0, 9], &[7, 3, 13]);
    case.dims.value_head_dim = 13;
    case.options.dropout = Some(Dropout::new(0.5, 1 << 40).with_offset(3));
    case.content.values = Values::Identity;
    cases.push(case);
}

fn bits(cases: &mut Vec<Case>) {
    for (name, edit) in [("plain", (|_| ()) as Edit), OPTIONS[1], ("everything", everything)] {
        let mut case = of_lengths(format!("packed/bits-{name}"), &[5, 1, 9], &[7, 3, 13]);
        (case.dims.query_heads, case.dims.key_heads) = (2, 1);
        case.variations = true;
        edit(&mut case);
        cases.push(case);
    }
}
