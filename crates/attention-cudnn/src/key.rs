//! What plans are kept by: a problem without what each call may change.

use attention_core::{DType, Dimensions, Pass, Problem, QueryOffset, Role};

use crate::Target;
use crate::graph::{Shape, Type};

/// How the rows' positions are moved against the keys'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Diagonal {
    /// Row 0 is at key 0.
    TopLeft,
    /// Row 0 is at some other key.
    Fixed,
    /// The last row is at the last key.
    BottomRight,
}

/// Where the logsumexp of a forward pass goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stats {
    /// Nowhere.
    Unwanted,
    /// To the caller's tensor, with these strides.
    Direct(Shape),
    /// To scratch without gaps: from there a kernel of ours takes it, or brings it there.
    Packed,
}

/// A plan's key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) pass: Pass,
    pub(crate) element: DType,
    pub(crate) dims: Dimensions,
    /// Strides over batch, head, position and width: query, key, value, output; in backward also the gradients'.
    pub(crate) strides: Vec<Option<Shape>>,
    /// Whether lengths come with each call.
    pub(crate) lengths: bool,
    pub(crate) diagonal: Diagonal,
    /// Whether rows do not see every key behind their position, and whether 0 of them.
    pub(crate) right: Option<bool>,
    pub(crate) left: bool,
    pub(crate) stats: Stats,
    /// Whether keys that no row sees, and rows that see nothing, are replaced by zeros first.
    pub(crate) clean_keys: bool,
    pub(crate) clean_rows: bool,
}

/// The tensors whose strides are a part of the key.
pub(crate) const TENSORS: [Role; 8] =
    [Role::Query, Role::Key, Role::Value, Role::Out, Role::DOut, Role::DQuery, Role::DKey, Role::DValue];

/// The keys that rows see beyond their position: none, where causal.
pub(crate) fn right_bound(problem: &Problem) -> Option<usize> {
    let window = problem.window().right;
    if problem.causal() { Some(0) } else { window }
}

impl Key {
    pub(crate) fn of(problem: &Problem, target: Target) -> Self {
        let dims = problem.dims();
        let lengths = (0..dims.batch).any(|batch| {
            problem.query_len(batch) != dims.query_length || problem.key_value_len(batch) != dims.key_length
        });
        let (right, left) = (right_bound(problem), problem.window().left);
        let diagonal = match problem.query_offset() {
            _ if right.is_none() && left.is_none() => Diagonal::TopLeft,
            QueryOffset::Fixed(0) => Diagonal::TopLeft,
            QueryOffset::BottomRight if !lengths && dims.query_length == dims.key_length => Diagonal::TopLeft,
            QueryOffset::BottomRight => Diagonal::BottomRight,
            _ => Diagonal::Fixed,
        };
        let stats = match problem.tensor(Role::Lse) {
            _ if problem.pass() == Pass::Backward || has_empty_rows(problem) => Stats::Packed,
            None => Stats::Unwanted,
            Some(desc) => {
                let [b, t, n] = std::array::from_fn(|axis| desc.strides()[axis] as i64);
                Stats::Direct([b, n, t, 1])
            }
        };
        let clean_keys = (0..dims.batch).any(|batch| seen_keys(problem, batch) != (0..dims.key_length));
        let clean_rows = problem.pass() == Pass::Backward && has_empty_rows(problem);
        let strides_of = |role: Role| {
            let desc = problem.tensor(role)?;
            Some(if is_cleaned(role, problem.pass(), clean_keys, clean_rows) {
                dense(&desc.shape())
            } else {
                strides(desc)
            })
        };
        Self {
            pass: problem.pass(),
            element: problem.dtype(),
            dims,
            strides: TENSORS.iter().map(|&role| strides_of(role)).collect(),
            // Up to 9.15.0, backward without lengths is wrong where keys are no multiple of a tile
            // (github.com/NVIDIA/cudnn-frontend/issues/160). Elsewhere lengths that say nothing cost up to 8 %.
            lengths: lengths || (problem.pass() == Pass::Backward && target.version <= [9, 15, 0]),
            diagonal,
            right: right.map(|right| right == 0),
            left: left.is_some(),
            stats,
            clean_keys,
            clean_rows,
        }
    }

    /// Whether the plan works on a copy of this operand.
    pub(crate) fn cleans(&self, role: Role) -> bool {
        is_cleaned(role, self.pass, self.clean_keys, self.clean_rows)
    }

    pub(crate) fn element_type(&self) -> Type {
        if self.element == DType::F16 { Type::Half } else { Type::Bf16 }
    }

    /// The strides of a tensor, in the order batch, head, position, width.
    pub(crate) fn strides_of(&self, role: Role) -> Option<Shape> {
        let index = TENSORS.iter().position(|&tensor| tensor == role)?;
        self.strides[index]
    }
}

