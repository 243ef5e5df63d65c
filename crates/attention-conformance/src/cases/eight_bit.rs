//! Cases about keys and values of 8 bits: each dtype, each shape of the scales, where rows lie, each option,
//! and what must not change bits. They have no backward pass.

use attention_core::{DType, Dims, Role};

use super::case::Edit;
use super::packed::{OPTIONS, everything, of_lengths, of_tiles};
use super::{Case, EightBit, KeyRows, Layout, Layouts, ScaleShape, Sequences, Values, dims};
use crate::rng::Rng;
use crate::tensor::HostTensor;

impl ScaleShape {
    /// The shape for these sizes.
    fn shape(self, case: &Case) -> Dims {
        match self {
            ScaleShape::One => [1].into(),
            ScaleShape::Heads => [case.dims.key_heads].into(),
            ScaleShape::SequencesHeads => [case.dims.batch, case.dims.key_heads].into(),
        }
    }

    /// Scales of either sign, most of them near 1, drawn by the case's seed.
    pub(super) fn tensor(self, case: &Case, role: Role) -> HostTensor {
        let mut rng = Rng::named(case.content.seed, role.name());
        HostTensor::from_values(DType::F32, self.shape(case), case.layouts.of(role), |_| {
            let sign = if rng.chance(0.125) { -1.0 } else { 1.0 };
            sign * rng.normal().clamp(-3.0, 3.0).exp2()
        })
    }
}

impl EightBit {
    /// Without scales.
    pub const fn new(dtype: DType) -> Self {
        Self { dtype, key_scales: None, value_scales: None }
    }

    /// With scales of these shapes.
    #[must_use]
    pub const fn with_scales(self, key: Option<ScaleShape>, value: Option<ScaleShape>) -> Self {
        Self { key_scales: key, value_scales: value, ..self }
    }
}

const SHAPES: [ScaleShape; 3] = [ScaleShape::One, ScaleShape::Heads, ScaleShape::SequencesHeads];

/// The same cache in either dtype, with scales that the number chooses.
fn cache(index: usize) -> EightBit {
    let shape = |index: usize| SHAPES.get(index % 4).copied();
    EightBit::new(DType::EIGHT_BIT[index % 2]).with_scales(shape(index / 2 + 2), shape(index / 2))
}

/// A case of batch rows.
fn dense(name: impl std::fmt::Display, sizes: [usize; 6], cache: EightBit) -> Case {
    let mut case = Case::new(format!("eight_bit/{name}"), dims(sizes));
    case.options.eight_bit = Some(cache);
    case.content.garbage = true;
    case
}

/// A case of packed queries and keys.
fn packed(name: impl std::fmt::Display, cache: EightBit) -> Case {
    let mut case = of_lengths(format!("eight_bit/packed-{name}"), &[5, 0, 9], &[7, 3, 13]);
    case.options.eight_bit = Some(cache);
    case
}

/// A case of decoding with keys in pages.
fn paged(name: impl std::fmt::Display, page_size: usize, queries: &[usize], cache: EightBit) -> Case {
    let mut case = of_lengths(format!("eight_bit/paged-{name}"), queries, &[45, 1, 16, 0]);
    case.sequences = Some(Sequences::paged(page_size));
    case.options.query_lengths = None;
    case.options.eight_bit = Some(cache);
    OPTIONS[1].1(&mut case);
    case
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    scales(&mut cases);
    sizes(&mut cases);
    decoding(&mut cases);
    options(&mut cases);
    places(&mut cases);
    contents(&mut cases);
    bits(&mut cases);
    cases
}

/// Every dtype with every pair of shapes of scales, and none.
fn scales(cases: &mut Vec<Case>) {
    let shapes = || SHAPES.into_iter().map(Some).chain([None]);
    let name = |shape: Option<ScaleShape>| match shape {
        None => "none",
        Some(ScaleShape::One) => "one",
        Some(ScaleShape::Heads) => "heads",
        Some(ScaleShape::SequencesHeads) => "sequences",
    };
    for dtype in DType::EIGHT_BIT {
        for key in shapes() {
            for value in shapes() {
                let cache = EightBit::new(dtype).with_scales(key, value);
                let name = format!("{dtype}-scales-{}-{}", name(key), name(value));
                cases.push(dense(&name, [2, 9, 13, 4, 2, 16], cache));
                if key == value {
                    cases.push(packed(&name, cache));
                    cases.push(paged(&name, 16, &[1, 1, 1, 1], cache));
                }
            }
        }
    }
}

