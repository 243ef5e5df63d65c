//! What plans are kept by: a problem without what each call may change.

use attention_core::{DType, Dimensions, Pass, Problem, QueryOffset, Role, TensorDesc};

use crate::graph::{Shape, Type, packed};
use crate::{CudnnConfig, Target, large, support};

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

/// Where the keep bits of dropout come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Drops {
    /// The published stream: a kernel of ours writes them as a tensor.
    Published,
    /// cuDNN's generator, which drops `threshold` of 65536.
    Own { threshold: u32 },
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
    /// Whether output and its gradient are copied because their strides differ, which cuDNN does not take.
    pub(crate) align_rows: bool,
    /// What is added to the logits.
    pub(crate) bias: Option<Bias>,
    /// Whether ALiBi is in the graph; else it goes into the bias.
    pub(crate) slopes: bool,
    /// Whether sinks join the sums: in backward the logsumexp has them already.
    pub(crate) sinks: bool,
    pub(crate) dropout: Option<Drops>,
}

/// A tensor that is added to the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Bias {
    /// Whether it is made of mask and bias first, instead of being the caller's.
    pub(crate) made: bool,
    pub(crate) element: Type,
    /// Each axis full or 1.
    pub(crate) shape: Shape,
    pub(crate) strides: Shape,
}

impl Bias {
    /// Of a problem with a mask, a bias, or slopes of ALiBi that go into it.
    fn of(problem: &Problem, slopes: bool, finite: bool) -> Option<Self> {
        let dims = problem.dims();
        let (mask, bias) = (problem.tensor(Role::Mask), problem.tensor(Role::Bias));
        let shape = |desc: &TensorDesc| -> Shape { std::array::from_fn(|axis| desc.shape()[axis] as i64) };
        let distances = slopes.then(|| {
            let batch = if slopes_differ(problem) { dims.batch } else { 1 };
            [batch, dims.query_heads, dims.query_length, 1].map(|axis| axis as i64)
        });
        let shapes = [mask.map(shape), bias.map(shape), distances].into_iter().flatten();
        let mut shape = shapes.reduce(|one, other| std::array::from_fn(|axis| one[axis].max(other[axis])))?;
        if let (None, Some(bias), false, true) = (mask, bias, slopes, finite)
            && let Some(strides) = direct_strides(problem, bias)
        {
            return Some(Self { made: false, element: element_type(bias.dtype()), shape, strides });
        }
        // cuDNN 9.19 misreads what is broadcast over the keys, and in backward what is broadcast over the rows.
        shape[3] = dims.key_length as i64;
        if problem.pass() == Pass::Backward {
            shape[2] = dims.query_length as i64;
        }
        // What stands for -inf is too large for f16.
        let narrow =
            problem.dtype() == DType::Bf16 && !slopes && bias.is_none_or(|bias| bias.dtype() == DType::Bf16);
        let element = if narrow { Type::Bf16 } else { Type::Float };
        // Rows begin at multiples of 16 bytes.
        let row = dims.key_length.next_multiple_of(8) as i64;
        let strides = [shape[1] * shape[2] * row, shape[2] * row, row, 1];
        Some(Self { made: true, element, shape, strides })
    }

    /// Which rows it leaves a key: a byte for each batch row, head and row, or for one head where all have the same bias.
    pub(crate) fn seen_rows(&self, dims: Dimensions) -> [usize; 3] {
        let heads = if self.shape[1] == 1 { 1 } else { dims.query_heads };
        [dims.batch, heads, dims.query_length]
    }

    /// Which keys it leaves to any row: likewise, by key/value head, in rows as long as the bias's.
    pub(crate) fn seen_keys(&self, dims: Dimensions) -> [usize; 3] {
        let heads = if self.shape[1] == 1 { 1 } else { dims.key_heads };
        [dims.batch, heads, self.strides[2] as usize]
    }
}

