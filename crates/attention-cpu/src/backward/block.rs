//! The gradients of a block of logits.

use attention_core::{RowPlaces, Scalar};

use super::pieces::{BlockScratch, Scratch};
use super::shared::Shared;
use crate::direct;
use crate::elementary::Compute;
use crate::logits::{Rows, Terms};
use crate::operand::{Head, Operand, read_row};
use crate::packed::{Columns, Panels};
use crate::simd::{Kernel, dispatch};
use crate::softmax::{RowDropout, RowSoftmax, SoftmaxRows, mean};

/// What a block's gradient is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GradientOf {
    /// The scaled products of queries and keys, below the softcap: what dq and dk are made of, with the first
    /// factor of [`Terms::gradient_scale`](crate::logits::Terms::gradient_scale).
    Products,
    /// The logits, above the softcap: what dbias is made of.
    Logits,
}

/// What the forward pass left of a query row, with its incoming gradients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowState<C> {
    /// The logsumexp; -inf for a row that attends to nothing.
    pub(crate) lse: C,
    /// `<d_out, out>`: the sum over keys of probability times its gradient.
    product: C,
    /// The incoming gradient of the logsumexp.
    d_lse: C,
}

impl<C: Compute> RowState<C> {
    /// The row term of the softmax gradient, `<d_out, out> - d_lse`.
    pub(crate) fn delta(&self) -> C {
        self.product - self.d_lse
    }

    /// Whether the logsumexp of the keys at hand is that of the whole row, to within rounding, or more than
    /// that.
    ///
    /// A logsumexp in f32 has lost digits, and an output in f16 or bf16 has lost more. Where the keys at hand
    /// are all the row has, their own sums give both back. Where they are a part (context parallelism), the
    /// given numbers stand for the rest of the row. Four units in the last place is what two ways of summing
    /// differ by; a rest of the row that hides in it is as small as the rounding of the logsumexp itself.
    /// `epsilon` is that of the stored logsumexp.
    ///
    /// A part of a row has no larger sum than the row. Where it has, logits are so large that their own
    /// rounding is more than that of their logsumexp, and a probability from the given one may be anything;
    /// with the own sum it is at most 1.
    fn is_of(&self, own: C, epsilon: f64) -> bool {
        let (own, given) = (own.to_f64(), self.lse.to_f64());
        let unit = epsilon * own.abs().max(given.abs()).max(1.0);
        own - given >= -4.0 * unit
    }
}