/// Groups of every kind, rows of one and of many tiles, odd widths, long keys.
fn sizes(cases: &mut Vec<Case>) {
    for (index, (name, sizes)) in [
        ("one-of-each", [1, 1, 1, 1, 1, 1]),
        ("multi-head", [2, 7, 9, 3, 3, 8]),
        ("multi-query", [2, 7, 9, 6, 1, 24]),
        ("odd", [3, 17, 33, 4, 2, 33]),
        ("decode", [2, 1, 300, 8, 2, 64]),
        ("decode-one-head", [1, 1, 700, 1, 1, 128]),
        ("decode-long", [1, 1, 5000, 2, 1, 16]),
        ("few-rows", [1, 5, 70, 1, 1, 19]),
        ("tiles", [2, 150, 170, 2, 1, 64]),
        ("tiles-and-long-keys", [1, 130, 600, 1, 1, 64]),
        ("no-keys", [2, 3, 0, 2, 1, 8]),
        ("no-queries", [2, 0, 3, 2, 1, 8]),
        ("no-batch", [0, 2, 3, 2, 1, 8]),
    ]
    .into_iter()
    .enumerate()
    {
        for (parity, dtype) in DType::EIGHT_BIT.into_iter().enumerate() {
            cases.push(dense(format!("{dtype}-{name}"), sizes, cache(2 * index + parity)));
        }
    }
    for (name, width) in [("smaller", 3), ("larger", 40)] {
        let mut case = dense(format!("value-dim-{name}"), [2, 9, 13, 4, 2, 16], cache(width));
        case.dims.value_head_dim = width;
        cases.push(case);
    }
    // Enough rows and keys for every tile of kernels on a GPU, and for keys that are split.
    for (index, (name, queries, keys)) in [
        ("large", &[130, 140][..], &[140, 130][..]),
        ("large-and-long-keys", &[200, 1, 300], &[1300, 700, 300]),
        ("decode-long", &[1, 1], &[700, 33]),
        ("few-rows-long", &[20, 1], &[700, 33]),
    ]
    .into_iter()
    .enumerate()
    {
        let mut case = of_tiles(of_lengths(format!("eight_bit/packed-{name}"), queries, keys));
        case.options.eight_bit = Some(cache(index + 2));
        cases.push(case.clone());
        case.name = format!("eight_bit/paged-{name}");
        case.sequences = Some(Sequences::paged(16));
        case.options.query_lengths = None;
        case.options.eight_bit = Some(cache(index + 3));
        cases.push(case);
    }
    let mut case = paged("long", 16, &[1, 1, 1, 1], cache(0));
    case.options.key_value_lengths = Some(vec![700, 33, 0, 128]);
    case.dims.key_length = 700;
    cases.push(case);
}

