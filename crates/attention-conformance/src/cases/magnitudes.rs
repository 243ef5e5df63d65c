//! Cases about magnitudes: logits, biases, sinks, slopes, scales and caps up to the end of the accumulator's
//! range.
//!
//! Each row of a case has another magnitude, so that one case has them all.

use attention_core::{DType, Gradients};

use super::{AlibiShape, BiasContent, Broadcast, Case, Far, Grid, Saved, Sizes, Values, dims};

/// B, T, S, N, K, H with 352 rows where nothing else is said, which is what 9 usual constants and 1 to 9
/// times 10^0..38 take.
const SIZES: [(&str, [usize; 6]); 3] = [
    // One query row for each head, as in decoding.
    ("decode", [4, 1, 24, 88, 44, 16]),
    ("small", [2, 22, 30, 8, 4, 16]),
    // More keys than a block of any backend has, and more queries than those that decoding kernels take. A
    // quarter of the rows: patterns take turns.
    ("blocks", [1, 22, 420, 4, 2, 16]),
];

/// Decoding over so many keys that they are split.
const LONG: [usize; 6] = [1, 1, 1500, 8, 4, 16];

/// Logits of ordinary size.
const QUARTERS: Grid = Grid::Powers { query: -2, key: 0 };

const PATTERNS: [(&str, Far); 6] = [
    ("rows", Far::Rows),
    ("rows-with-infinity", Far::RowsWithInfinity),
    ("first", Far::First),
    ("last", Far::Last),
    ("all-but-last", Far::AllButLast),
    ("one-above", Far::OneAbove),
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    biases(&mut cases);
    usual_masks(&mut cases);
    products(&mut cases);
    sinks_and_slopes(&mut cases);
    softcaps(&mut cases);
    scales(&mut cases);
    cases
}

fn with_bias(name: String, sizes: [usize; 6], far: Far, start: usize) -> Case {
    let mut case = Case::new(name, dims(sizes));
    case.options.bias = Some(Broadcast::FULL);
    case.content.bias = BiasContent::Far { far, start };
    let rows = matches!(far, Far::Rows | Far::RowsWithInfinity);
    case.content.values = Values::Whole(if rows { Grid::OfTheBias } else { QUARTERS });
    case
}

fn biases(cases: &mut Vec<Case>) {
    for (index, (pattern, far)) in PATTERNS.into_iter().enumerate() {
        for (size, sizes) in SIZES {
            let start = if size == "blocks" { 88 * (index % 4) } else { 0 };
            let mut case = with_bias(format!("magnitude/{pattern}-{size}"), sizes, far, start);
            case.options.d_lse = index % 2 == 1;
            cases.push(case);
        }
        // Other magnitudes of f64, whose range takes more rows than a case has.
        for part in 1..4 {
            let mut case =
                with_bias(format!("magnitude/{pattern}-part-{part}"), [1, 12, 17, 8, 4, 16], far, 352 * part);
            case.saved = if part == 1 { Saved::Backend } else { Saved::Oracle };
            cases.push(case);
        }
        if matches!(far, Far::Rows | Far::First | Far::OneAbove) {
            let mut case = with_bias(format!("magnitude/{pattern}-split"), LONG, far, 8 * index);
            case.options.d_lse = true;
            cases.push(case);
        }
    }
    // Two blocks of keys, the second far above the first, in a batch row so small that f32 is computed in
    // f64.
    cases.push(with_bias("magnitude/first-two-blocks".to_owned(), [1, 10, 400, 2, 2, 16], Far::First, 0));
    // Sinks of ordinary size beside them.
    for (size, sizes) in &SIZES[..2] {
        let mut case = with_bias(format!("magnitude/rows-{size}-sinks"), *sizes, Far::Rows, 0);
        case.options.sinks = true;
        case.options.d_lse = true;
        cases.push(case);
    }
    // Gradients that need the rows' sums without the gradient of queries, whose kernel takes them in
    // `chunked-cuda`; and heads of more rows than a tile has, some of whose tiles have ordinary rows alone.
    for (size, sizes) in [SIZES[1], SIZES[2], ("tall", [1, 352, 40, 1, 1, 16])] {
        let mut case = with_bias(format!("magnitude/rows-{size}-without-dq"), sizes, Far::Rows, 0);
        case.options.gradients = Gradients::KEY | Gradients::VALUE;
        cases.push(case);
    }
    cases.push(with_bias("magnitude/rows-tall".to_owned(), [1, 352, 40, 1, 1, 16], Far::Rows, 0));
    let mut case = with_bias("magnitude/first-causal".to_owned(), [1, 30, 300, 4, 2, 16], Far::First, 0);
    case.options.causal = true;
    case.options.query_offset = attention_core::QueryOffset::BottomRight;
    cases.push(case);
}

