//! What a call does to products on their way to logits, and to weights behind them.

use std::ops::Range;

use attention_core::{CallProblem, DType, DropoutStream, HostView, Inputs, Problem};

use crate::float::Float;
use crate::simd::Base;
use crate::tensor::Floats;

/// A query row: its head and query, and the keys that structure lets it see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryRow {
    pub(crate) batch: usize,
    pub(crate) head: usize,
    pub(crate) query: usize,
    pub(crate) begin: usize,
    pub(crate) end: usize,
}

/// What turns products into logits, read from the call once.
#[derive(Clone)]
pub(crate) struct Terms<'a, F> {
    pub(super) problem: &'a CallProblem<'a>,
    query_factor: F,
    /// Not negative: packed queries have the sign.
    pub(super) scale: F,
    pub(super) unit: F,
    pub(super) base: Base<F>,
    pub(super) is_plain: bool,
    pub(super) softcap: Option<F>,
    pub(super) slopes: Option<Floats<'a>>,
    pub(super) slopes_per_batch: bool,
    pub(super) bias: Option<(Floats<'a>, [usize; 4])>,
    /// Whether a bias is rounded to f32, the precision of the logits by contract, although f64 computes them.
    pub(super) narrows_bias: bool,
    pub(super) mask: Option<(HostView<'a, u8>, [usize; 4])>,
    pub(super) dropout: Option<DropoutStream>,
    pub(super) gradient_scale: (F, F),
}

/// What a scale says about queries, products and logits.
struct Scaling<F> {
    query_factor: F,
    scale: F,
    unit: F,
    base: Base<F>,
    is_plain: bool,
}

impl<F: Float> Scaling<F> {
    /// Of a scale, for queries that are multiplied by a power of two besides.
    fn new(problem: &CallProblem<'_>, nothing_added: bool, power: f64, scale: f64) -> Self {
        let magnitude = scale.abs();
        // A scale of zero would make NaN of the -inf of a masked product, and one above the ordinary ones
        // cannot go to base two. Below them, a difference of two products may overflow whose weight is not
        // negligible.
        let ordinary = Problem::ordinary_scales(problem.dtype().accumulator());
        let is_plain = nothing_added && ordinary.contains(&magnitude);
        // Of the scale of a call this is the number itself; with that of keys it may be larger.
        let rounded = F::from_f64(magnitude);
        let rounded = if rounded > F::LARGEST { F::LARGEST } else { rounded };
        let unit = if is_plain { rounded } else { F::ONE };
        let query_factor = F::from_f64(if scale < 0.0 { -power } else { power });
        Self { query_factor, scale: rounded, unit, base: Base::new(unit * F::LOG2_E), is_plain }
    }
}

impl<'a, F: Float> Terms<'a, F> {
    pub(crate) fn new(problem: &'a CallProblem<'a>, inputs: &Inputs<'a>) -> Self {
        let shape = |view: attention_core::View<'_>| std::array::from_fn(|axis| view.shape()[axis]);
        let mask = inputs.mask.map(|mask| {
            let bytes = mask.host_mask();
            let bytes = bytes.unwrap_or_else(|| unreachable!("a checked call has a mask in host memory"));
            (bytes, shape(mask))
        });
        let nothing_added =
            problem.softcap().is_none() && inputs.alibi_slopes.is_none() && inputs.bias.is_none();
        let Scaling { query_factor, scale, unit, base, is_plain } =
            Scaling::new(problem, nothing_added, 1.0, problem.scale());
        let (before, after) = match problem.dtype() {
            DType::F16 => (1.0, problem.scale()),
            _ => problem.scale_of_gradients(),
        };
        Self {
            problem,
            query_factor,
            scale,
            unit,
            base,
            is_plain,
            softcap: problem.softcap().map(F::from_f64),
            slopes: inputs.alibi_slopes.map(Floats::new),
            slopes_per_batch: inputs.alibi_slopes.is_some_and(|slopes| slopes.shape().rank() == 2),
            bias: inputs.bias.map(|bias| (Floats::new(bias), shape(bias))),
            narrows_bias: problem.dtype() != DType::F64
                && inputs.bias.is_some_and(|bias| bias.desc().dtype() == DType::F64),
            mask,
            dropout: problem.dropout_stream(),
            gradient_scale: (F::from_f64(before), F::from_f64(after)),
        }
    }

    /// [`CallProblem::scale_of_gradients`]; 1 and the scale for f16, whose range the gradients of products
    /// would leave.
    pub(crate) fn gradient_scale(&self) -> (F, F) {
        self.gradient_scale
    }

    /// The same with the scale of the 8-bit keys of a head of a sequence, for products of numbers that are
    /// theirs divided by `unit`, a power of two.
    pub(crate) fn with_key_scale(&self, batch: usize, key_head: usize, unit: f64) -> Self {
        /// A scale beyond which operands are so small that products without the unit may underflow, and far
        /// below which queries may be so large that they overflow with it.
        const LARGE: f64 = 1e18;
        let nothing_added = self.softcap.is_none() && !self.adds_bias();
        let (power, scale) = match self.problem.scale_of_products(batch, key_head) {
            // Keys that stand for zeros: no product overflows on its way to 0.
            (_, 0.0) => (0.0, self.problem.scale()),
            (power, scale) if scale.abs() > LARGE => (power * unit, scale),
            (power, scale) => (power, scale * unit),
        };
        let Scaling { query_factor, scale, unit, base, is_plain } =
            Scaling::new(self.problem, nothing_added, power, scale);
        Self { query_factor, scale, unit, base, is_plain, ..self.clone() }
    }

    /// What queries are multiplied by when they are packed: the sign of the scale, so that it is never
    /// negative from there on, and the power of two of the scale of 8-bit keys.
    pub(crate) fn query_factor(&self) -> F {
        self.query_factor
    }

    /// Whether products become logits by more than the scale, even for rows that see every key.
    pub(crate) fn change_products(&self) -> bool {
        !self.is_plain || self.has_mask()
    }

    /// How much a unit of logits is in natural ones.
    pub(crate) fn unit(&self) -> F {
        self.unit
    }

    /// What weights are powers of: `e` to a unit of logits.
    pub(crate) fn base(&self) -> Base<F> {
        self.base
    }

    /// What products are multiplied by where something is added to them, once [`capped`](Self::capped) has
    /// been where that is needed.
    pub(super) fn factor(&self) -> F {
        if self.needs_tile() { F::ONE } else { self.scale }
    }

    /// Whether products become natural logits in the tile before anything is added: with a softcap, and where
    /// there is nothing to add that the scale could be applied with.
    pub(crate) fn needs_tile(&self) -> bool {
        self.softcap.is_some() || self.scale == F::ZERO || !(self.adds_bias() || self.is_plain)
    }

    /// Whether a bias or ALiBi is added.
    pub(crate) fn adds_bias(&self) -> bool {
        self.slopes.is_some() || self.bias.is_some()
    }

    /// Whether there is a boolean mask.
    pub(crate) fn has_mask(&self) -> bool {
        self.mask.is_some()
    }

    /// Whether there is a softcap.
    pub(crate) fn has_softcap(&self) -> bool {
        self.softcap.is_some()
    }

    /// Whether there is dropout.
    pub(crate) fn has_dropout(&self) -> bool {
        self.dropout.is_some()
    }

    /// Whether the mask is false for every one of these keys and rows: looks until it meets one that is true.
    pub(crate) fn masks_all(&self, rows: &[QueryRow], keys: Range<usize>) -> bool {
        let Some((mask, shape)) = &self.mask else { return false };
        rows.iter().all(|row| {
            let bytes = mask.row(&broadcast(shape, [row.batch, row.head, row.query]));
            if bytes.len() == 1 {
                return bytes.at(0) == 0;
            }
            let keys = keys.start.max(row.begin)..keys.end.min(row.end);
            match bytes.contiguous() {
                Some(bytes) => bytes.get(keys).is_none_or(|bytes| bytes.iter().all(|&byte| byte == 0)),
                None => keys.into_iter().all(|key| bytes.at(key) == 0),
            }
        })
    }

    /// Multiplies the weights of a row by the factors of dropout: 0 or the scale of what is kept. A
    /// disallowed weight stays so: negative zero times a factor that is not negative.
    pub(crate) fn drop(&self, row: &QueryRow, first: usize, tile: &mut [F]) {
        self.for_each_kept(row, first, tile.len(), |column, factor| tile[column] = tile[column] * factor);
    }

    /// Calls `visit(column, factor)` for the columns of the row's keys in a tile.
    pub(crate) fn for_each_kept(
        &self,
        row: &QueryRow,
        first: usize,
        columns: usize,
        mut visit: impl FnMut(usize, F),
    ) {
        let Some(stream) = self.dropout else { return };
        // The problem checked that all counters fit.
        let batch_head = (row.batch * self.problem.dims().query_heads + row.head) as u32;
        let keep = F::from_f64(stream.keep_scale());
        let keys = row.begin.max(first)..row.end.min(first + columns);
        stream.for_each(batch_head, row.query as u32, keys, |key, kept| {
            visit(key - first, if kept { keep } else { F::ZERO });
        });
    }
}

/// The index of a broadcast tensor of four axes for a row of the logits: 0 along axes of size 1.
#[inline(always)]
pub(super) fn broadcast(shape: &[usize; 4], index: [usize; 3]) -> [usize; 3] {
    let mut out = index;
    for axis in 0..3 {
        if shape[axis] == 1 {
            out[axis] = 0;
        }
    }
    out
}
