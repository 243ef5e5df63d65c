//! The key of cached execution plans: what is fixed of a problem when a plan is built, without what each call
//! may change.

use attention_core::{
    Alignment, CallProblem, DType, Dimensions, Pass, Problem, Role, SequenceRows, TensorDesc,
};

use crate::graph::{Shape, Type, packed};
use crate::places::Places;
use crate::seen::{has_lengths, seen_keys, seen_rows};
use crate::slot::Side;
use crate::{CudnnConfig, Target, large, support};

/// How the diagonal of causal masking and windows is aligned: at which key the first row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Diagonal {
    /// Row 0 is at key 0.
    TopLeft,
    /// Row 0 is at the key that each call gives as its offset.
    Fixed,
    /// The last row is at the last key.
    BottomRight,
}

/// Where the logsumexp of a forward pass goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stats {
    /// Nowhere: nothing reads it.
    Unwanted,
    /// To the caller's tensor, which has these strides.
    Direct(Shape),
    /// To scratch, without gaps. Forward, a kernel of this library reads it there; backward, one writes it
    /// there.
    Packed,
}

/// Where the keep mask of dropout comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Drops {
    /// From the library's published stream: a kernel of this library writes the mask as a tensor.
    Published,
    /// From cuDNN's generator, which drops `threshold` of 65536 probabilities.
    Own { threshold: u32 },
}

/// The key of an execution plan in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) pass: Pass,
    pub(crate) element: DType,
    pub(crate) dims: Dimensions,
    pub(crate) places: Places,
    /// The strides of [`support::TENSORS`], in their order, each over batch, head, position and width; `None`
    /// for tensors that the pass does not have. Keys and values in pages have pages for batch rows.
    pub(crate) strides: Vec<Option<Shape>>,
    /// Whether the graph takes lengths.
    pub(crate) lengths: bool,
    pub(crate) diagonal: Diagonal,
    /// Whether there is a right bound: `Some(true)` if rows see no key beyond their position (causal), and
    /// `Some(false)` if each call gives the number of such keys.
    pub(crate) right: Option<bool>,
    /// Whether there is a left bound.
    pub(crate) left: bool,
    pub(crate) stats: Stats,
    /// Whether the plan reads copies in which keys that no row sees are zeros.
    pub(crate) clean_keys: bool,
    /// Whether the plan reads copies in which rows that see no key are zeros.
    pub(crate) clean_rows: bool,
    /// Whether the output and its gradient are copied because their strides differ, which cuDNN does not
    /// take.
    pub(crate) align_rows: bool,
    /// The tensor that is added to the logits.
    pub(crate) bias: Option<Bias>,
    /// Whether the graph computes ALiBi; if not, ALiBi is a part of the bias.
    pub(crate) slopes: bool,
    /// Whether the graph adds sinks to the row sums. In backward the logsumexp already has them.
    pub(crate) sinks: bool,
    pub(crate) dropout: Option<Drops>,
}

/// A tensor that is added to the logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Bias {
    /// Whether a kernel makes it of the call's mask, bias and slopes, instead of the caller's bias being read
    /// without a copy.
    pub(crate) made: bool,
    pub(crate) element: Type,
    /// Each axis has the size of the logits' axis, or 1.
    pub(crate) shape: Shape,
    pub(crate) strides: Shape,
}

