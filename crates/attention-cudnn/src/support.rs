//! What the backend serves, as data: by version of cuDNN and compute capability, with the reason for each
//! limit.

use attention_core::{
    Alignment, Capabilities, DType, Device, DeviceKind, Feature, FeatureSet, NumericsClass, OffsetRange,
    Pass, PassCapabilities, Problem, Role, RowLayout, ScratchGrowth, Unsupported,
};

use crate::long_sums::{LONG_SUMS, SUM_LIMITS};
use crate::places::Places;
use crate::seen::has_lengths;
use crate::{CudnnConfig, NAME};

/// A cuDNN version and the device that it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Major, minor and patch version of cuDNN: `[9, 19, 0]`.
    pub version: [u32; 3],
    /// The compute capability: `(9, 0)` for Hopper.
    pub capability: (u32, u32),
}

impl Target {
    /// The target of a version in cuDNN's own numbering, `91900` for 9.19.0.
    pub(crate) fn of(version: usize, capability: (u32, u32)) -> Self {
        let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let version = [number(version / 10000), number(version / 100 % 100), number(version % 100)];
        Self { version, capability }
    }
}

impl Default for Target {
    /// cuDNN 9.19.0 on Hopper, on which this backend was tested.
    fn default() -> Self {
        Self { version: [9, 19, 0], capability: (9, 0) }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ([major, minor, patch], (sm, sub)) = (self.version, self.capability);
        write!(f, "cuDNN {major}.{minor}.{patch} on sm_{sm}{sub}")
    }
}

/// A defect of some versions of cuDNN, with the report of it.
#[derive(Debug)]
pub(crate) struct Known {
    /// The first version that has it, and the first later one that does not.
    pub(crate) versions: ([u32; 3], [u32; 3]),
    /// The major compute capability that has it; `None` if all have.
    capability: Option<u32>,
    /// Whether it concerns a problem.
    applies: fn(&Problem) -> bool,
    /// The problems that it concerns, in words.
    what: &'static str,
    /// What those versions do, or what a plan without lengths does: a clause.
    why: &'static str,
    /// The address of the report.
    pub(crate) source: &'static str,
    remedy: Remedy,
}

/// What the backend does about a defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remedy {
    /// It refuses the problem.
    Refusal,
    /// It gives the plan lengths that are those of the tensors, so that cuDNN takes another path.
    Lengths,
}

/// Every version.
const ANY: ([u32; 3], [u32; 3]) = ([0, 0, 0], [u32::MAX, 0, 0]);

