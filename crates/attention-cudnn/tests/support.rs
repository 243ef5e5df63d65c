//! The answers of `supports` and of the scratch's size without a device.

use attention_core::{
    Alignment, AttentionBackend, DType, Device, Gradients, OffsetRange, Problem, Role, TensorDesc,
    Unsupported, Window,
};
use attention_cudnn::{CudnnBackend, CudnnConfig, Target};

/// The ordinal of a device that no machine has, so that the answers are those for the assumed target.
fn backend(target: Target) -> CudnnBackend {
    CudnnBackend::new(CudnnConfig::default().device(4000)).assuming(target)
}

fn tokens(dtype: DType, shape: [usize; 4]) -> TensorDesc {
    TensorDesc::contiguous(dtype, shape)
}

type Builder = attention_core::ProblemBuilder;

fn problem(dtype: DType, shape: [usize; 4]) -> Builder {
    let desc = tokens(dtype, shape);
    Problem::builder(desc, desc, desc).device(Device::Cuda(4000))
}

fn refusal(target: Target, problem: Builder) -> String {
    let problem = problem.build().expect("a valid problem");
    let backend = backend(target);
    let error = backend.supports(&problem).expect_err("refused");
    assert!(backend.scratch_bytes(&problem).is_err());
    error.to_string()
}

#[test]
fn a_machine_without_the_device_says_what_it_looked_for() {
    let error = backend(Target::default()).available().expect_err("no such device");
    assert_eq!(error.backend, "cudnn");
    assert!(!error.looked_for.is_empty(), "{error}");
}

#[test]
fn plain_problems_are_served_without_scratch_forward() {
    for dtype in [DType::F16, DType::Bf16] {
        let problem = problem(dtype, [2, 128, 4, 64]).causal(true).build().expect("valid");
        assert_eq!(backend(Target::default()).scratch_bytes(&problem), Ok(0));
    }
}

#[test]
fn scratch_of_a_backward_pass_is_the_row_sums_and_the_query_gradient_in_f32() {
    let problem =
        problem(DType::Bf16, [2, 128, 4, 64]).gradients(Gradients::QUERY | Gradients::KEY | Gradients::VALUE);
    let rows = 2 * 128 * 4 * 4;
    let backend = backend(Target::default());
    assert_eq!(backend.scratch_bytes(&problem.build().expect("valid")), Ok(2 * rows + rows * 64));
}

