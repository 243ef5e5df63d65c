//! What a backend can do, as data.

use crate::{DType, DeviceKind, FeatureSet, NumericsClass, Pass, Problem, Unsupported};

/// What a backend can do in one pass.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct PassCapabilities {
    /// The features it serves.
    pub features: FeatureSet,
    /// The largest head dimension of queries and keys, if there is a limit.
    pub max_head_dim: Option<usize>,
    /// The largest head dimension of values, if there is a limit.
    pub max_value_head_dim: Option<usize>,
}

impl PassCapabilities {
    /// These features, without limits.
    pub const fn new(features: FeatureSet) -> Self {
        Self { features, max_head_dim: None, max_value_head_dim: None }
    }

    /// With the largest head dimensions: of queries and keys, and of values.
    #[must_use]
    pub const fn with_max_head_dims(self, query: usize, value: usize) -> Self {
        Self { max_head_dim: Some(query), max_value_head_dim: Some(value), ..self }
    }
}

/// How a backend's scratch memory grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum ScratchGrowth {
    /// With the logits of a block of rows: rows of the block x `S`.
    RowBlock,
    /// With the whole matrix of logits: `T x S`.
    Logits,
    /// With the sequence length.
    Linear,
    /// Not at all.
    Constant,
}

impl std::fmt::Display for ScratchGrowth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            ScratchGrowth::RowBlock => "O(S) a thread",
            ScratchGrowth::Logits => "O(T*S)",
            ScratchGrowth::Linear => "O(T)",
            ScratchGrowth::Constant => "constant",
        })
    }
}

/// What is known of the outputs of long rows where a backend sums in a way that drifts: its numerics class is
/// then for rows that are shorter.
///
/// A sum that drifts loses something at every step, always in the same direction, so that its error grows
/// with its length and does not average out. Tensor cores do that: they cut a sum towards zero where other
/// arithmetic rounds it (docs/numerics.md, "Long sums"). Sums over fewer keys than the first figure of a
/// dtype are as the class says.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct LongSums {
    /// The operands' dtype.
    pub dtype: DType,
    /// Keys that a row attends to.
    pub keys: usize,
    /// The mean relative error of its outputs, as measured: negative towards zero.
    pub mean_error: f64,
}

impl LongSums {
    /// What was measured of rows that attend to this many keys.
    pub const fn new(dtype: DType, keys: usize, mean_error: f64) -> Self {
        Self { dtype, keys, mean_error }
    }
}

/// The longest sums for which a backend's numerics class of a dtype holds, where tensor cores make long sums
/// drift ([`LongSums`]; docs/numerics.md, "Long sums").
///
/// An output and a gradient of queries are sums over the keys that a row attends to, a gradient of keys or
/// values over the rows that attend to the key. Up to these lengths the drift is at most half a unit in the
/// last place of a result. A longer call leaves the class: an automatic choice passes the backend over, and
/// asked for by name it serves the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct SumLimit {
    /// The operands' dtype.
    pub dtype: DType,
    /// Keys that a row attends to, at most.
    pub keys: usize,
    /// Query rows that attend to a key, at most, in the backward pass.
    pub queries: usize,
}

impl SumLimit {
    /// The class of this dtype holds for sums over up to so many keys and query rows.
    pub const fn new(dtype: DType, keys: usize, queries: usize) -> Self {
        Self { dtype, keys, queries }
    }
}

/// What a backend can do, as data: printed in docs and tables, read by the conformance suite, and the first
/// thing that [`supports`](crate::AttentionBackend::supports) looks at.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Capabilities {
    /// The memory it works on.
    pub device: DeviceKind,
    /// The operand dtypes it takes, with the numerics class of each.
    pub numerics: Vec<(DType, NumericsClass)>,
    /// The forward pass.
    pub forward: PassCapabilities,
    /// The backward pass, if there is one.
    pub backward: Option<PassCapabilities>,
    /// How its scratch memory grows.
    pub scratch: ScratchGrowth,
    /// How far long sums drift, by dtype and from fewer keys to more; empty where none do.
    #[cfg_attr(feature = "serde", serde(default))]
    pub long_sums: Vec<LongSums>,
    /// The longest sums for which the class of a dtype holds; a dtype without an entry has no limit.
    #[cfg_attr(feature = "serde", serde(default))]
    pub sum_limits: Vec<SumLimit>,
}