/// The known defects that the rules for all versions ([`check`]) do not cover.
///
/// Other reports do not concern this backend: it does not use fp8, cuDNN's deterministic mode, or sinks of
/// packed sequences. It refuses one query row in backward in every version
/// (github.com/NVIDIA/cudnn-frontend/issues/1072). Versions before 9.25 compute NaN of sequences without keys
/// (github.com/NVIDIA/cudnn-frontend/issues/943); its own kernels write the rows without a key, in every
/// version and layout, whether lengths are in host or device memory.
pub(crate) const KNOWN: &[Known] = &[
    Known {
        versions: ([9, 14, 0], [9, 14, 1]),
        capability: None,
        applies: |problem| {
            let window = problem.window();
            let windowed = window.left.is_some() || window.right.is_some();
            windowed && !problem.causal() && problem.dims().key_length > 1024
        },
        what: "a window without causal masking over more than 1024 keys",
        why: "9.14.0 computes it wrongly",
        source: "https://docs.nvidia.com/deeplearning/cudnn/backend/latest/release-notes.html",
        remedy: Remedy::Refusal,
    },
    Known {
        versions: ([9, 19, 0], [9, 21, 0]),
        capability: Some(10),
        applies: |problem| {
            problem.pass() == Pass::Forward
                && problem.dims().query_length == 1
                && problem.dims().key_heads < 8
        },
        what: "one query row over fewer than 8 key/value heads on compute capability 10",
        why: "9.19 and 9.20 corrupt it",
        source: "https://github.com/pytorch/pytorch/issues/193893",
        remedy: Remedy::Refusal,
    },
    Known {
        versions: ([0, 0, 0], [9, 18, 0]),
        capability: Some(9),
        applies: |problem| problem.pass() == Pass::Backward && problem.query_layout() == RowLayout::Packed,
        what: "packed sequences in backward on compute capability 9",
        why: "versions up to 9.17 compute NaN of a workspace that nothing has written",
        source: "https://github.com/NVIDIA/TransformerEngine/issues/2186",
        remedy: Remedy::Refusal,
    },
    Known {
        versions: ([9, 10, 0], [9, 10, 2]),
        capability: None,
        applies: |_| true,
        what: "any call",
        why: "9.10.0 and 9.10.1 compute NaN of a bias in f32, among others",
        source: "https://github.com/jax-ml/jax/issues/32242",
        remedy: Remedy::Refusal,
    },
    // Limited to versions up to 9.15.0, since lengths that are those of the tensors cost up to 8 % of the
    // time.
    Known {
        versions: ([0, 0, 0], [9, 15, 1]),
        capability: None,
        applies: |problem| problem.pass() == Pass::Backward,
        what: "a backward pass",
        why: "without lengths, keys that are no multiple of a tile give NaN",
        source: "https://github.com/NVIDIA/cudnn-frontend/issues/160",
        remedy: Remedy::Lengths,
    },
    // The gradient of queries is NaN if a row's logsumexp is below -88.7. The report says that a branch after
    // 9.26 fixes it; it was still seen since.
    Known {
        versions: ANY,
        capability: Some(9),
        applies: |problem| {
            let adds = problem.has(Role::Bias) || problem.has(Role::Mask);
            problem.pass() == Pass::Backward && adds && problem.dims().key_length % 128 == 64
        },
        what: "a bias or mask in backward over 64 keys more than a multiple of 128",
        why: "without lengths, rows with a logsumexp below -88 give NaN",
        source: "https://github.com/pytorch/pytorch/issues/196678",
        remedy: Remedy::Lengths,
    },
];

impl Known {
    /// Whether the defect concerns this problem on this target.
    fn is_met(&self, target: Target, problem: &Problem) -> bool {
        let (from, until) = self.versions;
        let here = self.capability.is_none_or(|capability| capability == target.capability.0);
        here && (from..until).contains(&target.version) && (self.applies)(problem)
    }
}

/// Whether a plan gets lengths that are those of the tensors, because of a known defect of plans without
/// lengths.
pub(crate) fn wants_lengths(target: Target, problem: &Problem) -> bool {
    KNOWN.iter().any(|known| known.remedy == Remedy::Lengths && known.is_met(target, problem))
}

/// The features of both passes. Softcap is not one: the fused engines compute an approximate hyperbolic
/// tangent, whose error is outside the numerics class (seen on an H100 with 9.19: a logsumexp of 8.853016
/// became 8.852971). Nor are query offsets per batch row: cuDNN takes one number for all of them.
fn features() -> FeatureSet {
    [
        Feature::GroupedHeads,
        Feature::ValueHeadDim,
        Feature::Causal,
        Feature::QueryOffset,
        Feature::BottomRight,
        Feature::WindowLeft,
        Feature::WindowRight,
        Feature::QueryLengths,
        Feature::KeyValueLengths,
        Feature::Lse,
        Feature::Mask,
        Feature::Bias,
        Feature::Alibi,
        Feature::Sinks,
        Feature::Dropout,
        Feature::DSinks,
        Feature::Deterministic,
        Feature::DeviceData,
        Feature::PackedQueries,
        Feature::PackedKeys,
    ]
    .into_iter()
    .collect()
}