#[test]
fn refusals_name_the_limit_and_the_value() {
    let hopper = Target::default();
    let all = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
    let grouped = || {
        let (query, key) = (tokens(DType::F16, [1, 8, 4, 64]), tokens(DType::F16, [1, 8, 2, 64]));
        Problem::builder(query, key, key).device(Device::Cuda(4000))
    };
    let cases = [
        (
            refusal(hopper, problem(DType::F32, [1, 8, 2, 64])),
            "cudnn does not take f32 operands, only f16, bf16",
        ),
        (
            refusal(hopper, problem(DType::F16, [1, 8, 2, 60])),
            "cudnn does not support head dimension 60: it takes multiples of 8",
        ),
        (
            refusal(hopper, problem(DType::F16, [1, 8, 2, 264])),
            "cudnn does not support head dimension 264: it takes at most 256",
        ),
        (
            refusal(hopper, problem(DType::F16, [1, 8, 2, 64]).any_scale(true)),
            "cudnn does not support scales outside of 1e-37 to 2e38: cuDNN scales after it took the row max, and multiplies the scale \
             with log2(e) in f32",
        ),
        (
            refusal(
                hopper,
                problem(DType::F16, [1, 8, 2, 64]).alignment(Alignment::Offset(OffsetRange::Any)),
            ),
            "cudnn does not support query offsets beyond 4194304: cuDNN computes positions in 32 bits, and calls may give offsets of 64",
        ),
        (
            refusal(hopper, problem(DType::F16, [1, 8, 2, 64]).query_offsets(OffsetRange::Near, DType::I32)),
            "cudnn does not support query offsets by batch row in its forward pass",
        ),
        (
            refusal(hopper, problem(DType::F16, [1, 8, 2, 64]).softcap(true)),
            "cudnn does not support softcap in its forward pass",
        ),
        (
            refusal(hopper, grouped().gradients(all)),
            "cudnn does not support grouped heads in its backward pass",
        ),
        (
            refusal(hopper, problem(DType::F16, [1, 8, 2, 64]).gradients(all).deterministic(true)),
            "cudnn does not support deterministic in its backward pass",
        ),
        (
            refusal(hopper, problem(DType::F16, [1, 8, 2, 64]).batch_invariant(true)),
            "cudnn does not support batch invariant in its forward pass",
        ),
        (
            refusal(hopper, problem(DType::F16, [1, 8, 2, 64]).gradients(all).batch_invariant(true)),
            "cudnn does not support batch invariant in its backward pass",
        ),
        (
            refusal(Target { capability: (7, 5), ..hopper }, problem(DType::F16, [1, 8, 2, 64])),
            "cudnn does not support compute capability 7.5: cuDNN's fused attention needs 8.0 or more",
        ),
        (
            refusal(
                Target { version: [9, 14, 0], ..hopper },
                problem(DType::F16, [1, 2048, 2, 64]).window(Window { left: Some(64), right: None }),
            ),
            "cudnn does not support a window without causal masking over more than 1024 keys with cuDNN 9.14.0 on sm_90: \
             9.14.0 computes it wrongly (https://docs.nvidia.com/deeplearning/cudnn/backend/latest/release-notes.html)",
        ),
    ];
    for (got, want) in cases {
        assert_eq!(got, want);
    }
    let sinks = TensorDesc::contiguous(DType::F32, [2]);
    let old = Target { version: [9, 12, 0], ..hopper };
    assert_eq!(
        refusal(old, problem(DType::F16, [1, 8, 2, 64]).sinks(sinks)),
        "cudnn does not support sinks with cuDNN 9.12.0 on sm_90: cuDNN has them from 9.13 on"
    );
    let mask = TensorDesc::contiguous(DType::Bool, [1, 2, 1, 1]);
    assert_eq!(
        refusal(hopper, problem(DType::F16, [1, 1, 2, 64]).mask(mask)),
        "cudnn does not support mask over query and key lengths 1 and 1: cuDNN misreads a bias of one row and one key where heads \
         have their own"
    );
    // A kernel writes the gradients of batch rows without keys, which cuDNN leaves unwritten with dropout.
    let keys = problem(DType::F16, [2, 8, 2, 64]).key_value_lengths(DType::I32).gradients(all);
    let keys = keys.dropout_rate(0.5).build().expect("valid");
    assert_eq!(backend(hopper).supports(&keys), Ok(()));
    assert!(backend(hopper).supports(&grouped().build().expect("valid")).is_ok(), "grouped heads forward");
}

#[test]
fn strides_that_cudnn_would_misread_are_refused() {
    let strided = |strides: [isize; 4]| {
        let desc = TensorDesc::strided(DType::F16, [2, 8, 2, 64], strides).expect("ranks agree");
        Problem::builder(desc, desc, desc).device(Device::Cuda(4000))
    };
    for (strides, what) in
        [([1028, 128, 64, 1], "axis 0 has stride 1028"), ([2048, 256, 128, 2], "last stride 2")]
    {
        let problem = strided(strides).build().expect("valid");
        let error = backend(Target::default()).supports(&problem).expect_err("refused");
        assert!(matches!(error, Unsupported::Limit { .. } | Unsupported::Feature { .. }), "{error}");
        assert!(error.to_string().contains(what) || error.to_string().contains("inner stride"), "{error}");
    }
}

#[test]
fn another_device_is_refused() {
    let problem = problem(DType::F16, [1, 8, 2, 64]).device(Device::Cuda(1)).build().expect("valid");
    let error = backend(Target::default()).supports(&problem).expect_err("refused");
    assert_eq!(error.to_string(), "cudnn does not support memory of cuda:1: it works on cuda:4000");
}

