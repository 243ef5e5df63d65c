//! What cuDNN serves, as data: by version and compute capability, with the reason for each limit.

use attention_core::{
    Capabilities, DType, DeviceKind, Feature, FeatureSet, NumericsClass, Pass, PassCapabilities, Problem,
    Role, ScratchGrowth, Unsupported,
};

use crate::CudnnConfig;
use crate::backend::NAME;
use crate::key::TENSORS;

/// A cuDNN version and the device that it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// Major, minor and patch version of cuDNN: `[9, 19, 0]`.
    pub version: [u32; 3],
    /// The compute capability: `(9, 0)` for Hopper.
    pub capability: (u32, u32),
}

impl Target {
    /// Of cuDNN's own number for its version, `91900` for 9.19.0.
    pub(crate) fn of(version: usize, capability: (u32, u32)) -> Self {
        let part = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Self { version: [part(version / 10000), part(version / 100 % 100), part(version % 100)], capability }
    }
}

impl Default for Target {
    /// cuDNN 9.19.0 on Hopper: what this backend was tried on.
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

/// Versions in which something is wrong.
struct Known {
    /// From this version on, and before the other.
    versions: ([u32; 3], [u32; 3]),
    applies: fn(&Problem) -> bool,
    what: &'static str,
    limit: &'static str,
}

/// What is refused in some versions.
const KNOWN: &[Known] = &[Known {
    versions: ([9, 14, 0], [9, 14, 1]),
    applies: |problem| {
        let window = problem.window();
        let windowed = window.left.is_some() || window.right.is_some();
        windowed && !problem.causal() && problem.dims().key_length > 1024
    },
    what: "a window without causal masking over more than 1024 keys",
    // cuDNN release notes 9.14.1.
    limit: "in cuDNN other than 9.14.0, which computes it wrongly",
}];

/// The features of both passes. Not softcap: the fused engines take an approximate hyperbolic tangent (seen on H100 with
/// 9.19: a logsumexp of 8.853016 became 8.852971), which is outside the numerics class.
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
    ]
    .into_iter()
    .collect()
}

/// What the backend can do on a target.
pub(crate) fn capabilities(target: Target, config: &CudnnConfig) -> Capabilities {
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
    Capabilities::new(DeviceKind::Cuda, numerics, pass(features(), forward), ScratchGrowth::Linear)
        .with_backward(pass(in_backward, backward))
}

fn limit(what: impl Into<String>, value: impl ToString, limit: impl Into<String>) -> Unsupported {
    Unsupported::Limit {
        backend: NAME.to_owned(),
        what: what.into(),
        value: value.to_string(),
        limit: limit.into(),
    }
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
            "a compute capability",
            format!("sm_{}{}", target.capability.0, target.capability.1),
            "of 8.0 or more",
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
            return Err(limit(what, size, "between 1 and 2^31 - 1"));
        }
    }
    if dims.batch.saturating_mul(dims.query_heads) > 65535 {
        return Err(limit(
            "batch times query heads",
            dims.batch.saturating_mul(dims.query_heads),
            "at most 65535",
        ));
    }
    for (what, size) in [("head dimension", dims.head_dim), ("value head dimension", dims.value_head_dim)] {
        if size % 8 != 0 {
            return Err(limit(what, size, "a multiple of 8"));
        }
    }
    if problem.scale() <= 0.0 {
        // The fused engines scale after they took the maximum: a negative scale gives NaN.
        return Err(limit("a scale", problem.scale(), "above 0"));
    }
    for role in TENSORS {
        tensor(problem, role)?;
    }
    if problem.pass() == Pass::Backward && (dims.query_length == 1 || dims.key_length == 1) {
        // Release notes: one key is not supported in backward.
        return Err(limit(
            "query and key lengths in backward",
            format!("{} and {}", dims.query_length, dims.key_length),
            "of at least 2",
        ));
    }
    // The graphs compute positions in 32 bits, and where a window begins in f32.
    const FAR: i64 = 1 << 30;
    let window = problem.window();
    let offsets = (0..dims.batch).map(|batch| problem.offset(batch));
    let bounds = [window.left, window.right].into_iter().flatten();
    let bounds = bounds.map(|bound| i64::try_from(bound).unwrap_or(i64::MAX));
    if let Some(far) = offsets.chain(bounds).find(|far| far.unsigned_abs() > FAR.unsigned_abs()) {
        return Err(limit("offsets and windows", far, "within 2^30"));
    }
    if window.left.is_some() && dims.query_length.max(dims.key_length) > 1 << 24 {
        let longest = dims.query_length.max(dims.key_length);
        return Err(limit("lengths with a window's left bound", longest, "at most 2^24"));
    }
    let adds = [Role::Mask, Role::Bias, Role::AlibiSlopes].into_iter().find(|&role| problem.has(role));
    if let Some(role) = adds
        && dims.query_length == 1
        && dims.key_length == 1
    {
        // A bias of one row and one key is misread where heads have their own.
        return Err(limit(format!("lengths with {role}"), "1 and 1", "other than 1 and 1"));
    }
    if problem.pass() == Pass::Backward
        && problem.dropout().is_some()
        && let Some(batch) = (0..dims.batch).find(|&batch| problem.key_value_len(batch) == 0)
    {
        // Gradients of a batch row without keys are left unwritten.
        let what = "key lengths with dropout in backward";
        return Err(limit(what, format!("0 in batch row {batch}"), "of at least 1"));
    }
    if config.own_dropout && problem.dropout().is_some() && problem.has(Role::DSinks) {
        // They are computed of the row terms that cuDNN leaves, which are others then.
        return Err(limit("dsinks with dropout", "cuDNN's own dropout", "the published stream"));
    }
    if problem.has(Role::Sinks) && problem.pass() == Pass::Forward {
        if target.version < [9, 13, 0] {
            return Err(limit("sinks", target, "with cuDNN 9.13 or later"));
        }
        if dims.query_length == 1 {
            return Err(limit("a query length with sinks", 1, "of at least 2"));
        }
    }
    for known in KNOWN {
        let (from, until) = known.versions;
        if (from..until).contains(&target.version) && (known.applies)(problem) {
            return Err(limit(known.what, target, known.limit));
        }
    }
    Ok(())
}

/// The rules for the strides of operands, outputs and gradients: those that break them give wrong numbers or end the
/// process, without a word from cuDNN.
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
                return Err(limit(format!("the last stride of {role}"), stride, "1"));
            }
        } else if stride <= 0 || stride % 8 != 0 {
            return Err(limit(
                format!("stride {axis} of {role}"),
                stride,
                "a positive multiple of 8 elements (16 bytes)",
            ));
        }
    }
    Ok(())
}