impl<E: Operand> Shared<'_, E> {
    /// What the forward pass left of a row. The product of output and its gradient is summed in f64: it is
    /// subtracted from products that it nearly equals.
    pub(crate) fn row_state(
        &self,
        places: &RowPlaces<'_>,
        head: usize,
        query: usize,
    ) -> RowState<E::Compute> {
        let [outer, row] = places.of(query);
        let at = [outer, row, head];
        let statistic = |value: E::Statistics| E::Compute::from_f64(value.to_f64());
        let lse = statistic(self.lse.at(&at));
        if lse == E::Compute::NEG_INFINITY {
            // The row attends to nothing, and whatever its gradients hold does not matter.
            return RowState { lse, product: E::Compute::ZERO, d_lse: E::Compute::ZERO };
        }
        let (out, d_out) = (self.out.row(&at), self.d_out.row(&at));
        let product: f64 = match (out.contiguous(), d_out.contiguous()) {
            (Some(out), Some(d_out)) => out.iter().zip(d_out).map(|(o, d)| o.to_f64() * d.to_f64()).sum(),
            _ => out.iter().zip(d_out.iter()).map(|(o, d)| o.to_f64() * d.to_f64()).sum(),
        };
        let d_lse = self.d_lse.as_ref().map_or(E::Compute::ZERO, |d_lse| statistic(d_lse.at(&at)));
        RowState { lse, product: E::Compute::from_f64(product), d_lse }
    }

    /// Computes a block's probabilities after dropout (with the marks of what takes no part) and the
    /// gradients of its logits or products, and leaves its queries and output gradients packed.
    #[allow(
        clippy::too_many_arguments,
        reason = "the packed operands belong to the task, the rest to the block"
    )]
    pub(crate) fn d_logits(
        &self,
        of: GradientOf,
        rows: &Rows,
        columns: &Columns,
        key_panels: &Panels<'_, E::Compute>,
        value_panels: &Panels<'_, E::Compute>,
        stride: usize,
        block: &mut BlockScratch<'_, E::Compute>,
    ) {
        let dims = self.problem.dims();
        let states = self.read_rows(rows, block);
        let queries = &block.query[..rows.len() * dims.head_dim];
        key_panels.product(queries, columns, self.terms.scale, block.probabilities, stride);
        let d_out = &block.d_out[..rows.len() * dims.value_head_dim];
        value_panels.product(d_out, columns, E::Compute::ONE, block.d_logits, stride);
        self.softmax_gradient(of, rows, columns, &states, stride, block);
    }

    /// Packs the queries and output gradients of a block, and gives what the forward left of its rows.
    pub(super) fn read_rows(
        &self,
        rows: &Rows,
        block: &mut BlockScratch<'_, E::Compute>,
    ) -> Vec<RowState<E::Compute>> {
        let (places, dims) = (self.problem.query_places(rows.batch), self.problem.dims());
        let mut states = Vec::with_capacity(rows.len());
        let rows_of_block = (block.query.chunks_exact_mut(dims.head_dim))
            .zip(block.d_out.chunks_exact_mut(dims.value_head_dim));
        for ((head, query), (to_query, to_d_out)) in rows.iter().zip(rows_of_block) {
            let [outer, row] = places.of(query);
            read_row::<E>(self.query.row(&[outer, row, head]), to_query);
            read_row::<E>(self.d_out.row(&[outer, row, head]), to_d_out);
            states.push(self.row_state(&places, head, query));
        }
        states
    }

    /// From the products of queries and keys and of output gradients and values, in `block.probabilities` and
    /// `block.d_logits`, to what these are named after.
    pub(super) fn softmax_gradient(
        &self,
        of: GradientOf,
        rows: &Rows,
        columns: &Columns,
        states: &[RowState<E::Compute>],
        stride: usize,
        block: &mut BlockScratch<'_, E::Compute>,
    ) {
        let own = dispatch(SoftmaxRows {
            terms: &self.terms,
            sinks: self.sinks.as_ref(),
            rows,
            columns,
            logits: block.probabilities,
            stride,
            capped: self.terms.softcap.is_some().then_some(&mut *block.capped),
        });
        let sums = dispatch(SoftmaxGradient {
            terms: &self.terms,
            own: &own,
            epsilon: E::STATISTICS_EPSILON,
            rows,
            columns,
            states,
            probabilities: block.probabilities,
            d_logits: block.d_logits,
            capped: block.capped,
            stride,
            of,
        });
        let runs = E::runs(self.runs);
        if sums.own {
            runs.own_sum.count();
        }
        if sums.given {
            runs.given_lse.count();
        }
    }
}

impl<E: Operand> Shared<'_, E> {
    /// The probability of the sink of a row by the sum of the keys at hand, where these are all of the row's.
    pub(crate) fn own_sink(
        &self,
        batch: usize,
        head: usize,
        query: usize,
        state: &RowState<E::Compute>,
        scratch: &mut Scratch<'_, E::Compute>,
    ) -> Option<f64> {
        let keys = self.problem.key_range(batch, query);
        let key_head = head / self.problem.dims().group_size();
        let head_of_keys = Head::<E>::new(&self.key, self.problem.key_places(batch), key_head);
        let row = &mut scratch.block.query[..head_of_keys.width()];
        let [outer, at] = self.problem.query_places(batch).of(query);
        read_row::<E>(self.query.row(&[outer, at, head]), row);
        let logits = &mut scratch.block.probabilities[..keys.len()];
        direct::products(&head_of_keys, keys.clone(), row, self.terms.scale, scratch.row, logits, keys.len());
        let columns = Columns { start: keys.start, count: keys.len() };
        let (stride, rows) = (logits.len(), Rows { batch, heads: head..head + 1, queries: query..query + 1 });
        let (terms, sinks) = (&self.terms, self.sinks.as_ref());
        let own = dispatch(SoftmaxRows {
            terms,
            sinks,
            rows: &rows,
            columns: &columns,
            logits,
            stride,
            capped: None,
        });
        let own = own.first()?;
        state.is_of(own.lse, E::STATISTICS_EPSILON).then(|| (own.sink / own.total).to_f64())
    }
}