impl Bias {
    /// The bias of a problem's graph; `slopes` says whether ALiBi is a part of it, `finite` whether the
    /// caller promised that the problem's bias is finite.
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
        // cuDNN 9.19 misreads a bias that is broadcast over the keys and, in backward, one that is broadcast
        // over the rows.
        shape[3] = dims.key_length as i64;
        if problem.pass() == Pass::Backward {
            shape[2] = dims.query_length as i64;
        }
        // The number that stands for -inf (`MASKED` of launch.rs) is too large for f16.
        let narrow =
            problem.dtype() == DType::Bf16 && !slopes && bias.is_none_or(|bias| bias.dtype() == DType::Bf16);
        let element = if narrow { Type::Bf16 } else { Type::Float };
        // Rows begin at multiples of 16 bytes, which cuDNN requires.
        let row = dims.key_length.next_multiple_of(8) as i64;
        let strides = [shape[1] * shape[2] * row, shape[2] * row, row, 1];
        Some(Self { made: true, element, shape, strides })
    }

    /// The shape of the flags of rows that see a key: one byte per batch row, head and row, with one head if
    /// all heads have the same bias.
    pub(crate) fn seen_rows(&self, dims: Dimensions) -> [usize; 3] {
        let heads = if self.shape[1] == 1 { 1 } else { dims.query_heads };
        [dims.batch, heads, dims.query_length]
    }

    /// The shape of the flags of keys that any row sees: one byte per batch row, key/value head and key, with
    /// one head if all heads have the same bias, in rows as long as those of the bias.
    pub(crate) fn seen_keys(&self, dims: Dimensions) -> [usize; 3] {
        let heads = if self.shape[1] == 1 { 1 } else { dims.key_heads };
        [dims.batch, heads, self.strides[2] as usize]
    }
}

/// Whether the biases of ALiBi may differ between batch rows.
fn slopes_differ(problem: &Problem) -> bool {
    let slopes = problem.tensor(Role::AlibiSlopes).is_some_and(|slopes| slopes.rank() == 2);
    let offsets = match problem.alignment() {
        Alignment::TopLeft | Alignment::Offset(_) => false,
        Alignment::BottomRight => has_lengths(problem),
        _ => true,
    };
    slopes || offsets
}

/// The strides of a bias that cuDNN can read without a copy: one that is not broadcast over rows or keys, in
/// a dtype and with strides that cuDNN takes. `None` if it cannot.
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

/// How many keys rows see beyond their position: 0 with causal masking, `None` without a bound.
pub(crate) fn right_bound(problem: &Problem) -> Option<usize> {
    let window = problem.window().right;
    if problem.causal() { Some(0) } else { window }
}

impl Key {
    /// The key of a problem's plan on this target.
    pub(crate) fn of(problem: &Problem, target: Target, config: &CudnnConfig) -> Self {
        let dims = problem.dims();
        let places = Places::of(problem);
        let lengths = has_lengths(problem);
        let (right, left) = (right_bound(problem), problem.window().left);
        let diagonal = match problem.alignment() {
            _ if right.is_none() && left.is_none() => Diagonal::TopLeft,
            Alignment::TopLeft => Diagonal::TopLeft,
            Alignment::BottomRight if !lengths && dims.query_length == dims.key_length => Diagonal::TopLeft,
            Alignment::BottomRight => Diagonal::BottomRight,
            _ => Diagonal::Fixed,
        };
        let has_slopes = problem.has(Role::AlibiSlopes);
        // cuDNN 9.19 computes ALiBi correctly if every key is at or before its row and the slopes are the
        // same for every batch row. Otherwise its results are wrong, without an error.
        let plain = right == Some(0) && left.is_none() && diagonal == Diagonal::TopLeft;
        let made_slopes = has_slopes && (!plain || slopes_differ(problem));
        let bias = Bias::of(problem, made_slopes, config.finite_bias);
        let made = bias.is_some_and(|bias| bias.made);
        let stats = match problem.tensor(Role::Lse) {
            _ if problem.pass() == Pass::Backward || has_empty_rows(problem) => Stats::Packed,
            // A mask or a bias may leave a row without a key.
            _ if made => Stats::Packed,
            // The logsumexp says which rows are recomputed.
            _ if large::may_be_large(problem) => Stats::Packed,
            None => Stats::Unwanted,
            Some(desc) => {
                let [b, t, n] = std::array::from_fn(|axis| desc.strides()[axis] as i64);
                Stats::Direct([b, n, t, 1])
            }
        };
        // A row that one sequence must not see may be one that another sees, if rows are packed or in pages.
        // So none is replaced there; `NanIsolation` checks all results instead.
        let clean_keys = places.is_dense() && (made || has_unseen_keys(problem));
        let of = |role: Role| problem.tensor(role).map(|desc| desc.strides());
        let clean_rows =
            places.is_dense() && problem.pass() == Pass::Backward && (made || has_empty_rows(problem));
        let align_rows = problem.pass() == Pass::Backward && of(Role::Out) != of(Role::DOut);
        let strides_of = |role: Role| {
            let desc = problem.tensor(role)?;
            let of = if is_cleaned(role, problem.pass(), clean_keys, made, clean_rows, align_rows) {
                dense(&desc.shape())
            } else {
                strides(desc)
            };
            let longest = match Side::of(role) {
                side if !places.packs(side) => return Some(of),
                Side::Queries => dims.query_length,
                Side::Keys => dims.key_length,
            };
            // The batch stride would be that of all rows, of which calls have different numbers. cuDNN reads
            // where sequences begin instead.
            let [_, head, position, width] = of;
            Some([position.saturating_mul(longest as i64), head, position, width])
        };
        Self {
            pass: problem.pass(),
            element: problem.dtype(),
            dims,
            places,
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
            dropout: problem.drop_threshold().filter(|&dropped| dropped > 0).map(|threshold| {
                if config.own_dropout { Drops::Own { threshold } } else { Drops::Published }
            }),
        }
    }