#[test]
fn scratch_of_a_mask_is_one_tensor_and_what_it_marks() {
    let mask = TensorDesc::contiguous(DType::Bool, [2, 1, 128, 100]);
    let key = tokens(DType::Bf16, [2, 100, 4, 64]);
    let of = |config: CudnnConfig| {
        let query = tokens(DType::Bf16, [2, 128, 4, 64]);
        let problem = Problem::builder(query, key, key).device(Device::Cuda(4000)).mask(mask);
        let backend = CudnnBackend::new(config.device(4000));
        backend.scratch_bytes(&problem.build().expect("valid")).expect("served")
    };
    let rows = 2 * 4 * 128;
    // The logsumexp, copies of keys and values, a bias of bf16 in rows of 104 keys, and one byte per row and
    // per key for all heads.
    let operands = 2 * (2 * 100 * 4 * 64 * 2);
    let (made, seen) = (2 * 128 * 104 * 2, 2 * 128 + 2 * 104);
    assert_eq!(of(CudnnConfig::default()), 4 * rows + operands + made + seen);
}

#[test]
fn a_bias_is_used_as_it_lies_where_it_is_promised_to_be_finite() {
    let bias = TensorDesc::contiguous(DType::Bf16, [1, 4, 128, 128]);
    let desc = tokens(DType::Bf16, [2, 128, 4, 64]);
    let problem = Problem::builder(desc, desc, desc).device(Device::Cuda(4000)).bias(bias);
    let problem = problem.build().expect("valid");
    let scratch = |config: CudnnConfig| CudnnBackend::new(config.device(4000)).scratch_bytes(&problem);
    // The logsumexp alone, which says which rows have logits too large for cuDNN's exponents.
    assert_eq!(scratch(CudnnConfig::default().finite_bias(true)), Ok(2 * 4 * 128 * 4));
    assert!(scratch(CudnnConfig::default()).expect("served") > 4 * 128 * 128 * 2);
}

/// Scratch has the lengths in 32 bits and the intervals that follow from them, whether a call has its lengths
/// in host or in device memory.
#[test]
fn scratch_of_lengths_is_the_arrays_that_follow_from_them() {
    const ALIGNMENT: usize = 256;
    let of = |batch: usize, in_host_memory: bool, options: fn(Builder) -> Builder| {
        let builder = options(problem(DType::Bf16, [batch, 128, 4, 64]).key_value_lengths(DType::I64));
        let builder = builder.in_host_memory(Role::KeyValueLengths, in_host_memory);
        backend(Target::default()).scratch_bytes(&builder.build().expect("valid")).expect("served")
    };
    // The logsumexp, which a kernel reads, and a copy of the values, with zeros for keys that no row sees.
    let packed = |batch: usize| 4 * batch * 128 * 4 + 2 * batch * 128 * 4 * 64;
    // Query lengths and key lengths; the intervals of rows and of keys.
    let last = 2 * 4 * 2;
    assert_eq!(of(2, false, |builder| builder), packed(2) + 3 * ALIGNMENT + last);
    assert_eq!(of(2, true, |builder| builder), packed(2) + 3 * ALIGNMENT + last);
    // Lengths in host memory are a part of the kernels' arguments for up to 64 batch rows; for more, they are
    // stored.
    let stored = (8_usize * 65).next_multiple_of(ALIGNMENT);
    let arrays = [4, 4, 8].map(|size: usize| (size * 65).next_multiple_of(ALIGNMENT)).iter().sum::<usize>();
    assert_eq!(of(65, false, |builder| builder), packed(65) + arrays + 8 * 65);
    assert_eq!(of(65, true, |builder| builder), packed(65) + stored + arrays + 8 * 65);
    // Query lengths, an offset and a window need no other arrays, and a scale none at all.
    let more = |builder: Builder| {
        let window = Window { left: Some(3), right: None };
        builder.query_lengths(DType::U32).window(window).alignment(Alignment::Offset(OffsetRange::Near))
    };
    assert_eq!(of(2, false, more), packed(2) + 3 * ALIGNMENT + last);
}

/// An offset for all batch rows is a number, not an array. But with it, rows may see no key, and keys may be
/// seen by no row.
#[test]
fn scratch_of_an_offset_is_the_logsumexp_and_values_without_those_that_no_row_sees() {
    let problem = problem(DType::Bf16, [2, 128, 4, 64]).causal(true);
    let problem = problem.alignment(Alignment::Offset(OffsetRange::Near)).build().expect("valid");
    let rows = 2 * 128 * 4;
    assert_eq!(backend(Target::default()).scratch_bytes(&problem), Ok(4 * rows + 2 * rows * 64));
}

