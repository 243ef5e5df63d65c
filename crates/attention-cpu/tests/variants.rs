//! The list of variants, held against small calls: each is reached, and no call counts one that is not
//! listed.

use attention_conformance::cases::{
    Broadcast, Case, Content, EightBit, Grid, Layout, Layouts, MaskContent, Saved, Values,
};
use attention_conformance::report::Report;
use attention_conformance::suite::Suite;
use attention_core::{
    AttentionBackend, DType, Dimensions, Element, ForwardCall, ForwardOutputs, Inputs, Role, Scalar,
    ScratchBuffer, View, ViewMut,
};
use attention_cpu::{CpuBackend, CpuConfig};

/// B, T, S, N, K, H.
type Sizes = [usize; 6];

/// Few rows and more, each small enough for f32 to be computed in f64, and larger than that.
const DECODE: Sizes = [1, 1, 9, 2, 1, 4];
const LONG_DECODE: Sizes = [1, 4, 1030, 1, 1, 2];
const SMALL: Sizes = [1, 12, 10, 2, 1, 4];
const LARGE: Sizes = [1, 70, 66, 1, 1, 4];

fn case(name: &str, [batch, query_length, key_length, query_heads, key_heads, head_dim]: Sizes) -> Case {
    let dims = Dimensions {
        batch,
        query_length,
        key_length,
        query_heads,
        key_heads,
        head_dim,
        value_head_dim: head_dim,
    };
    Case::new(name, dims)
}

/// A bias that has only these of the axes `[T, S]`.
fn with_bias(name: &str, sizes: Sizes, [queries, keys]: [bool; 2]) -> Case {
    let mut case = case(name, sizes);
    case.options.bias = Some(Broadcast { rank: 4, full: [true, false, queries, keys] });
    case
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for sizes in [DECODE, LONG_DECODE, SMALL, LARGE] {
        let mut strided = case("strided", sizes);
        strided.layouts = Layouts::operands(Layout::InnerStride);
        let mut more_keys = case("more keys", sizes);
        more_keys.options.sinks = true;
        more_keys.saved = Saved::MoreKeys;
        let mut sinks = case("sinks", sizes);
        sinks.options.sinks = true;
        let mut large = sinks.clone();
        // Logsumexps of some hundred, above which the sink of a row is weighed with the row's own sum.
        large.options.scale = Some(512.0);
        let mut masked = case("masked", sizes);
        masked.options.mask = Some(Broadcast::FULL);
        masked.content.mask = MaskContent::EmptyRows;
        // Keys that no row sees hold NaN.
        let mut padded = case("padded", sizes);
        padded.options.mask = Some(Broadcast { rank: 4, full: [true, false, false, true] });
        let mut scaled = case("scaled", sizes);
        scaled.options.scale = Some(1e30);
        scaled.content =
            Content { values: Values::Whole(Grid::Powers { query: -50, key: -50 }), ..scaled.content };
        for dtype in DType::EIGHT_BIT {
            let mut eight_bit = case("8 bits", sizes);
            eight_bit.options.eight_bit = Some(EightBit::new(dtype));
            cases.push(eight_bit);
        }
        cases.extend([case("plain", sizes), strided, more_keys, sinks, large, masked, padded, scaled]);
        for axes in [[false, false], [false, true], [true, false], [true, true]] {
            cases.push(with_bias("bias", sizes, axes));
        }
    }
    // Tasks of the forward pass: the last rows of a head are a task of their own, and of a block the last is
    // one row.
    cases.push(case("part of a head, then few rows", [1, 514, 3, 2, 1, 4]));
    cases.push(case("a block, then a row", [1, 129, 66, 1, 1, 4]));
    // Parts of the gradient of the bias.
    cases.push(with_bias("parts of rows", [1, 130, 3, 1, 1, 4], [true, false]));
    cases.push(with_bias("parts of keys", [1, 2, 4100, 1, 1, 4], [false, true]));
    for dtype in DType::FLOATS {
        for (axes, layout) in [
            ([true, false], Layout::Contiguous),
            ([true, true], Layout::Contiguous),
            ([true, true], Layout::InnerStride),
        ] {
            let mut case = with_bias("dtypes of biases and sinks", SMALL, axes);
            case.layouts = Layouts::default().with(Role::Bias, layout).with(Role::Mask, layout);
            case.options.bias_dtype = Some(dtype);
            case.options.mask = case.options.bias;
            case.options.sinks = true;
            cases.push(case);
        }
    }
    cases
}

fn run(backend: &CpuBackend) -> Report {
    let report = Suite::with_cases(cases()).run(backend, |_| ());
    let failures: Vec<String> = report.failures().map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    report
}

/// A forward call over `keys` keys in pages of 2.
fn run_paged<T: Scalar + Element>(backend: &CpuBackend, keys: usize) {
    let page_size = 2;
    let pages = keys.div_ceil(page_size);
    let query = vec![T::from_f32(0.5); keys];
    let key = vec![T::from_f32(0.25); pages * page_size];
    let (table, lengths): (Vec<i32>, _) = ((0..pages as i32).rev().collect(), [keys as i32]);
    let view = |shape| View::from_slice(&key, shape).unwrap();
    let shape = [1, keys, 1, 1];
    let mut inputs = Inputs::new(
        View::from_slice(&query, shape).unwrap(),
        view([pages, page_size, 1, 1]),
        view([pages, page_size, 1, 1]),
    );
    inputs.data.block_table = Some(View::from_slice(&table, [1, pages]).unwrap());
    inputs.data.key_value_lengths = Some(View::from_slice(&lengths, [1]).unwrap());
    let problem = inputs.problem().build().unwrap();
    let plan = backend.plan(&problem).unwrap();
    let (mut out, mut scratch) =
        (vec![T::from_f32(f32::NAN); keys], ScratchBuffer::new(plan.scratch_bytes()));
    let outputs = ForwardOutputs { out: ViewMut::from_slice(&mut out, shape).unwrap(), lse: None };
    plan.forward(ForwardCall::new(&problem, inputs, outputs).unwrap(), scratch.scratch()).unwrap();
    assert!(out.iter().all(|number| number.to_f32() == 0.25));
}

#[test]
fn small_calls_reach_every_variant_that_is_listed_and_no_other() {
    let backend = CpuBackend::with_config(CpuConfig::default().threads(1));
    // Small enough for f32 to be computed in f64, and larger.
    for keys in [10, 70] {
        run_paged::<f64>(&backend, keys);
        run_paged::<f32>(&backend, keys);
        run_paged::<half::f16>(&backend, keys);
        run_paged::<half::bf16>(&backend, keys);
    }
    run(&backend);
    let runs = backend.variants().expect("it lists variants").runs();
    let wrong: Vec<_> = runs.iter().filter(|variant| variant.listed != (variant.runs > 0)).collect();
    assert!(wrong.is_empty(), "not run, or not listed: {wrong:?}");
}

#[test]
fn clones_count_together_and_other_backends_apart() {
    let (backend, other) = (CpuBackend::new(), CpuBackend::new());
    let clone = backend.clone();
    Suite::with_cases(vec![case("plain", SMALL)]).dtypes([DType::F32]).run(&clone, |_| ());
    let runs = |backend: &CpuBackend| -> u64 {
        backend.variants().expect("it lists variants").runs().iter().map(|variant| variant.runs).sum()
    };
    assert!(runs(&backend) > 0);
    assert_eq!(runs(&backend), runs(&clone));
    assert_eq!(runs(&other), 0);
}