    /// Whether a kernel of this library writes the keep mask of dropout.
    pub(crate) fn writes_kept(&self) -> bool {
        self.dropout == Some(Drops::Published)
    }

    /// The strides of the keep mask of dropout, whose rows begin at multiples of 16 bytes.
    pub(crate) fn kept_strides(&self) -> Shape {
        let dims = self.dims;
        let row = dims.key_length.next_multiple_of(8) as i64;
        let [n, t] = [dims.query_heads, dims.query_length].map(|size| size as i64);
        [n * t * row, t * row, row, 1]
    }

    /// Whether a kernel makes one bias tensor of mask, bias and slopes.
    pub(crate) fn makes_bias(&self) -> bool {
        self.bias.is_some_and(|bias| bias.made)
    }

    /// Whether the plan reads a copy of this operand.
    pub(crate) fn cleans(&self, role: Role) -> bool {
        is_cleaned(role, self.pass, self.clean_keys, self.makes_bias(), self.clean_rows, self.align_rows)
    }

    /// Whether a call needs no copy of this operand if all its rows see a key and all its keys are seen. This
    /// is so if that depends on the call's offset only, and if the operand has the strides of the copy.
    pub(crate) fn may_skip_copy(&self, role: Role, desc: &TensorDesc) -> bool {
        let decided_by_offset = !self.lengths && !self.makes_bias();
        let is_aligned = self.align_rows && matches!(role, Role::Out | Role::DOut);
        decided_by_offset && !is_aligned && self.strides_of(role) == Some(strides(desc))
    }

    pub(crate) fn element_type(&self) -> Type {
        element_type(self.element)
    }

    /// How far rows are apart, in elements, in the packed tensors of this side, scratch included; in order
    /// and each number once.
    pub(crate) fn ragged_rows(&self, side: Side) -> Vec<i64> {
        if !self.places.packs(side) {
            return Vec::new();
        }
        let backward = self.pass == Pass::Backward;
        let of_calls = support::TENSORS.iter().filter(|&&role| Side::of(role) == side);
        let mut rows: Vec<i64> =
            of_calls.filter_map(|&role| self.strides_of(role)).map(|[_, _, position, _]| position).collect();
        let [heads, key_heads] = [self.dims.query_heads, self.dims.key_heads].map(|heads| heads as i64);
        let [width, value_width] = [self.dims.head_dim, self.dims.value_head_dim].map(|width| width as i64);
        match side {
            // The logsumexp and row sums; in backward the gradient of queries in f32.
            Side::Queries => {
                rows.push(heads);
                rows.extend(backward.then_some(heads * width));
            }
            // Gradients that the call does not ask for are in scratch. So there are at most four numbers.
            Side::Keys if backward => {
                let scratch = [(Role::DKey, width), (Role::DValue, value_width)];
                let scratch = scratch.into_iter().filter(|&(role, _)| self.strides_of(role).is_none());
                rows.extend(scratch.map(|(_, width)| key_heads * width));
            }
            Side::Keys => {}
        }
        rows.sort_unstable();
        rows.dedup();
        rows
    }