/// What the backend can do on a target.
pub(crate) fn capabilities(target: Target, config: &CudnnConfig) -> Capabilities {
    // The largest head dimensions that cuDNN's engines take, forward and backward.
    let (forward, backward) = match target.capability.0 {
        8 | 12 => (256, 128),
        9 => (256, 256),
        _ => (256, 128),
    };
    let numerics = [(DType::F16, NumericsClass::HalfF32), (DType::Bf16, NumericsClass::HalfF32)];
    let pass = |features, most| PassCapabilities::new(features).with_max_head_dims(most, most);
    let backward_features = features().without(Feature::Deterministic);
    let in_backward = match config.rounds_group_gradients {
        true => backward_features,
        false => backward_features.without(Feature::GroupedHeads),
    };
    // Keys in pages have no backward pass.
    let in_forward = features().with(Feature::PagedKeys);
    Capabilities::new(DeviceKind::Cuda, numerics, pass(in_forward, forward), ScratchGrowth::Linear)
        .with_backward(pass(in_backward, backward))
        .with_long_sums(LONG_SUMS)
        .with_sum_limits(SUM_LIMITS)
}

/// The refusal of a value of something.
fn limit(what: impl Into<String>, value: impl ToString, why: impl Into<String>) -> Unsupported {
    let (backend, what, value) = (NAME.to_owned(), what.into(), value.to_string());
    Unsupported::Limit { backend, what, value, why: why.into() }
}

/// Whether a problem can be served on a target.
pub(crate) fn check(
    capabilities: &Capabilities,
    target: Target,
    config: &CudnnConfig,
    problem: &Problem,
) -> Result<(), Unsupported> {
    capabilities.check(NAME, problem)?;
    if target.capability.0 < 8 {
        return Err(limit(
            "compute capability",
            format!("{}.{}", target.capability.0, target.capability.1),
            "cuDNN's fused attention needs 8.0 or more",
        ));
    }
    let dims = problem.dims();
    for (what, size) in [
        ("batch", dims.batch),
        ("query length", dims.query_length),
        ("key length", dims.key_length),
        ("query heads", dims.query_heads),
        ("key/value heads", dims.key_heads),
    ] {
        if size == 0 || i32::try_from(size).is_err() {
            return Err(limit(what, size, "it takes 1 to 2^31 - 1"));
        }
    }
    if dims.batch.saturating_mul(dims.query_heads) > 65535 {
        return Err(limit(
            "batch times query heads",
            dims.batch.saturating_mul(dims.query_heads),
            "it takes at most 65535",
        ));
    }
    for (what, size) in [("head dimension", dims.head_dim), ("value head dimension", dims.value_head_dim)] {
        if size % 8 != 0 {
            return Err(limit(what, size, "it takes multiples of 8"));
        }
    }
    if problem.any_scale() {
        // If the product of the scale and log2(e) is not finite in f32, the fused engines compute NaN
        // everywhere.
        let ordinary = Problem::ordinary_scales(problem.dtype().accumulator());
        let why = "cuDNN scales after it took the row max, and multiplies the scale with log2(e) in f32";
        let value = format!("{:e} to {:e}", ordinary.start(), ordinary.end());
        return Err(limit("scales outside of", value, why));
    }
    for role in TENSORS {
        tensor(problem, role)?;
    }
    if problem.pass() == Pass::Backward && (dims.query_length == 1 || dims.key_length == 1) {
        // cuDNN's release notes: one key is not supported in backward.
        return Err(limit(
            "backward over query and key lengths",
            format!("{} and {}", dims.query_length, dims.key_length),
            "cuDNN takes at least 2 of each",
        ));
    }
    positions(problem)?;
    sequences(target, problem)?;
    let window = problem.window();
    if window.left.is_some() && dims.query_length.max(dims.key_length) > 1 << 24 {
        let longest = dims.query_length.max(dims.key_length);
        let why = "cuDNN computes where a window begins in f32, so it takes up to 2^24";
        return Err(limit("a window with a left bound over length", longest, why));
    }
    let adds = [Role::Mask, Role::Bias, Role::AlibiSlopes].into_iter().find(|&role| problem.has(role));
    if let Some(role) = adds
        && dims.query_length == 1
        && dims.key_length == 1
    {
        let why = "cuDNN misreads a bias of one row and one key where heads have their own";
        return Err(limit(format!("{role} over query and key lengths"), "1 and 1", why));
    }
    if config.own_dropout && problem.dropout_rate().is_some() && problem.has(Role::DSinks) {
        let why = "they are computed of row terms that cuDNN leaves with the published stream alone";
        return Err(limit("dsinks with", "cuDNN's own dropout", why));
    }
    let on_device = |role: Role| problem.has(role) && problem.device_of(role) != Device::Cpu;
    if config.own_dropout
        && let Some(role) = [Role::DropoutSeed, Role::DropoutOffset].into_iter().find(|&role| on_device(role))
    {
        let why = "cuDNN's own dropout takes its seed from the host, and the published stream does not";
        return Err(limit(format!("{role} in"), "device memory", why));
    }
    if problem.has(Role::Sinks) && problem.pass() == Pass::Forward {
        if target.version < [9, 13, 0] {
            return Err(limit("sinks with", target, "cuDNN has them from 9.13 on"));
        }
        if dims.query_length == 1 {
            return Err(limit("sinks with query length", 1, "cuDNN takes at least 2"));
        }
    }
    for known in KNOWN {
        if known.remedy == Remedy::Refusal && known.is_met(target, problem) {
            return Err(limit(
                format!("{} with", known.what),
                target,
                format!("{} ({})", known.why, known.source),
            ));
        }
    }
    Ok(())
}