impl Capabilities {
    /// A backend on this memory, for these operands, with a forward pass only.
    pub fn new(
        device: DeviceKind,
        numerics: impl Into<Vec<(DType, NumericsClass)>>,
        forward: PassCapabilities,
        scratch: ScratchGrowth,
    ) -> Self {
        let (numerics, long_sums, sum_limits) = (numerics.into(), Vec::new(), Vec::new());
        Self { device, numerics, forward, backward: None, scratch, long_sums, sum_limits }
    }

    /// With a backward pass.
    #[must_use]
    pub fn with_backward(self, backward: PassCapabilities) -> Self {
        Self { backward: Some(backward), ..self }
    }

    /// With what was measured of long sums.
    #[must_use]
    pub fn with_long_sums(self, long_sums: impl Into<Vec<LongSums>>) -> Self {
        Self { long_sums: long_sums.into(), ..self }
    }

    /// With the longest sums for which classes hold.
    #[must_use]
    pub fn with_sum_limits(self, sum_limits: impl Into<Vec<SumLimit>>) -> Self {
        Self { sum_limits: sum_limits.into(), ..self }
    }

    /// The numerics class for operands of `dtype`, or `None` where the backend does not take them. Of long
    /// calls, [`check_sums`](Self::check_sums) says whether it holds.
    pub fn numerics_of(&self, dtype: DType) -> Option<NumericsClass> {
        self.numerics.iter().find(|(candidate, _)| *candidate == dtype).map(|&(_, class)| class)
    }

    /// What the backend can do in `pass`.
    pub fn pass(&self, pass: Pass) -> Option<&PassCapabilities> {
        match pass {
            Pass::Forward => Some(&self.forward),
            Pass::Backward => self.backward.as_ref(),
        }
    }

    /// Checks whether the class of the problem's dtype holds for sums as long as the problem's. Whoever chooses
    /// by class asks this as well as [`numerics_of`](Self::numerics_of); `supports` does not, since a backend
    /// serves longer calls of those who ask for it by name.
    ///
    /// Lengths are the problem's upper bounds, so a call with fewer keys may be refused; a window with both
    /// bounds counts.
    ///
    /// # Errors
    /// [`Unsupported::LongSums`] with the length and the limit.
    pub fn check_sums(&self, backend: &str, problem: &Problem) -> Result<(), Unsupported> {
        let dtype = problem.dtype();
        let limit = self.sum_limits.iter().find(|limit| limit.dtype == dtype);
        let (Some(limit), Some(class)) = (limit, self.numerics_of(dtype)) else { return Ok(()) };
        let (dims, window) = (problem.dims(), problem.window());
        let right = if problem.causal() { Some(0) } else { window.right };
        // Keys that a row attends to, and rows that attend to a key, are as many as positions in the window.
        let in_window = match (window.left, right) {
            (Some(left), Some(right)) => left.saturating_add(right).saturating_add(1),
            _ => usize::MAX,
        };
        let queries = match problem.pass() {
            Pass::Forward => 0,
            Pass::Backward => dims.query_length,
        };
        for (what, length, limit) in
            [("keys", dims.key_length, limit.keys), ("query rows", queries, limit.queries)]
        {
            let length = length.min(in_window);
            if length > limit {
                let backend = backend.to_owned();
                return Err(Unsupported::LongSums { backend, dtype, class, what, length, limit });
            }
        }
        Ok(())
    }