    /// The strides of the tensor of this role, in the order batch, head, position, width.
    pub(crate) fn strides_of(&self, role: Role) -> Option<Shape> {
        let index = support::TENSORS.iter().position(|&tensor| tensor == role)?;
        self.strides[index]
    }
}

/// The operands that may be copied to scratch.
pub(crate) const CLEANED: [Role; 5] = [Role::Query, Role::Key, Role::Value, Role::Out, Role::DOut];

/// The sequence that each batch row of every call of a problem has by structure; `None` if calls may differ.
fn sequence_of_calls(problem: &Problem) -> Option<SequenceRows> {
    let is_structured = right_bound(problem).is_some() || problem.window().left.is_some();
    let varies = match problem.alignment() {
        _ if has_lengths(problem) => true,
        Alignment::TopLeft | Alignment::BottomRight => false,
        _ => is_structured,
    };
    // All batch rows are alike here, so the first one stands for them.
    (!varies).then(|| CallProblem::at_bounds(problem).sequence(0))
}

/// Whether a row may see no key at all, for which cuDNN does not say what it writes.
pub(crate) fn has_empty_rows(problem: &Problem) -> bool {
    sequence_of_calls(problem).is_none_or(|sequence| seen_rows(&sequence) != (0..problem.dims().query_length))
}

/// Whether there may be keys that no row sees.
fn has_unseen_keys(problem: &Problem) -> bool {
    sequence_of_calls(problem).is_none_or(|sequence| seen_keys(&sequence) != (0..problem.dims().key_length))
}

/// Whether in each sequence of every call either all rows see a key or none does.
pub(crate) fn sees_all_or_nothing(problem: &Problem) -> bool {
    let window = problem.window();
    let keys_vary = problem.has(Role::KeyValueLengths) || Places::of(problem).packed_keys;
    match sequence_of_calls(problem) {
        Some(sequence) => {
            matches!(seen_rows(&sequence), rows if rows.is_empty() || rows == (0..sequence.queries()))
        }
        None if right_bound(problem).is_none() && window.left.is_none() => true,
        // Row t is at key t. It sees the first key at least, unless that is more than the left bound behind
        // it.
        None => {
            let dims = problem.dims();
            let reaches =
                |left: usize| !keys_vary && dims.query_length <= dims.key_length.saturating_add(left);
            match problem.alignment() {
                Alignment::TopLeft => window.left.is_none_or(reaches),
                // The key at each row's position exists.
                Alignment::BottomRight => !keys_vary && dims.query_length <= dims.key_length,
                _ => false,
            }
        }
    }
}

/// Whether the plan reads a copy of an operand in which masked rows are zeros. NaN at masked positions must
/// not reach a result, but zero times NaN is NaN, and so is NaN plus anything. Forward, cuDNN multiplies
/// values by weights of zero and adds the bias to products with keys; backward, it does so with every
/// operand.
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

/// A tensor's strides in cuDNN's order of axes: batch, head, position, width. The strides of axes of size 1
/// do not matter; they are replaced by those of a tensor without gaps, so that they do not make a new key.
fn strides(desc: &TensorDesc) -> Shape {
    let (shape, strides) = (desc.shape(), desc.strides());
    let dense = dense(&shape);
    let of = |axis: usize, place: usize| if shape[axis] == 1 { dense[place] } else { strides[axis] as i64 };
    [of(0, 0), of(2, 1), of(1, 2), of(3, 3)]
}