/// Whether ALiBi's terms are not the same for every batch row.
fn slopes_differ(problem: &Problem) -> bool {
    let slopes = problem.tensor(Role::AlibiSlopes).is_some_and(|slopes| slopes.rank() == 2);
    slopes || (1..problem.dims().batch).any(|batch| problem.offset(batch) != problem.offset(0))
}

/// The strides of a bias that cuDNN reads as it lies: whole rows and columns, in a dtype that it takes.
fn direct_strides(problem: &Problem, bias: &TensorDesc) -> Option<Shape> {
    let dims = problem.dims();
    let whole = bias.shape()[2] == dims.query_length && bias.shape()[3] == dims.key_length;
    if !whole || bias.dtype() != DType::F32 && bias.dtype() != problem.dtype() {
        return None;
    }
    let shape: Shape = std::array::from_fn(|axis| bias.shape()[axis] as i64);
    let dense = packed(shape);
    let strides: Shape =
        std::array::from_fn(|axis| if shape[axis] == 1 { dense[axis] } else { bias.strides()[axis] as i64 });
    let aligned = (0..3).all(|axis| shape[axis] == 1 || (strides[axis] > 0 && strides[axis] % 8 == 0));
    (aligned && strides[3] == 1).then_some(strides)
}

fn element_type(dtype: DType) -> Type {
    match dtype {
        DType::F16 => Type::Half,
        DType::Bf16 => Type::Bf16,
        _ => Type::Float,
    }
}

/// The keys that rows see beyond their position: none, where causal.
pub(crate) fn right_bound(problem: &Problem) -> Option<usize> {
    let window = problem.window().right;
    if problem.causal() { Some(0) } else { window }
}

impl Key {
    pub(crate) fn of(problem: &Problem, target: Target, config: &CudnnConfig) -> Self {
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
        let has_slopes = problem.has(Role::AlibiSlopes);
        // cuDNN 9.19 is right about ALiBi where every key is behind its row, for slopes that are the same for every batch
        // row; about others it is silently wrong.
        let plain = right == Some(0) && left.is_none() && diagonal == Diagonal::TopLeft;
        let made_slopes = has_slopes && (!plain || slopes_differ(problem));
        let bias = Bias::of(problem, made_slopes, config.finite_bias);
        let made = bias.is_some_and(|bias| bias.made);
        let stats = match problem.tensor(Role::Lse) {
            _ if problem.pass() == Pass::Backward || has_empty_rows(problem) => Stats::Packed,
            // A mask or a bias may leave a row nothing.
            _ if made => Stats::Packed,
            // It says which rows are computed once more.
            _ if large::may_be_large(problem) => Stats::Packed,
            None => Stats::Unwanted,
            Some(desc) => {
                let [b, t, n] = std::array::from_fn(|axis| desc.strides()[axis] as i64);
                Stats::Direct([b, n, t, 1])
            }
        };
        let clean_keys =
            made || (0..dims.batch).any(|batch| seen_keys(problem, batch) != (0..dims.key_length));
        let of = |role: Role| problem.tensor(role).map(|desc| desc.strides());
        let clean_rows = problem.pass() == Pass::Backward && (made || has_empty_rows(problem));
        let align_rows = problem.pass() == Pass::Backward && of(Role::Out) != of(Role::DOut);
        let strides_of = |role: Role| {
            let desc = problem.tensor(role)?;
            Some(if is_cleaned(role, problem.pass(), clean_keys, made, clean_rows, align_rows) {
                dense(&desc.shape())
            } else {
                strides(desc)
            })
        };
        Self {
            pass: problem.pass(),
            element: problem.dtype(),
            dims,
            strides: support::TENSORS.iter().map(|&role| strides_of(role)).collect(),
            lengths: lengths || support::wants_lengths(target, problem),
            diagonal,
            right: right.map(|right| right == 0),
            left: left.is_some(),
            stats,
            clean_keys,
            clean_rows,
            align_rows,
            bias,
            slopes: has_slopes && !made_slopes,
            sinks: problem.has(Role::Sinks) && problem.pass() == Pass::Forward,
            // A rate of 0 drops nothing.
            dropout: problem
                .dropout_stream()
                .map(|stream| stream.threshold())
                .filter(|&dropped| dropped > 0)
                .map(
                    |threshold| if config.own_dropout { Drops::Own { threshold } } else { Drops::Published },
                ),
        }
    }