/// Up to 8 and up to 16 rows to a key/value head, for which kernels on a GPU read the bytes as they are:
/// every head dimension that they are compiled for and some that are filled up with zeros, pages of every
/// kind of size, rows that are not aligned, and every option.
fn decoding(cases: &mut Vec<Case>) {
    let of_group = |case: &mut Case, index: usize, head: usize, value: usize| {
        (case.dims.query_heads, case.dims.key_heads) = (4, 1);
        (case.dims.head_dim, case.dims.value_head_dim) = (head, value);
        case.content.seed += index as u64;
        case.options.eight_bit = Some(cache(index));
    };
    let widths = [(64, 64), (128, 128), (192, 64), (64, 192), (256, 256), (112, 240), (50, 123), (80, 96)];
    for (index, (head, value)) in widths.into_iter().enumerate() {
        for queries in [2, 4] {
            let rows = 4 * queries;
            let (index, lengths) = (index + queries / 2, [45, 0, 76, 1]);
            let mut of_batch_rows =
                dense(format!("decode-{rows}-rows-{head}-{value}"), [2, queries, 77, 4, 1, 8], cache(0));
            of_group(&mut of_batch_rows, index, head, value);
            let name = format!("eight_bit/packed-decode-{rows}-rows-{head}-{value}");
            let mut one_by_one = of_lengths(name, &[queries, 1, 0, queries], &lengths);
            of_group(&mut one_by_one, index + 1, head, value);
            let name = format!("decode-{rows}-rows-{head}-{value}");
            let mut in_pages = paged(name, [1, 5, 16, 64][index % 4], &[queries; 4], cache(0));
            in_pages.options.key_value_lengths = Some(lengths.to_vec());
            in_pages.dims.key_length = 76;
            of_group(&mut in_pages, index + 2, head, value);
            cases.extend([of_batch_rows, one_by_one, in_pages]);
        }
    }
    // So many keys that they are split over blocks.
    for (index, queries) in [2, 4].into_iter().enumerate() {
        let (rows, lengths) = (4 * queries, [700, 33, 0, 512]);
        let mut of_batch_rows =
            dense(format!("decode-{rows}-rows-long"), [1, queries, 700, 4, 1, 8], cache(0));
        of_group(&mut of_batch_rows, index, 64, 64);
        let mut one_by_one =
            of_lengths(format!("eight_bit/packed-decode-{rows}-rows-long"), &[queries; 4], &lengths);
        of_group(&mut one_by_one, index + 1, 64, 64);
        let mut in_pages = paged(format!("decode-{rows}-rows-long"), 16, &[queries; 4], cache(0));
        in_pages.options.key_value_lengths = Some(lengths.to_vec());
        in_pages.dims.key_length = 700;
        of_group(&mut in_pages, index + 2, 64, 64);
        cases.extend([of_batch_rows, one_by_one, in_pages]);
    }
    let all = OPTIONS.into_iter().chain([("everything", everything as Edit)]);
    for (index, (name, edit)) in all.filter(|(name, _)| *name != "d-lse").enumerate() {
        let queries = 1 + index % 4;
        let mut of_batch_rows = dense(format!("decode-{name}"), [2, queries, 71, 4, 1, 8], cache(0));
        of_group(&mut of_batch_rows, index, 64, 64);
        edit(&mut of_batch_rows);
        let mut in_pages = paged(format!("decode-{name}"), 16, &[queries; 4], cache(0));
        of_group(&mut in_pages, index + 1, 64, 128);
        edit(&mut in_pages);
        cases.extend([of_batch_rows, in_pages]);
    }
    for (index, values) in
        [Values::NanInOneQuery, Values::NanInOneKey, Values::NanInOneValue].into_iter().enumerate()
    {
        for queries in [2, 4] {
            let mut case = dense(
                format!("decode-{}-rows-{index}-nan", 4 * queries),
                [2, queries, 71, 4, 1, 8],
                cache(0),
            );
            of_group(&mut case, index + queries / 2, 64, 128);
            case.options.causal = true;
            case.content.values = values;
            cases.push(case);
        }
    }
    for (index, layout) in
        [Layout::Transposed, Layout::Padded, Layout::InnerStride, Layout::Reversed { axis: 1 }]
            .into_iter()
            .enumerate()
    {
        let mut case = dense(format!("decode-layout-{index}"), [2, 2, 71, 4, 1, 8], cache(0));
        of_group(&mut case, index, 64, 128);
        case.layouts = Layouts::operands(layout);
        cases.push(case);
        let mut case = paged(format!("decode-layout-{index}"), 5, &[2, 2, 2, 2], cache(0));
        of_group(&mut case, index + 1, 128, 64);
        case.layouts = Layouts::everything(layout);
        cases.push(case);
    }
}

fn options(cases: &mut Vec<Case>) {
    let all = OPTIONS.into_iter().chain([("everything", everything as Edit)]);
    for (index, (name, edit)) in all.filter(|(name, _)| *name != "d-lse").enumerate() {
        let mut of_batch_rows = dense(name, [2, 9, 13, 4, 2, 16], cache(index));
        edit(&mut of_batch_rows);
        let mut in_pages = paged(name, 5, &[2, 2, 2, 2], cache(index + 1));
        edit(&mut in_pages);
        let mut one_by_one = packed(name, cache(index + 2));
        edit(&mut one_by_one);
        cases.extend([of_batch_rows, in_pages, one_by_one]);
    }
    for (index, scale) in [0.0, -0.4, 1.75].into_iter().enumerate() {
        let mut case = dense(format!("scale-{scale}"), [2, 9, 13, 4, 2, 16], cache(index + 4));
        case.options.scale = Some(scale);
        cases.push(case);
    }
}