#[cfg(test)]
mod tests {
    use attention_core::{CallProblem, Device, Gradients, OffsetRange, TensorDesc};

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
        let lengths = || problem().query_lengths(DType::I32).key_value_lengths(DType::I32);
        let in_host_memory = |role| lengths().in_host_memory(role, true);
        assert_eq!(key(lengths()), key(in_host_memory(Role::QueryLengths)));
        assert_eq!(key(lengths()), key(problem().query_lengths(DType::I64).key_value_lengths(DType::U32)));
        let window = |left| attention_core::Window { left: Some(left), right: None };
        assert_eq!(key(problem().window(window(3))), key(problem().window(window(20))));
        assert_ne!(key(problem()), key(problem().causal(true)));
        assert_ne!(key(problem()), key(lengths()));
        let near = Alignment::Offset(OffsetRange::Near);
        assert_ne!(key(problem().causal(true)), key(problem().causal(true).alignment(near)));
    }

    /// Packed queries and keys of this many rows, in sequences of at most 16.
    fn packed_rows(queries: usize, keys: usize) -> attention_core::ProblemBuilder {
        let desc = |rows: usize| TensorDesc::contiguous(DType::Bf16, [rows, 2, 16]);
        let problem = Problem::builder(desc(queries), desc(keys), desc(keys)).device(Device::Cuda(0));
        problem.packed_queries(3, DType::I32).packed_keys(3, DType::I32).longest(16, 16)
    }

    #[test]
    fn the_number_of_packed_rows_makes_no_new_plan() {
        assert_eq!(key(packed_rows(20, 30)), key(packed_rows(40, 33)));
        let backward = |queries, keys| key(packed_rows(queries, keys).gradients(Gradients::QKV));
        assert_eq!(backward(20, 30), backward(40, 33));
        assert_ne!(key(packed_rows(20, 30)), key(packed_rows(20, 30).longest(17, 16)));
        // Of starts in host memory and of used keys, neither is a part of a graph.
        let in_host_memory = packed_rows(20, 30).in_host_memory(Role::QueryStarts, true);
        assert_eq!(key(packed_rows(20, 30)), key(in_host_memory));
        assert_eq!(key(packed_rows(20, 30)), key(packed_rows(20, 30).key_value_lengths(DType::I64)));
    }

    /// One array of offsets serves all tensors whose rows are as far apart.
    #[test]
    fn ragged_offsets_are_those_of_each_row_stride() {
        let of = |builder| {
            let key = key(builder);
            [Side::Queries, Side::Keys].map(|side| key.ragged_rows(side))
        };
        assert_eq!(of(packed_rows(20, 30)), [vec![2, 32], vec![32]]);
        assert_eq!(of(packed_rows(20, 30).gradients(Gradients::KEY)), [vec![2, 32], vec![32]]);
        assert_eq!(of(problem().key_value_lengths(DType::I32)), [Vec::<i64>::new(), Vec::new()]);
        // Tensors of one that has queries, keys and values of two heads each.
        let fused = |rows| TensorDesc::strided(DType::Bf16, [rows, 2, 16], [96, 16, 1]).expect("ranks");
        let fused = |builder: attention_core::ProblemBuilder| {
            let roles = [(Role::Query, 20), (Role::Key, 30), (Role::Value, 30)];
            roles.into_iter().fold(builder, |builder, (role, rows)| builder.layout(role, fused(rows)))
        };
        assert_eq!(of(fused(packed_rows(20, 30))), [vec![2, 32, 96], vec![96]]);
        assert_eq!(of(fused(packed_rows(20, 30)).gradients(Gradients::QKV)), [vec![2, 32, 96], vec![32, 96]]);
        // A number of its own for each tensor: as many as the kernel has arrays for.
        let padded = |row: isize| {
            move |rows| TensorDesc::strided(DType::Bf16, [rows, 2, 16], [row, 16, 1]).expect("ranks")
        };
        let roles = [
            (Role::Query, 20),
            (Role::Key, 30),
            (Role::Value, 30),
            (Role::DQuery, 20),
            (Role::DKey, 30),
            (Role::DValue, 30),
        ];
        let gradients = packed_rows(20, 30).gradients(Gradients::QKV);
        let all = (roles.into_iter().zip(5..))
            .fold(gradients, |builder, ((role, rows), index)| builder.layout(role, padded(8 * index)(rows)));
        assert_eq!(of(all), [vec![2, 32, 40, 64], vec![48, 56, 72, 80]]);
        let one = (roles[..3].iter().zip(5..))
            .fold(packed_rows(20, 30).gradients(Gradients::QUERY), |builder, (&(role, rows), index)| {
                builder.layout(role, padded(8 * index)(rows))
            });
        assert_eq!(of(one), [vec![2, 32, 40], vec![32, 48, 56]]);
    }

    #[test]
    fn packed_rows_and_pages_are_not_copied() {
        let pages = TensorDesc::contiguous(DType::Bf16, [8, 4, 2, 16]);
        let query = TensorDesc::contiguous(DType::Bf16, [3, 1, 2, 16]);
        let paged = Problem::builder(query, pages, pages)
            .device(Device::Cuda(0))
            .paged(3, 5, DType::I32)
            .key_value_lengths(DType::I32);
        let backward = packed_rows(20, 30).causal(true).gradients(Gradients::QKV);
        for builder in [packed_rows(20, 30), backward, paged.longest(None, 18)] {
            let key = key(builder);
            assert!(CLEANED.into_iter().all(|role| !key.cleans(role)), "{key:?}");
            assert!(key.lengths && key.stats == Stats::Packed);
            assert!(key.places.pages.is_none_or(|pages| (pages.count, pages.size, pages.most) == (8, 4, 5)));
        }
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
    fn keys_that_no_row_sees_and_rows_that_see_no_key_are_known() {
        let desc = |positions| TensorDesc::contiguous(DType::Bf16, [1, positions, 2, 8]);
        let causal = |t, s| {
            Problem::builder(desc(t), desc(s), desc(s))
                .device(Device::Cuda(0))
                .causal(true)
                .build()
                .expect("valid")
        };
        // Four queries and nine keys: no row sees the keys after the fourth.
        let sequence = |problem: &Problem| CallProblem::at_bounds(problem).sequence(0);
        assert_eq!(seen_keys(&sequence(&causal(4, 9))), 0..4);
        assert!(!has_empty_rows(&causal(4, 9)));
        // Bottom-right with more queries than keys: the first five rows see no key.
        let bottom = causal(9, 4).to_builder().alignment(Alignment::BottomRight).build().expect("valid");
        assert_eq!(seen_rows(&sequence(&bottom)), 5..9);
        let all = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
        let key = key(bottom.to_builder().gradients(all));
        assert!(key.clean_rows && !key.clean_keys && key.stats == Stats::Packed);
    }

    /// A plan serves calls with any lengths and, under causal masking or a window, with any offset.
    #[test]
    fn what_calls_may_leave_a_row_or_a_key_is_assumed() {
        type Build = fn(attention_core::ProblemBuilder) -> attention_core::ProblemBuilder;
        let cases: [(Build, bool); 7] = [
            (|builder| builder, false),
            (|builder| builder.causal(true), false),
            (|builder| builder.alignment(Alignment::Offset(OffsetRange::Near)), false),
            (|builder| builder.causal(true).alignment(Alignment::Offset(OffsetRange::Near)), true),
            (|builder| builder.query_lengths(DType::I32), true),
            (|builder| builder.key_value_lengths(DType::I64), true),
            (|builder| builder.causal(true).alignment(Alignment::BottomRight), false),
        ];
        for (build, assumed) in cases {
            let problem = build(problem()).build().expect("valid");
            assert_eq!(has_empty_rows(&problem), assumed, "{problem}");
            assert_eq!(has_unseen_keys(&problem), assumed, "{problem}");
        }
    }

    #[test]
    fn copies_are_left_out_where_an_offset_alone_asks_for_them_and_operands_lie_as_they_would() {
        let gap = TensorDesc::strided(DType::Bf16, [2, 16, 2, 8], [512, 16, 8, 1]).expect("ranks");
        let shifted = |value: TensorDesc| {
            let desc = TensorDesc::contiguous(DType::Bf16, [2, 16, 2, 8]);
            let problem = Problem::builder(desc, desc, value).device(Device::Cuda(0)).causal(true);
            problem.alignment(Alignment::Offset(OffsetRange::Near))
        };
        let skips = |builder: attention_core::ProblemBuilder, role: Role| {
            let (key, problem) = (key(builder.clone()), builder.build().expect("valid"));
            assert!(key.cleans(role), "{role} of {problem}");
            key.may_skip_copy(role, problem.tensor(role).expect("given"))
        };
        let dense = || shifted(TensorDesc::contiguous(DType::Bf16, [2, 16, 2, 8]));
        assert!(skips(dense(), Role::Value) && !skips(shifted(gap), Role::Value));
        assert!(!skips(dense().key_value_lengths(DType::I32), Role::Value));
        let mask = TensorDesc::contiguous(DType::Bool, [1, 1, 16, 16]);
        assert!(!skips(dense().mask(mask), Role::Value));
        let backward = || dense().gradients(Gradients::QKV);
        assert!(
            [Role::Query, Role::Key, Role::Out, Role::DOut].map(|role| skips(backward(), role)) == [true; 4]
        );
        let apart = || backward().layout(Role::DOut, gap);
        assert!(!skips(apart(), Role::Out) && skips(apart(), Role::Query));
    }

    /// Compares the answer with every call of small problems.
    #[test]
    fn sequences_that_see_all_or_nothing_are_those_whose_calls_do() {
        use attention_core::{CallData, QueryOffset, View, Window};
        const MOST: usize = 4;
        let desc = TensorDesc::contiguous(DType::Bf16, [1, MOST, 1, 8]);
        let bounds = [None, Some(0), Some(2), Some(9)];
        let windows = bounds.iter().flat_map(|&left| bounds.map(|right| Window { left, right }));
        let offsets: [&[QueryOffset]; 3] = [
            &[QueryOffset::TOP_LEFT],
            &[QueryOffset::BottomRight],
            &[-5, -1, 1, 4, 5].map(QueryOffset::Fixed),
        ];
        let mut claimed = 0;
        for (window, offsets) in windows.flat_map(|window| offsets.map(|offsets| (window, offsets))) {
            for (has_queries, has_keys) in [(false, false), (true, false), (false, true), (true, true)] {
                let numbers: Vec<[i32; 1]> = (0..=MOST as i32).map(|length| [length]).collect();
                let lengths = |given: bool| -> Vec<Option<View<'_>>> {
                    let views = numbers.iter().map(|length| View::from_slice(length, [1]).ok());
                    if given { views.collect() } else { vec![None] }
                };
                let (mut claim, mut holds) = (None, true);
                for &query_offset in offsets {
                    for query_lengths in lengths(has_queries) {
                        for key_value_lengths in lengths(has_keys) {
                            let data = CallData {
                                query_offset,
                                query_lengths,
                                key_value_lengths,
                                ..CallData::default()
                            };
                            let builder = Problem::builder(desc, desc, desc).window(window).data(&data);
                            let problem = builder.build().expect("valid");
                            let call = CallProblem::new(&problem, &data).expect("valid").sequence(0);
                            let rows = seen_rows(&call);
                            holds &= rows.is_empty() || rows == (0..call.queries());
                            assert_eq!(
                                *claim.get_or_insert(sees_all_or_nothing(&problem)),
                                sees_all_or_nothing(&problem)
                            );
                        }
                    }
                }
                let claim = claim.expect("a call");
                assert!(!claim || holds, "{window:?} {offsets:?} {has_queries} {has_keys}");
                claimed += usize::from(claim);
            }
        }
        assert!(claimed > 30, "{claimed}");
    }
}