/// Packed queries and keys of 300 and 500 rows, in sequences of at most 128 and 256, with starts in device
/// memory.
fn packed(heads: usize, head_dim: usize) -> Builder {
    let rows = |rows: usize| TensorDesc::contiguous(DType::Bf16, [rows, heads, head_dim]);
    Problem::builder(rows(300), rows(500), rows(500))
        .device(Device::Cuda(4000))
        .packed_queries(5, DType::I32)
        .packed_keys(5, DType::I64)
        .longest(128, 256)
}

/// Dense queries of three sequences, and keys in 40 pages of this size, at most 10 per sequence.
fn paged(page_size: usize) -> Builder {
    let pages = TensorDesc::contiguous(DType::F16, [40, page_size, 2, 64]);
    Problem::builder(tokens(DType::F16, [3, 1, 4, 64]), pages, pages)
        .device(Device::Cuda(4000))
        .paged(3, 10, DType::I32)
        .key_value_lengths(DType::I32)
}

#[test]
fn packed_sequences_and_pages_are_served() {
    let all = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
    let window = Window { left: Some(3), right: Some(1) };
    let bottom_right = |builder: Builder| builder.causal(true).alignment(Alignment::BottomRight);
    let sinks = TensorDesc::contiguous(DType::F32, [4]);
    let backend = backend(Target::default());
    for problem in [
        packed(4, 64),
        packed(4, 64).lse(true).key_value_lengths(DType::I32),
        bottom_right(packed(4, 64)),
        packed(4, 64).window(window).sinks(sinks),
        packed(4, 64).gradients(all),
        bottom_right(packed(4, 64)).key_value_lengths(DType::U32).sinks(sinks).gradients(Gradients::KEY),
        paged(16),
        bottom_right(paged(1)).lse(true),
        paged(256),
    ] {
        let problem = problem.build().expect("valid");
        assert_eq!(backend.supports(&problem), Ok(()), "{problem}");
    }
}

/// It grows with the rows that there are, not with sequences times the longest.
#[test]
fn scratch_of_packed_sequences_is_of_their_rows() {
    const ALIGNMENT: usize = 256;
    let of = |problem: Builder| {
        backend(Target::default()).scratch_bytes(&problem.build().expect("valid")).expect("served")
    };
    let rows: usize = 300 * 4;
    // The logsumexp; query and key lengths, the intervals of rows, the first rows of queries and keys; ragged
    // offsets of queries, of the logsumexp, and of keys. All but the first and the last are of less than 256
    // bytes.
    let last = 6 * 8;
    assert_eq!(of(packed(4, 64)), (4 * rows).next_multiple_of(ALIGNMENT) + 7 * ALIGNMENT + last);
    // Starts in host memory are stored as well.
    let in_host_memory = packed(4, 64).in_host_memory(Role::QueryStarts, true);
    assert_eq!(of(in_host_memory), of(packed(4, 64)) + ALIGNMENT);
    // The row sums and the gradient of queries in f32; the intervals of keys; ragged offsets of that
    // gradient, whose rows are as far apart as those of queries.
    let all = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
    let gradients = (4 * rows).next_multiple_of(ALIGNMENT) + 4 * rows * 64;
    assert_eq!(of(packed(4, 64).gradients(all)), of(packed(4, 64)) + gradients + ALIGNMENT);
    // The table: ten entries of 32 bits for each of three sequences.
    let lengths_and_intervals = (4 * 3 * 4usize).next_multiple_of(ALIGNMENT) + 3 * ALIGNMENT;
    assert_eq!(of(paged(16)), lengths_and_intervals + 4 * 30);
}