/// By which sums the rows of a block were divided: their own, the given ones, or both.
#[derive(Clone, Copy, Debug, Default)]
struct SumsOfRows {
    own: bool,
    given: bool,
}

/// From unnormalised weights to probabilities, and from products of output gradients and values to gradients
/// of the logits.
struct SoftmaxGradient<'b, 'a, C> {
    terms: &'b Terms<'a, C>,
    /// Of each row.
    own: &'b [RowSoftmax<C>],
    /// The distance from 1 to the next number of the stored logsumexps.
    epsilon: f64,
    rows: &'b Rows,
    columns: &'b Columns,
    states: &'b [RowState<C>],
    probabilities: &'b mut [C],
    d_logits: &'b mut [C],
    /// Soft-capped products, with a softcap.
    capped: &'b [C],
    stride: usize,
    of: GradientOf,
}

impl<C: Compute> Kernel for SoftmaxGradient<'_, '_, C> {
    type Output = SumsOfRows;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> SumsOfRows {
        let mut sums = SumsOfRows::default();
        let Self { terms, own, epsilon, rows, columns, states, probabilities, d_logits, capped, stride, of } =
            self;
        let (problem, batch) = (terms.problem, rows.batch);
        let keys = problem.key_value_len(batch);
        for (index, (head, query)) in rows.iter().enumerate() {
            let at = index * stride;
            let p = &mut probabilities[at..][..columns.count];
            let d = &mut d_logits[at..][..columns.count];
            let capped = terms.softcap.map(|_| &capped[at..][..columns.count]);
            let (state, own) = (&states[index], &own[index]);
            if state.lse == C::NEG_INFINITY {
                p.fill(C::DISALLOWED);
                d.fill(C::DISALLOWED);
                continue;
            }
            let whole = state.is_of(own.lse, epsilon);
            sums.own |= whole;
            sums.given |= !whole;
            // exp(x - lse) = exp(x - max) / (sum * exp(lse - own lse)).
            let total = if whole { own.total } else { own.total * (state.lse - own.lse).exp_lane::<FMA>() };
            if let Some(dropout) = RowDropout::new(problem, batch, head, query) {
                dropout.apply(columns, keys, d);
            }
            for (d, p) in d.iter_mut().zip(p.iter_mut()) {
                let allowed = !p.is_disallowed();
                *p = if allowed { *p / total } else { *p };
                *d = if allowed { *d } else { C::ZERO };
            }
            let delta = if whole { mean(p, d, own.sink / total) - state.d_lse } else { state.delta() };
            for (d, &p) in d.iter_mut().zip(&*p) {
                *d = if p.is_disallowed() { C::DISALLOWED } else { p * (*d - delta) };
            }
            if let (Some(cap), Some(capped), GradientOf::Products) = (terms.softcap, capped, of) {
                for (d, (&capped, &p)) in d.iter_mut().zip(capped.iter().zip(&*p)) {
                    let ratio = capped / cap;
                    let slope = C::ONE - ratio * ratio;
                    *d = if p.is_disallowed() { C::DISALLOWED } else { *d * slope };
                }
            }
            let (before, _) = terms.gradient_scale;
            if of == GradientOf::Products && before != C::ONE {
                // The sign of a disallowed one stays.
                d.iter_mut().for_each(|d| *d *= before);
            }
            if let Some(dropout) = RowDropout::new(problem, batch, head, query) {
                dropout.apply(columns, keys, p);
            }
        }
        sums
    }
}