/// Padding as models write it: one row of a bias for each batch row, in each dtype of a bias.
fn usual_masks(cases: &mut Vec<Case>) {
    for (size, [t, s]) in [("small", [5, 20]), ("blocks", [10, 100])] {
        for dtype in [None, Some(DType::F32), Some(DType::F16), Some(DType::Bf16)] {
            let label = dtype.map_or("accumulator", DType::name);
            let mut case = with_bias(
                format!("magnitude/mask-{size}-{label}"),
                [9, t, s, 2, 1, 16],
                if size == "small" { Far::Rows } else { Far::First },
                0,
            );
            case.options.bias = Some(Broadcast { rank: 4, full: [true, false, false, true] });
            case.options.bias_dtype = dtype;
            case.content.values = Values::Whole(QUARTERS);
            if size == "small" {
                // Other logits beside a row of one bias would be rounded.
                case.options.scale = Some(0.0);
            }
            cases.push(case);
        }
    }
}

fn products(cases: &mut Vec<Case>) {
    for (size, sizes) in SIZES {
        for (scale, name) in [(None, "1"), (Some(40), "2^40"), (Some(80), "2^80")] {
            if scale.is_some() && size == "blocks" {
                continue;
            }
            let mut case = Case::new(format!("magnitude/products-{size}-scale-{name}"), dims(sizes));
            case.options.scale = scale.map(|exponent| 2f64.powi(exponent));
            case.content.values = Values::Whole(Grid::UpToTheEnd);
            cases.push(case);
        }
    }
}

fn sinks_and_slopes(cases: &mut Vec<Case>) {
    let sizes = [
        ("all", [1, 3, 6, 352, 44, 16], 0),
        ("blocks", [1, 20, 90, 8, 2, 16], 0),
        ("more", [1, 20, 90, 8, 2, 16], 100),
    ];
    for (size, sizes, start) in sizes {
        let mut case = with_bias(format!("magnitude/sinks-{size}"), sizes, Far::Rows, start);
        // One bias for each head, which a third of the sinks equal.
        case.options.bias = Some(Broadcast { rank: 3, full: [false, true, false, false] });
        case.options.sinks = true;
        case.options.d_lse = true;
        case.options.scale = Some(0.0);
        case.content.sinks = Sizes::Far { start };
        cases.push(case.clone());
        case.name = format!("magnitude/sinks-{size}-alone");
        case.options.bias = None;
        case.options.scale = None;
        case.content.values = Values::Whole(QUARTERS);
        cases.push(case.clone());
        case.name = format!("magnitude/slopes-{size}");
        case.options.sinks = false;
        case.options.alibi = Some(AlibiShape::Heads);
        case.content.sinks = Sizes::Normal;
        case.content.slopes = Sizes::Far { start };
        cases.push(case);
    }
}

fn softcaps(cases: &mut Vec<Case>) {
    for (size, sizes) in [("small", [2, 9, 13, 4, 2, 16]), ("blocks", [1, 20, 90, 4, 2, 16])] {
        // Products of 2^24 times the scale are at least 32 caps.
        for (cap, scale) in [(1e6, 4), (1e9, 40), (3e30, 88)] {
            let mut case = Case::new(format!("magnitude/softcap-{cap:e}-{size}"), dims(sizes));
            case.options.softcap = Some(cap);
            case.options.scale = Some(2f64.powi(scale));
            case.content.values = Values::Whole(Grid::Signs(12));
            cases.push(case);
        }
        // So wide that ordinary logits are below its rounding: whatever the probabilities are, they are
        // numbers.
        let mut case = Case::new(format!("magnitude/softcap-3e38-{size}"), dims(sizes));
        case.options.softcap = Some(3e38);
        case.options.bias = Some(Broadcast::FULL);
        case.content.bias = BiasContent::NegativeInfinity;
        cases.push(case);
    }
}

fn scales(cases: &mut Vec<Case>) {
    let sizes = [
        ("small", [2, 9, 13, 4, 2, 16]),
        ("blocks", [1, 20, 90, 4, 2, 16]),
        ("tiles", [1, 70, 66, 2, 1, 16]),
    ];
    for (size, sizes) in sizes {
        // Where the scale is large, queries and keys are both far from 1: neither gradient leaves the range
        // before or after it is multiplied with the scale. Where one of them alone is as large as it can be,
        // sums of its products with gradients leave the range unless a part of the scale is multiplied in
        // before.
        for (scale, query, key) in [
            (2.4e38, -63, -63),
            (f64::from(f32::MAX), -63, -63),
            (-3e38, -63, -63),
            (1e30, -50, -50),
            (1e-30, 50, 50),
            (3e-37, 60, 60),
            (5e-38, 122, 0),
            (-5e-38, 0, 122),
            (1e-307, 1018, 0),
        ] {
            let mut case = Case::new(format!("magnitude/scale-{scale:e}-{size}"), dims(sizes));
            case.options.scale = Some(scale);
            case.content.values = Values::Whole(Grid::Powers { query, key });
            cases.push(case);
        }
    }
}