#[test]
fn what_is_not_served_of_packed_sequences_and_pages_is_refused_by_name() {
    let hopper = Target::default();
    let all = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
    let slopes = TensorDesc::contiguous(DType::F32, [4]);
    let of_keys = |dtype: DType| TensorDesc::contiguous(dtype, [1, 1, 1, 256]);
    let over = TensorDesc::contiguous(DType::Bool, [1, 1, 1, 160]);
    let dense_keys = || {
        let (rows, keys) =
            (TensorDesc::contiguous(DType::Bf16, [300, 4, 64]), tokens(DType::Bf16, [5, 256, 4, 64]));
        let problem = Problem::builder(rows, keys, keys).device(Device::Cuda(4000));
        problem.packed_queries(5, DType::I32).key_value_lengths(DType::I32)
    };
    let none = TensorDesc::contiguous(DType::Bf16, [0, 4, 64]);
    let no_rows = Problem::builder(none, none, none)
        .device(Device::Cuda(4000))
        .packed_queries(5, DType::I32)
        .packed_keys(5, DType::I32)
        .longest(128, 256);
    let cases = [
        (
            refusal(hopper, packed(4, 64).mask(of_keys(DType::Bool))),
            "cudnn does not support packed sequences with mask: this backend has it for dense rows alone",
        ),
        (
            refusal(hopper, packed(4, 64).bias(of_keys(DType::F32))),
            "cudnn does not support packed sequences with bias: this backend has it for dense rows alone",
        ),
        (
            refusal(hopper, packed(4, 64).alibi_slopes(slopes).causal(true)),
            "cudnn does not support packed sequences with ALiBi: this backend has it for dense rows alone",
        ),
        (
            refusal(hopper, packed(4, 64).dropout_rate(0.5).gradients(all)),
            "cudnn does not support packed sequences with dropout: this backend has it for dense rows alone",
        ),
        (
            refusal(hopper, packed(4, 64).sinks(slopes).gradients(all | Gradients::SINKS)),
            "cudnn does not support packed sequences with dsinks: this backend has it for dense rows alone",
        ),
        (
            refusal(hopper, paged(16).mask(over)),
            "cudnn does not support keys in pages with mask: this backend has it for dense rows alone",
        ),
        (
            refusal(Target { capability: (8, 0), ..hopper }, packed(4, 64)),
            "cudnn does not support packed queries with cuDNN 9.19.0 on sm_80: cuDNN writes no packed logsumexp there",
        ),
        (
            refusal(hopper, dense_keys()),
            "cudnn does not support packed queries with dense keys: this backend has them for packed keys",
        ),
        (refusal(hopper, no_rows), "cudnn does not support packed rows of query 0: it takes 1 to 2^31 - 1"),
        (
            refusal(hopper, packed(4, 24).gradients(all)),
            "cudnn does not support packed sequences in backward with head dimension 24: cuDNN takes multiples of 16",
        ),
        (refusal(hopper, paged(24)), "cudnn does not support pages of 24: cuDNN takes powers of two"),
        (
            refusal(Target { version: [9, 17, 1], ..hopper }, packed(4, 64).gradients(all)),
            "cudnn does not support packed sequences in backward on compute capability 9 with cuDNN 9.17.1 on sm_90: \
             versions up to 9.17 compute NaN of a workspace that nothing has written \
             (https://github.com/NVIDIA/TransformerEngine/issues/2186)",
        ),
    ];
    for (got, want) in cases {
        assert_eq!(got, want);
    }
    // Forward, that version is served, as is a compute capability of 8 with dense queries and pages.
    let is_served = |target: Target, problem: Builder| {
        assert_eq!(backend(target).supports(&problem.build().expect("valid")), Ok(()));
    };
    is_served(Target { version: [9, 17, 1], ..hopper }, packed(4, 64));
    is_served(Target { capability: (8, 0), ..hopper }, paged(16));
    let grouped = {
        let rows = |heads: usize| TensorDesc::contiguous(DType::Bf16, [300, heads, 64]);
        let problem = Problem::builder(rows(4), rows(2), rows(2)).device(Device::Cuda(4000));
        problem.packed_queries(5, DType::I32).packed_keys(5, DType::I32).gradients(all)
    };
    let backend = CudnnBackend::new(CudnnConfig::default().device(4000).rounds_group_gradients(true));
    let refusal = backend.assuming(hopper).supports(&grouped.build().expect("valid")).expect_err("refused");
    assert_eq!(
        refusal.to_string(),
        "cudnn does not support packed sequences in backward with grouped heads: cuDNN sums the gradients of a group in memory for \
         the longest sequences"
    );
}