/// Refuses offsets and windows that the graphs cannot compute: they compute positions in 32 bits, and the
/// first key of a window in f32.
fn positions(problem: &Problem) -> Result<(), Unsupported> {
    // A position is the sum of an index and an offset: two numbers up to 2^30 do not overflow 32 bits.
    const FAR: usize = 1 << 30;
    let dims = problem.dims();
    if let Alignment::Offset(OffsetRange::Any) | Alignment::Offsets(OffsetRange::Any) = problem.alignment() {
        let why = "cuDNN computes positions in 32 bits, and calls may give offsets of 64";
        return Err(limit("query offsets beyond", OffsetRange::NEAR, why));
    }
    // The offset is a difference of lengths, which may be any numbers up to the lengths of the tensors.
    let apart = match problem.alignment() {
        Alignment::BottomRight if has_lengths(problem) => dims.query_length.max(dims.key_length),
        Alignment::BottomRight => dims.query_length.abs_diff(dims.key_length),
        _ => 0,
    };
    let window = problem.window();
    let reaches = [window.left, window.right].into_iter().flatten().chain([apart]);
    match reaches.max().filter(|&far| far > FAR) {
        Some(far) => {
            let why = "cuDNN computes positions in 32 bits, so it takes up to 2^30 either way";
            Err(limit("an offset or a window of", far, why))
        }
        None => Ok(()),
    }
}

/// The options that are served of dense rows alone. cuDNN reads mask, bias, ALiBi that is not plainly causal
/// and the keep mask of dropout as tensors over the longest sequences, so that they would take memory and
/// time for rows that no sequence has. ALiBi and `dsinks` need row maxima, which are kept for dense rows.
const DENSE_ALONE: [Feature; 5] =
    [Feature::Mask, Feature::Bias, Feature::Alibi, Feature::Dropout, Feature::DSinks];