    /// Whether a kernel of ours writes the keep bits.
    pub(crate) fn writes_kept(&self) -> bool {
        self.dropout == Some(Drops::Published)
    }

    /// Strides of the mask of dropout, whose rows begin at multiples of 16 bytes.
    pub(crate) fn kept_strides(&self) -> Shape {
        let dims = self.dims;
        let row = dims.key_length.next_multiple_of(8) as i64;
        let [n, t] = [dims.query_heads, dims.query_length].map(|size| size as i64);
        [n * t * row, t * row, row, 1]
    }

    /// Whether mask, bias and slopes are made one tensor first.
    pub(crate) fn makes_bias(&self) -> bool {
        self.bias.is_some_and(|bias| bias.made)
    }

    /// Whether the plan works on a copy of this operand.
    pub(crate) fn cleans(&self, role: Role) -> bool {
        is_cleaned(role, self.pass, self.clean_keys, self.makes_bias(), self.clean_rows, self.align_rows)
    }

    pub(crate) fn element_type(&self) -> Type {
        element_type(self.element)
    }

    /// The strides of a tensor, in the order batch, head, position, width.
    pub(crate) fn strides_of(&self, role: Role) -> Option<Shape> {
        let index = support::TENSORS.iter().position(|&tensor| tensor == role)?;
        self.strides[index]
    }
}

/// The operands that may be copied to scratch.
pub(crate) const CLEANED: [Role; 5] = [Role::Query, Role::Key, Role::Value, Role::Out, Role::DOut];

/// First row and end of the rows that see a key, for each batch row.
pub(crate) fn row_intervals(problem: &Problem) -> Vec<i32> {
    (0..problem.dims().batch)
        .flat_map(|batch| {
            let rows = seen_rows(problem, batch);
            [rows.start as i32, rows.end as i32]
        })
        .collect()
}

/// First key and end of the keys that any row sees, for each batch row.
pub(crate) fn key_intervals(problem: &Problem) -> Vec<i32> {
    (0..problem.dims().batch)
        .flat_map(|batch| {
            let keys = seen_keys(problem, batch);
            [keys.start as i32, keys.end as i32]
        })
        .collect()
}

/// Where row 0 of each batch row stands among the keys.
pub(crate) fn positions(problem: &Problem) -> Vec<i32> {
    (0..problem.dims().batch).map(|batch| problem.offset(batch) as i32).collect()
}

/// Query lengths, then key lengths.
pub(crate) fn lengths(problem: &Problem) -> Vec<i32> {
    let batch = problem.dims().batch;
    let query = (0..batch).map(|batch| problem.query_len(batch) as i32);
    query.chain((0..batch).map(|batch| problem.key_value_len(batch) as i32)).collect()
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

/// Whatever a masked operand holds must not reach a result, and zero times NaN is NaN, and so is NaN plus anything: forward,
/// weights of zero meet values, and a bias meets products with keys; backward, they meet everything.
fn is_cleaned(role: Role, pass: Pass, keys: bool, made: bool, rows: bool, align: bool) -> bool {
    match role {
        Role::Value => keys,
        Role::Key => keys && (made || pass == Pass::Backward),
        Role::Query => rows && pass == Pass::Backward,
        Role::Out | Role::DOut => (rows || align) && pass == Pass::Backward,
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
fn strides(desc: &TensorDesc) -> Shape {
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
        Key::of(&builder.build().expect("valid"), Target::default(), &CudnnConfig::default())
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