    /// Checks a problem against these capabilities: device, dtype, pass, features and head dimensions. A
    /// backend's `supports` starts with this and adds what data cannot say.
    ///
    /// # Errors
    /// The first limit that the problem meets.
    pub fn check(&self, backend: &str, problem: &Problem) -> Result<(), Unsupported> {
        let backend = || backend.to_owned();
        if problem.device().kind() != self.device {
            return Err(Unsupported::Device {
                backend: backend(),
                device: problem.device(),
                expected: self.device,
            });
        }
        if self.numerics_of(problem.dtype()).is_none() {
            return Err(Unsupported::DType {
                backend: backend(),
                dtype: problem.dtype(),
                supported: self.numerics.iter().map(|&(dtype, _)| dtype).collect(),
            });
        }
        let pass = problem.pass();
        let Some(capabilities) = self.pass(pass) else {
            return Err(Unsupported::Pass { backend: backend(), pass });
        };
        if let Some(feature) = problem.features().difference(capabilities.features).iter().next() {
            return Err(Unsupported::Feature { backend: backend(), feature, pass });
        }
        let dims = problem.dims();
        for (what, value, max) in [
            ("head dimension", dims.head_dim, capabilities.max_head_dim),
            ("value head dimension", dims.value_head_dim, capabilities.max_value_head_dim),
        ] {
            if let Some(max) = max.filter(|&max| value > max) {
                return Err(Unsupported::Limit {
                    backend: backend(),
                    what: what.to_owned(),
                    value: value.to_string(),
                    why: format!("it takes at most {max}"),
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gradients, ProblemBuilder, TensorDesc, Window};

    /// Outputs are sums over keys; gradients also over query rows; a window with both bounds limits both.
    #[test]
    fn classes_hold_for_sums_up_to_their_limits() {
        let all = PassCapabilities::new(FeatureSet::all());
        let numerics = [(DType::F16, NumericsClass::HalfF32), (DType::F32, NumericsClass::F32)];
        let capabilities = Capabilities::new(DeviceKind::Cpu, numerics, all, ScratchGrowth::Constant)
            .with_sum_limits([SumLimit::new(DType::F16, 64, 32)]);
        let check = |dtype, queries, keys, options: fn(ProblemBuilder) -> ProblemBuilder| {
            let desc = |length| TensorDesc::contiguous(dtype, [1, length, 1, 8]);
            let builder = Problem::builder(desc(queries), desc(keys), desc(keys));
            match capabilities.check_sums("toy", &options(builder).build().unwrap()) {
                Ok(()) => None,
                Err(Unsupported::LongSums { what, length, limit, .. }) => Some((what, length, limit)),
                Err(other) => panic!("{other}"),
            }
        };
        let backward = |builder: ProblemBuilder| builder.gradients(Gradients::QKV);
        assert_eq!(check(DType::F16, 1000, 64, |builder| builder), None);
        assert_eq!(check(DType::F16, 1, 65, |builder| builder), Some(("keys", 65, 64)));
        assert_eq!(check(DType::F32, 1, 65, |builder| builder), None);
        assert_eq!(check(DType::F16, 32, 64, backward), None);
        assert_eq!(check(DType::F16, 33, 64, backward), Some(("query rows", 33, 32)));
        assert_eq!(check(DType::F16, 32, 65, backward), Some(("keys", 65, 64)));
        let window = |builder: ProblemBuilder| builder.window(Window::new(40, 23));
        assert_eq!(check(DType::F16, 1000, 1000, window), None);
        let wider = |builder: ProblemBuilder| builder.window(Window::new(40, 24));
        assert_eq!(check(DType::F16, 1000, 1000, wider), Some(("keys", 65, 64)));
        // Causal calls see nothing to the right, and are not bounded to the left.
        let causal = |builder: ProblemBuilder| builder.window(Window::new(63, 24)).causal(true);
        assert_eq!(check(DType::F16, 1000, 1000, causal), None);
        assert_eq!(check(DType::F16, 65, 65, |builder| builder.causal(true)), Some(("keys", 65, 64)));
    }
}
