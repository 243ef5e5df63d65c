//! From products of queries and keys to logits: softcap, ALiBi, bias, and the marks of what takes no part.
//!
//! semantics of `Problem`, steps 2 and 3. The scale is applied by the matrix product.

use std::ops::Range;

use attention_core::{CallProblem, DType, HostView, Inputs, SequenceRows, VariantCounter};

use crate::bias::{AnyFloat, broadcast, row_counter};
use crate::elementary::Compute;
use crate::packed::Columns;
use crate::variants::Runs;

/// The query rows of a block: the same rows of some neighbouring heads, head by head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) batch: usize,
    pub(crate) heads: Range<usize>,
    pub(crate) queries: Range<usize>,
}

impl Rows {
    pub(crate) fn len(&self) -> usize {
        self.heads.len() * self.queries.len()
    }

    /// Head and query of each row.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let queries = self.queries.clone();
        self.heads.clone().flat_map(move |head| queries.clone().map(move |query| (head, query)))
    }
}

/// What turns products into logits, read from the call once.
pub(crate) struct Terms<'a, C> {
    pub(crate) problem: &'a CallProblem<'a>,
    pub(crate) scale: C,
    /// [`CallProblem::scale_of_gradients`].
    pub(crate) gradient_scale: (C, C),
    pub(crate) softcap: Option<C>,
    /// The lowest finite logit: that of f32 for f32 operands, whatever is computed in.
    lowest: C,
    /// Whether what is computed in holds larger logits than that.
    is_wider: bool,
    slopes: Option<AnyFloat<'a>>,
    slopes_per_batch: bool,
    bias: Option<(AnyFloat<'a>, [usize; 4])>,
    mask: Option<HostView<'a, u8>>,
    /// The counters of how bias and mask are read.
    reads: [Option<&'a VariantCounter>; 2],
}

impl<'a, C: Compute> Terms<'a, C> {
    pub(crate) fn new(problem: &'a CallProblem<'a>, inputs: &Inputs<'a>, runs: &'a Runs) -> Self {
        let mask = inputs.mask.map(|mask| {
            mask.host_mask()
                .unwrap_or_else(|| unreachable!("a checked call has a boolean mask in host memory"))
        });
        let shape = |view: attention_core::View<'_>| std::array::from_fn(|axis| view.shape()[axis]);
        let logits = problem.dtype().accumulator();
        let bias = inputs.bias.map(|bias| (AnyFloat::new(bias, logits), shape(bias)));
        let reads = [
            bias.as_ref().and_then(|(bias, _)| bias.counter(&runs.bias)),
            mask.as_ref().and_then(|mask| row_counter(mask, &runs.mask)),
        ];
        let lowest = C::from_f64(if logits == DType::F64 { f64::MIN } else { f32::MIN.into() });
        let (before, after) = problem.scale_of_gradients();
        Self {
            problem,
            lowest,
            is_wider: logits != C::DTYPE,
            scale: C::from_f64(problem.scale()),
            gradient_scale: (C::from_f64(before), C::from_f64(after)),
            softcap: problem.softcap().map(C::from_f64),
            slopes: inputs.alibi_slopes.map(|slopes| AnyFloat::new(slopes, logits)),
            slopes_per_batch: inputs.alibi_slopes.is_some_and(|slopes| slopes.shape().rank() == 2),
            bias,
            mask,
            reads,
        }
    }

    /// Counts a task that makes logits.
    pub(crate) fn count(&self) {
        self.reads.into_iter().flatten().for_each(VariantCounter::count);
    }

    /// Turns a row of scaled products into logits: -inf at every column that takes no part. `sequence` has
    /// the rows of the batch row.
    ///
    /// With a softcap, `capped` receives the soft-capped products, from which the backward pass takes the
    /// slope.
    #[inline(always)]
    pub(crate) fn apply<const FMA: bool>(
        &self,
        (batch, sequence): (usize, &SequenceRows),
        (head, query): (usize, usize),
        columns: &Columns,
        logits: &mut [C],
        capped: Option<&mut [C]>,
    ) {
        let keys = sequence.key_range(query);
        // A block may hold a part of the row's keys, and an empty range may lie anywhere.
        let inside = |key: usize| key.clamp(columns.start, columns.start + columns.count);
        let keys = inside(keys.start)..inside(keys.end);
        let (before, rest) = logits[..columns.count].split_at_mut(keys.start - columns.start);
        let (inside, behind) = rest.split_at_mut(keys.len());
        before.fill(C::NEG_INFINITY);
        behind.fill(C::NEG_INFINITY);

        if self.is_wider {
            // A logsumexp of f32 could not hold them, and one of -inf would say that there is no key.
            for logit in inside.iter_mut() {
                let is_below = *logit < self.lowest && logit.is_finite();
                let is_above = *logit > C::ZERO - self.lowest && logit.is_finite();
                *logit = if is_below { self.lowest } else { *logit };
                *logit = if is_above { C::ZERO - self.lowest } else { *logit };
            }
        }
        if let Some(cap) = self.softcap {
            for logit in inside.iter_mut() {
                *logit = cap * (*logit / cap).tanh_lane::<FMA>();
            }
            if let Some(capped) = capped {
                capped[keys.start - columns.start..][..keys.len()].copy_from_slice(inside);
            }
        }
        if let Some(slopes) = &self.slopes {
            let slope: C = if self.slopes_per_batch { slopes.at(&[batch, head]) } else { slopes.at(&[head]) };
            let (position, is_finite) = (sequence.position(query), slope.is_finite());
            for (index, logit) in inside.iter_mut().enumerate() {
                let distance = C::from_distance(position.abs_diff((keys.start + index) as i64));
                let lowered = *logit - slope * distance;
                // As a bias of this size would do.
                let is_below = lowered == C::NEG_INFINITY && is_finite && *logit != C::NEG_INFINITY;
                *logit = if is_below { self.lowest } else { lowered };
            }
        }
        if let Some((bias, shape)) = &self.bias {
            bias.add_row(broadcast(shape, [batch, head, query]), keys.start, inside, self.lowest);
        }
        if let Some(mask) = &self.mask {
            let row = mask.row(&broadcast(&mask.shape(), [batch, head, query]));
            if row.len() == 1 {
                if row.at(0) == 0 {
                    inside.fill(C::NEG_INFINITY);
                }
            } else if let Some(mask) = row.contiguous() {
                for (logit, &mask) in inside.iter_mut().zip(&mask[keys.start..]) {
                    *logit = if mask == 0 { C::NEG_INFINITY } else { *logit };
                }
            } else {
                for (index, logit) in inside.iter_mut().enumerate() {
                    *logit = if row.at(keys.start + index) == 0 { C::NEG_INFINITY } else { *logit };
                }
            }
        }
    }
}