/// Refuses what is not served of packed sequences, or of keys in pages.
fn sequences(target: Target, problem: &Problem) -> Result<(), Unsupported> {
    let places = Places::of(problem);
    let what = match places {
        places if places.is_dense() => return Ok(()),
        Places { pages: Some(_), .. } => "keys in pages",
        _ => "packed sequences",
    };
    let features = problem.features();
    if let Some(option) = DENSE_ALONE.into_iter().find(|&option| features.contains(option)) {
        let why = "this backend has it for dense rows alone";
        return Err(limit(format!("{what} with"), option, why));
    }
    if places.packed_queries && !matches!(target.capability.0, 9 | 10) {
        let why = "cuDNN writes no packed logsumexp there";
        return Err(limit("packed queries with", target, why));
    }
    if places.packed_queries && problem.dims().query_length < 2 {
        let why = "rows of groups of heads were wrong with cuDNN 9.19 on an H200, where no sequence has more than one";
        return Err(limit("packed queries, of a sequence at most", problem.dims().query_length, why));
    }
    if places.packed_queries && !places.packed_keys && places.pages.is_none() {
        return Err(limit("packed queries with", "dense keys", "this backend has them for packed keys"));
    }
    for (is_packed, role) in [(places.packed_queries, Role::Query), (places.packed_keys, Role::Key)] {
        let rows = problem.tensor(role).map_or(0, |desc| desc.shape()[1]);
        if is_packed && (rows == 0 || i32::try_from(rows).is_err()) {
            return Err(limit(format!("packed rows of {role}"), rows, "it takes 1 to 2^31 - 1"));
        }
    }
    if let Some(pages) = places.pages {
        if pages.count == 0 || i32::try_from(pages.count).is_err() {
            return Err(limit("pages", pages.count, "it takes 1 to 2^31 - 1"));
        }
        if !pages.size.unsigned_abs().is_power_of_two() {
            return Err(limit("pages of", pages.size, "cuDNN takes powers of two"));
        }
    }
    if problem.pass() == Pass::Backward {
        let dims = problem.dims();
        if dims.query_heads != dims.key_heads {
            let why = "cuDNN sums the gradients of a group in memory for the longest sequences";
            return Err(limit(format!("{what} in backward with"), Feature::GroupedHeads, why));
        }
        if !dims.head_dim.is_multiple_of(16) {
            let why = "cuDNN takes multiples of 16";
            return Err(limit(format!("{what} in backward with head dimension"), dims.head_dim, why));
        }
    }
    Ok(())
}

/// The tensors whose strides must follow the rules of [`tensor`] and are a part of a plan's key.
pub(crate) const TENSORS: [Role; 8] =
    [Role::Query, Role::Key, Role::Value, Role::Out, Role::DOut, Role::DQuery, Role::DKey, Role::DValue];