fn places(cases: &mut Vec<Case>) {
    for (index, (name, layout)) in [
        ("transposed", Layout::Transposed),
        ("padded", Layout::Padded),
        ("inner-stride", Layout::InnerStride),
        ("reversed", Layout::Reversed { axis: 1 }),
        ("reversed-inner", Layout::Reversed { axis: 3 }),
    ]
    .into_iter()
    .enumerate()
    {
        let mut case = dense(format!("layout-{name}"), [2, 9, 13, 4, 2, 16], cache(index));
        case.layouts = Layouts::operands(layout);
        cases.push(case.clone());
        case = paged(format!("layout-{name}"), 16, &[2, 2, 2, 2], cache(index + 1));
        case.layouts = Layouts::everything(layout);
        cases.push(case);
    }
    for (name, layout) in [
        ("inner-stride", Layout::InnerStride),
        ("reversed", Layout::Reversed { axis: 0 }),
        ("expanded", Layout::Broadcast { axis: 0 }),
        ("expanded-heads", Layout::Broadcast { axis: 1 }),
    ] {
        let sequences = Some(ScaleShape::SequencesHeads);
        let cache = EightBit::new(DType::F8E4M3).with_scales(sequences, sequences);
        let mut case = dense(format!("scales-{name}"), [3, 9, 13, 4, 2, 16], cache);
        case.layouts = Layouts::default().with(Role::KeyScales, layout).with(Role::ValueScales, layout);
        cases.push(case);
    }
    for (index, (name, keys)) in [
        ("shared", KeyRows::Paged { page_size: 4, spare: 2, shared: 2, in_order: false }),
        ("in-order", KeyRows::Paged { page_size: 64, spare: 0, shared: 0, in_order: true }),
    ]
    .into_iter()
    .enumerate()
    {
        let mut case = paged(name, 4, &[1, 1, 1, 1], cache(index + 2));
        case.sequences = Some(Sequences { query_tail: None, keys: keys.clone() });
        cases.push(case.clone());
        case.name.push_str("-packed-queries");
        case.sequences = Some(Sequences { query_tail: Some(2), keys });
        case.options.query_lengths = Some(vec![1, 3, 0, 2]);
        case.dims.query_length = 3;
        cases.push(case);
    }
    for (name, unused) in [("used-keys", Some(vec![3, 4, 0])), ("tail", None)] {
        let mut case = packed(name, cache(5));
        case.sequences = Some(Sequences { query_tail: Some(4), keys: KeyRows::Packed { tail: 9, unused } });
        cases.push(case);
    }
    let mut case = packed("dense-keys", cache(6));
    case.sequences = Some(Sequences { query_tail: Some(1), keys: KeyRows::Dense });
    cases.push(case);
}

/// Numbers that are not finite where they take part, and queries far larger than 1.
fn contents(cases: &mut Vec<Case>) {
    for (index, (name, values)) in [
        ("nan-query", Values::NanInOneQuery),
        ("nan-key", Values::NanInOneKey),
        ("nan-value", Values::NanInOneValue),
        ("queries-times-16", Values::Amplified(16.0)),
        ("probabilities", Values::Identity),
    ]
    .into_iter()
    .enumerate()
    {
        for dtype in DType::EIGHT_BIT {
            let mut case = dense(format!("{dtype}-{name}"), [2, 9, 13, 4, 2, 16], cache(index));
            case.options.eight_bit.iter_mut().for_each(|cache| cache.dtype = dtype);
            case.options.causal = true;
            case.content.values = values;
            if values == Values::Identity {
                case.dims.value_head_dim = 13;
            }
            cases.push(case);
        }
    }
}

fn bits(cases: &mut Vec<Case>) {
    for (index, (name, edit)) in
        [("plain", (|_| ()) as Edit), OPTIONS[1], ("everything", everything)].into_iter().enumerate()
    {
        let mut case = dense(format!("bits-{name}"), [3, 9, 13, 2, 1, 8], cache(2 * index + 3));
        edit(&mut case);
        let mut one_by_one = packed(format!("bits-{name}"), cache(2 * index + 2));
        edit(&mut one_by_one);
        let mut in_pages = paged(format!("bits-{name}"), 4, &[3, 3, 3, 3], cache(2 * index + 1));
        edit(&mut in_pages);
        for mut case in [case, one_by_one, in_pages] {
            case.variations = true;
            cases.push(case);
        }
    }
}