/// Whether a row sees no key at all: cuDNN does not promise what it writes there.
pub(crate) fn has_empty_rows(problem: &Problem) -> bool {
    let dims = problem.dims();
    (0..dims.batch).any(|batch| seen_rows(problem, batch) != (0..dims.query_length))
}

/// The rows of a batch row that see a key: they have no gaps, since both ends of what a row sees move by one a row.
pub(crate) fn seen_rows(problem: &Problem, batch: usize) -> std::ops::Range<usize> {
    let rows = 0..problem.query_len(batch);
    let sees = |&row: &usize| !problem.key_range(batch, row).is_empty();
    match (rows.clone().find(sees), rows.clone().rev().find(sees)) {
        (Some(first), Some(last)) => first..last + 1,
        _ => 0..0,
    }
}

/// The keys that any row of a batch row sees.
pub(crate) fn seen_keys(problem: &Problem, batch: usize) -> std::ops::Range<usize> {
    problem.key_range_of_rows(batch, 0..problem.dims().query_length)
}

/// Whatever a masked operand holds must not reach a result, and zero times NaN is NaN: forward, weights of zero meet
/// values; backward, they meet everything.
fn is_cleaned(role: Role, pass: Pass, keys: bool, rows: bool) -> bool {
    match role {
        Role::Value => keys,
        Role::Key => keys && pass == Pass::Backward,
        Role::Query | Role::Out | Role::DOut => rows && pass == Pass::Backward,
        _ => false,
    }
}

/// The strides of `[B, T, N, H]` without gaps, in cuDNN's order of axes.
fn dense(shape: &attention_core::Dims) -> Shape {
    let [t, n, h] = std::array::from_fn(|axis| shape[axis + 1] as i64);
    [t * n * h, h, n * h, 1]
}

/// A tensor's strides in cuDNN's order of axes: batch, head, position, width. Those of axes of size 1 do not matter and
/// become those of a tensor without gaps, so that they make no new key.
fn strides(desc: &attention_core::TensorDesc) -> Shape {
    let (shape, strides) = (desc.shape(), desc.strides());
    let dense = dense(&shape);
    let of = |axis: usize, place: usize| if shape[axis] == 1 { dense[place] } else { strides[axis] as i64 };
    [of(0, 0), of(2, 1), of(1, 2), of(3, 3)]
}

#[cfg(test)]
mod tests {
    use attention_core::{Device, Gradients, TensorDesc};

    use super::*;

    fn problem() -> attention_core::ProblemBuilder {
        let desc = TensorDesc::contiguous(DType::Bf16, [2, 16, 2, 8]);
        Problem::builder(desc, desc, desc).device(Device::Cuda(0))
    }

    fn key(builder: attention_core::ProblemBuilder) -> Key {
        Key::of(&builder.build().expect("valid"), Target::default())
    }

    #[test]
    fn what_calls_may_change_makes_no_new_plan() {
        let lengths = |query: [usize; 2], key: [usize; 2]| {
            problem().query_lengths(&query[..]).key_value_lengths(&key[..])
        };
        assert_eq!(key(lengths([3, 16], [5, 9])), key(lengths([16, 2], [1, 16])));
        assert_eq!(key(problem().scale(0.3)), key(problem().scale(7.0)));
        let window = |left| attention_core::Window { left: Some(left), right: None };
        assert_eq!(key(problem().window(window(3))), key(problem().window(window(20))));
        assert_ne!(key(problem()), key(problem().causal(true)));
        assert_ne!(key(problem()), key(lengths([3, 16], [16, 16])));
    }

    #[test]
    fn strides_of_axes_of_size_1_make_no_new_plan() {
        let of = |batch_stride: isize| {
            let desc =
                TensorDesc::strided(DType::Bf16, [1, 16, 2, 8], [batch_stride, 16, 8, 1]).expect("ranks");
            key(Problem::builder(desc, desc, desc).device(Device::Cuda(0)))
        };
        assert_eq!(of(256), of(8));
    }

    #[test]
    fn keys_that_nobody_sees_and_rows_that_see_nothing_are_known() {
        let desc = |positions| TensorDesc::contiguous(DType::Bf16, [1, positions, 2, 8]);
        let causal = |t, s| {
            Problem::builder(desc(t), desc(s), desc(s))
                .device(Device::Cuda(0))
                .causal(true)
                .build()
                .expect("valid")
        };
        // Four queries against nine keys: those behind the fourth are seen by nobody.
        assert_eq!(seen_keys(&causal(4, 9), 0), 0..4);
        assert!(!has_empty_rows(&causal(4, 9)));
        // Bottom-right with more queries than keys: the first five see nothing.
        let bottom = causal(9, 4).to_builder().query_offset(QueryOffset::BottomRight).build().expect("valid");
        assert_eq!(seen_rows(&bottom, 0), 5..9);
        let all = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
        let key = key(bottom.to_builder().gradients(all));
        assert!(key.clean_rows && !key.clean_keys && key.stats == Stats::Packed);
    }
}