/// Refuses operands, outputs and gradients whose strides cuDNN does not take. It does not report such
/// strides: results are wrong, or the process ends.
fn tensor(problem: &Problem, role: Role) -> Result<(), Unsupported> {
    let Some(desc) = problem.tensor(role) else { return Ok(()) };
    let (shape, strides) = (desc.shape(), desc.strides());
    for axis in 0..desc.rank() {
        let stride = strides[axis];
        if shape[axis] == 1 {
            continue;
        }
        if axis == 3 {
            if stride != 1 {
                return Err(limit(format!("{role} with last stride"), stride, "cuDNN takes 1"));
            }
        } else if stride <= 0 || stride % 8 != 0 {
            return Err(limit(
                format!("{role} whose axis {axis} has stride"),
                stride,
                "cuDNN takes positive multiples of 8 elements (16 bytes)",
            ));
        }
    }
    // Seen with 9.19 on an H200: if elements of a tensor are farther apart than this, the errors of gradients
    // were more than twice the bound of their class. Outputs had the same bits as without the distance.
    if problem.pass() == Pass::Backward {
        let reach = |axis: usize| (shape[axis] as i128 - 1).max(0) * strides[axis] as i128;
        let last: i128 = (0..desc.rank()).map(reach).sum();
        if last > i128::from(i32::MAX) {
            return Err(limit(
                format!("backward with {role} whose last element is at"),
                last,
                "cuDNN's gradients are wrong of tensors that reach over more than 2^31 - 1 elements",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use attention_core::{Device, Gradients, TensorDesc, Window};

    use super::*;

    /// A problem for each row of the table, which its defect concerns.
    fn instances() -> [Problem; KNOWN.len()] {
        let desc = |length, heads| TensorDesc::contiguous(DType::Bf16, [1, length, heads, 64]);
        let of = |queries, keys, heads| {
            Problem::builder(desc(queries, heads), desc(keys, heads), desc(keys, heads))
                .device(Device::Cuda(0))
        };
        let window = Window { left: Some(64), right: None };
        let bias = TensorDesc::contiguous(DType::Bf16, [1, 1, 96, 192]);
        let packed = || {
            let rows = TensorDesc::contiguous(DType::Bf16, [100, 2, 64]);
            let problem = Problem::builder(rows, rows, rows).device(Device::Cuda(0));
            problem
                .packed_queries(3, DType::I32)
                .packed_keys(3, DType::I32)
                .longest(48, 48)
                .gradients(Gradients::QKV)
        };
        [
            of(2048, 2048, 2).window(window),
            of(1, 100, 4),
            packed(),
            of(8, 8, 2),
            of(96, 100, 2).gradients(Gradients::QKV),
            of(96, 192, 2).bias(bias).gradients(Gradients::QKV),
        ]
        .map(|builder| builder.build().expect("valid"))
    }

    /// The distance is counted in elements, from the first to the last one of the tensor.
    #[test]
    fn gradients_of_tensors_that_are_far_apart_are_refused() {
        let near = TensorDesc::contiguous(DType::Bf16, [2, 8, 2, 64]);
        let (target, config) = (Target::default(), CudnnConfig::default());
        let row = 8 * 2 * 64;
        for (stride, is_served) in [((1 << 31) - row, true), (1 << 31, false)] {
            let strides = [stride, 128, 64, 1];
            let far = TensorDesc::strided(DType::Bf16, [2, 8, 2, 64], strides).expect("four axes");
            for (key, value) in [(far, near), (near, far)] {
                let builder = Problem::builder(near, key, value).device(Device::Cuda(0));
                let answer = |builder: attention_core::ProblemBuilder| {
                    let problem = builder.build().expect("valid");
                    check(&capabilities(target, &config), target, &config, &problem)
                };
                assert_eq!(answer(builder.clone()), Ok(()), "forward");
                let backward = answer(builder.gradients(Gradients::QKV));
                assert_eq!(backward.is_ok(), is_served, "{stride}: {backward:?}");
                assert!(is_served || backward.is_err_and(|refusal| refusal.to_string().contains("2^31 - 1")));
            }
        }
    }

    fn answer(builder: attention_core::ProblemBuilder, config: &CudnnConfig) -> Result<(), Unsupported> {
        let target = Target::default();
        check(&capabilities(target, config), target, config, &builder.build().expect("valid"))
    }

    fn builder() -> attention_core::ProblemBuilder {
        let desc = TensorDesc::contiguous(DType::Bf16, [1, 8, 2, 64]);
        Problem::builder(desc, desc, desc).device(Device::Cuda(0))
    }

    /// The largest scale that is served is finite in base two as well.
    #[test]
    fn scales_that_are_infinite_in_base_two_are_refused() {
        use attention_core::CallData;
        for (scale, is_served) in
            [(2e38, true), (2.4e38, false), (f64::from(f32::MAX), false), (-1.0, false), (0.0, false)]
        {
            let data = CallData { scale: Some(scale), ..CallData::default() };
            let answer = answer(builder().data(&data), &CudnnConfig::default());
            assert_eq!(answer.is_ok(), is_served, "{scale}");
            assert!(is_served || answer.is_err_and(|refusal| refusal.to_string().contains("1e-37 to 2e38")));
        }
        let most = *Problem::ordinary_scales(DType::F32).end() as f32;
        assert!((most * std::f32::consts::LOG2_E).is_finite());
    }

    #[test]
    fn offsets_and_windows_that_are_far_away_are_refused() {
        let refusal = |builder| answer(builder, &CudnnConfig::default()).err().map(|error| error.to_string());
        let offset = |range| builder().causal(true).alignment(Alignment::Offset(range));
        assert_eq!(refusal(offset(OffsetRange::Near)), None);
        assert!(
            refusal(offset(OffsetRange::Any))
                .is_some_and(|error| error.contains("query offsets beyond 4194304"))
        );
        for (right, is_served) in [(1 << 30, true), ((1 << 30) + 1, false), (usize::MAX, false)] {
            let window = Window { left: None, right: Some(right) };
            assert_eq!(refusal(builder().window(window)).is_none(), is_served, "{right}");
        }
        let desc = |length| TensorDesc::contiguous(DType::Bf16, [1, length, 1, 8]);
        let bottom = |queries, keys| {
            let problem = Problem::builder(desc(queries), desc(keys), desc(keys)).device(Device::Cuda(0));
            problem.causal(true).alignment(Alignment::BottomRight)
        };
        const FAR: usize = (1 << 30) + 8;
        assert_eq!(refusal(bottom(FAR, FAR)), None);
        assert!(refusal(bottom(8, FAR + 8)).is_some());
        assert!(refusal(bottom(FAR, FAR).query_lengths(DType::I32)).is_some());
    }

    #[test]
    fn numbers_in_device_memory_are_served_where_no_graph_needs_them_on_the_host() {
        let own = CudnnConfig::default().own_dropout(true);
        let lengths = || builder().query_lengths(DType::I64).key_value_lengths(DType::U32);
        for config in [CudnnConfig::default(), own.clone()] {
            assert_eq!(answer(lengths(), &config), Ok(()));
            assert_eq!(answer(lengths().dropout_rate(0.5).gradients(Gradients::QKV), &config), Ok(()));
        }
        let seed = TensorDesc::contiguous(DType::I64, [1]);
        for role in [Role::DropoutSeed, Role::DropoutOffset] {
            let dropped = || builder().dropout_rate(0.5).layout(role, seed);
            assert_eq!(answer(dropped(), &CudnnConfig::default()), Ok(()));
            assert_eq!(answer(dropped().in_host_memory(role, true), &own), Ok(()));
            let refusal = answer(dropped(), &own).expect_err("refused").to_string();
            assert!(refusal.contains(&format!("{role} in device memory")), "{refusal}");
        }
        let refusal = answer(builder().query_offsets(OffsetRange::Near, DType::I32), &own);
        let refusal = refusal.expect_err("refused").to_string();
        assert!(refusal.contains("query offsets by batch row"), "{refusal}");
    }

    #[test]
    fn every_version_that_is_known_to_be_wrong_is_met_and_its_neighbours_are_not() {
        for (known, problem) in KNOWN.iter().zip(instances()) {
            let capability = (known.capability.unwrap_or(9), 0);
            let (from, until) = known.versions;
            let at = |version| Target { version, capability };
            let config = CudnnConfig::default();
            let answer = |target| check(&capabilities(target, &config), target, &config, &problem);
            assert!(known.source.starts_with("https://"), "{known:?}");
            assert!(known.is_met(at(from), &problem) && !known.is_met(at(until), &problem), "{known:?}");
            if known.capability.is_some() {
                assert!(!known.is_met(Target { version: from, capability: (8, 0) }, &problem), "{known:?}");
            }
            match known.remedy {
                Remedy::Refusal => {
                    let error = answer(at(from)).expect_err("refused").to_string();
                    assert!(error.contains(known.what) && error.contains(known.why), "{error}");
                    assert_eq!(answer(at(until)), Ok(()), "{known:?}");
                }
                Remedy::Lengths => {
                    let last = [from, [9, 15, 0]].into_iter().max().unwrap_or(from);
                    assert_eq!(answer(at(last)), Ok(()), "{known:?}");
                    assert!(wants_lengths(at(last), &problem));
                }
            }
        }
        // One query row in backward is refused whatever the version.
        let desc = TensorDesc::contiguous(DType::Bf16, [1, 1, 2, 64]);
        let key = TensorDesc::contiguous(DType::Bf16, [1, 128, 2, 64]);
        let one = Problem::builder(desc, key, key)
            .device(Device::Cuda(0))
            .gradients(Gradients::QKV)
            .build()
            .expect("valid");
        let config = CudnnConfig::default();
        for version in [[9, 19, 0], [9, 25, 1], [9, 26, 0], [9, 28, 0]] {
            let target = Target { version, capability: (9, 0) };
            let error = check(&capabilities(target, &config), target, &config, &one)
                .expect_err("refused")
                .to_string();
            assert!(
                error.contains(
                    "backward over query and key lengths 1 and 128: cuDNN takes at least 2 of each"
                ),
                "{error}"
            );
        }
    }
}
