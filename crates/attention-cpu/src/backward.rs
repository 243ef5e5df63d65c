//! The gradients of query, key and value: one task for each key/value head, block by block of its query rows.
//!
//! With probabilities `P`, dropout factors `D` and `delta = <d_out, out> - d_lse` for a row:
//! `dv = (D P)^T d_out`, `dx = P (D (d_out v^T) - delta)`, `dq = scale * dx k`, `dk = scale * dx^T q`, with the slope
//! of the softcap between `dx` and the products (Dao et al., arXiv 2205.14135, appendix B.2).

use std::ops::Range;

use attention_core::{
    BackwardCall, BackwardInputs, Gradients, HostView, HostViewMut, Inputs, Problem, Scalar, ViewMut,
};
use bytemuck::Pod;

use crate::bias::AnyFloat;
use crate::config::CpuConfig;
use crate::elementary::Compute;
use crate::gemm::{Destination, Mat, MatMut, gemm};
use crate::logits::{Rows, Terms};
use crate::operand::{Head, Operand, read_row, write_row};
use crate::packed::{Columns, Dense, Panels, add_scaled, panel_elements, set_apart};
use crate::plan;
use crate::scratch::{Carver, piece_bytes};
use crate::simd::{Kernel, dispatch};
use crate::softmax::{RowDropout, softmax, sum_of_products};
use crate::{bias_gradient, sink_gradient, workers};

/// Elements of each piece of a worker's scratch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pieces {
    key_panels: usize,
    value_panels: usize,
    keys: usize,
    row: usize,
    dk: usize,
    dv: usize,
    block: BlockPieces,
}

/// Elements of what a block of rows works in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BlockPieces {
    query: usize,
    d_out: usize,
    probabilities: usize,
    d_logits: usize,
    capped: usize,
    dq: usize,
}

impl BlockPieces {
    /// For blocks of `rows` rows over `keys` keys; `None` on overflow.
    fn of(problem: &Problem, rows: usize, keys: usize) -> Option<Self> {
        let dims = problem.dims();
        let logits = rows.checked_mul(plan::logits_stride(keys)?)?;
        Some(Self {
            query: rows.checked_mul(dims.head_dim)?,
            d_out: rows.checked_mul(dims.value_head_dim)?,
            probabilities: logits,
            d_logits: logits,
            capped: if problem.softcap().is_some() { logits } else { 0 },
            dq: rows.checked_mul(dims.head_dim)?,
        })
    }

    fn max(self, other: Self) -> Self {
        Self {
            query: self.query.max(other.query),
            d_out: self.d_out.max(other.d_out),
            probabilities: self.probabilities.max(other.probabilities),
            d_logits: self.d_logits.max(other.d_logits),
            capped: self.capped.max(other.capped),
            dq: self.dq.max(other.dq),
        }
    }

    fn counts(&self) -> [usize; 6] {
        [self.query, self.d_out, self.probabilities, self.d_logits, self.capped, self.dq]
    }
}

/// Matrices of a block's logits that are in use at a time.
pub(crate) const MATRICES: usize = 2;

impl Pieces {
    /// Large enough for every small batch row of the problem, or for the others; `None` on overflow.
    pub(crate) fn of<E: Operand>(problem: &Problem, small: bool) -> Option<Self> {
        let dims = problem.dims();
        let mut pieces = Self { row: dims.head_dim.max(dims.value_head_dim), ..Self::default() };
        let wants = |gradient| problem.gradients().contains(gradient);
        for batch in (0..dims.batch).filter(|&batch| plan::is_small::<E>(problem, batch) == small) {
            let queries = problem.query_len(batch);
            let keys = problem.key_range_of_rows(batch, 0..queries).len();
            pieces.key_panels = pieces.key_panels.max(panel_elements(keys, dims.head_dim)?);
            pieces.value_panels = pieces.value_panels.max(panel_elements(keys, dims.value_head_dim)?);
            if wants(Gradients::QUERY) {
                pieces.keys = pieces.keys.max(keys.checked_mul(dims.head_dim)?);
            }
            if wants(Gradients::KEY) {
                pieces.dk = pieces.dk.max(keys.checked_mul(dims.head_dim)?);
            }
            if wants(Gradients::VALUE) {
                pieces.dv = pieces.dv.max(keys.checked_mul(dims.value_head_dim)?);
            }
            let rows = queries.min(plan::block_rows(keys, MATRICES));
            pieces.block = pieces.block.max(BlockPieces::of(problem, rows, keys)?);
        }
        Some(pieces)
    }

    /// Those of the batch rows that are not small and of those that are, after the scratch was sized.
    pub(crate) fn both<E: Operand>(problem: &Problem) -> [Self; 2] {
        [false, true].map(|small| {
            Self::of::<E>(problem, small).unwrap_or_else(|| unreachable!("the scratch was sized before"))
        })
    }

    pub(crate) fn bytes<C>(&self) -> Option<usize> {
        let own = [self.key_panels, self.value_panels, self.keys, self.row, self.dk, self.dv];
        (own.into_iter().chain(self.block.counts()))
            .try_fold(0usize, |bytes, count| bytes.checked_add(piece_bytes::<C>(count)?))
    }
}

/// A worker's scratch.
pub(crate) struct Scratch<'a, C> {
    pub(crate) key_panels: &'a mut [C],
    pub(crate) value_panels: &'a mut [C],
    keys: &'a mut [C],
    pub(crate) row: &'a mut [C],
    dk: &'a mut [C],
    dv: &'a mut [C],
    pub(crate) block: BlockScratch<'a, C>,
}

/// What a block of rows works in.
pub(crate) struct BlockScratch<'a, C> {
    query: &'a mut [C],
    d_out: &'a mut [C],
    pub(crate) probabilities: &'a mut [C],
    pub(crate) d_logits: &'a mut [C],
    capped: &'a mut [C],
    dq: &'a mut [C],
}

impl<'a, C: Pod> Scratch<'a, C> {
    pub(crate) fn carve(pieces: &Pieces, bytes: &'a mut [u8]) -> Self {
        let mut carver = Carver::new(bytes);
        Self {
            key_panels: carver.take(pieces.key_panels),
            value_panels: carver.take(pieces.value_panels),
            keys: carver.take(pieces.keys),
            row: carver.take(pieces.row),
            dk: carver.take(pieces.dk),
            dv: carver.take(pieces.dv),
            block: BlockScratch {
                query: carver.take(pieces.block.query),
                d_out: carver.take(pieces.block.d_out),
                probabilities: carver.take(pieces.block.probabilities),
                d_logits: carver.take(pieces.block.d_logits),
                capped: carver.take(pieces.block.capped),
                dq: carver.take(pieces.block.dq),
            },
        }
    }
}

/// Bytes of scratch a worker needs for this problem; `None` on overflow.
pub(crate) fn bytes_per_worker<E: Operand>(problem: &Problem) -> Option<usize> {
    bytes_per_task::<E>(problem)?.checked_add(bias_gradient::sums_bytes(problem)?)
}

/// Bytes of scratch that a task over a part of one batch row works in; `None` on overflow.
pub(crate) fn bytes_per_task<E: Operand>(problem: &Problem) -> Option<usize> {
    let bytes = Pieces::of::<E>(problem, false)?.bytes::<E::Compute>()?;
    let small = Pieces::of::<E>(problem, true)?.bytes::<<E::Small as Operand>::Compute>()?;
    Some(bytes.max(small))
}

/// How many tasks can run side by side.
pub(crate) fn task_count(problem: &Problem) -> usize {
    let dims = problem.dims();
    (dims.batch * dims.key_heads).max(bias_gradient::task_count(problem))
}

/// Everything that the tasks of a call share.
pub(crate) struct Shared<'a, E: Operand> {
    pub(crate) problem: &'a Problem,
    query: HostView<'a, E::Element>,
    pub(crate) key: HostView<'a, E::Element>,
    pub(crate) value: HostView<'a, E::Element>,
    out: HostView<'a, E::Element>,
    d_out: HostView<'a, E::Element>,
    lse: HostView<'a, E::Statistics>,
    d_lse: Option<HostView<'a, E::Statistics>>,
    terms: Terms<'a, E::Compute>,
    pub(crate) sinks: Option<AnyFloat<'a>>,
}

/// One key/value head of one batch row, with the gradients it writes.
struct Task<'a, T> {
    batch: usize,
    key_head: usize,
    /// `[T, H]` for each query head of the group.
    dq: Vec<HostViewMut<'a, T>>,
    /// `[S, H]`.
    dk: Option<HostViewMut<'a, T>>,
    /// `[S, Hv]`.
    dv: Option<HostViewMut<'a, T>>,
}

/// Runs a checked call in checked scratch.
pub(crate) fn run<E: Operand>(call: BackwardCall<'_>, config: &CpuConfig, scratch: &mut [u8]) {
    let (problem, inputs, saved, outputs) = call.into_parts();
    let shared = Shared::<E>::new(problem, &inputs, &saved);
    let small = Shared::<E::Small>::new(problem, &inputs, &saved);
    if let Some(dsinks) = outputs.dsinks {
        sink_gradient::run(&small, dsinks);
    }
    if let Some(dbias) = outputs.dbias {
        bias_gradient::run(&shared, &small, dbias, config, scratch);
    }
    if outputs.dq.is_none() && outputs.dk.is_none() && outputs.dv.is_none() {
        return;
    }

    let dims = problem.dims();
    let mut dq = outputs.dq.map(|view| heads::<E::Element>(view).into_iter());
    let mut dk = outputs.dk.map(|view| heads::<E::Element>(view).into_iter());
    let mut dv = outputs.dv.map(|view| heads::<E::Element>(view).into_iter());
    let tasks: Vec<_> = (0..dims.batch)
        .flat_map(|batch| (0..dims.key_heads).map(move |key_head| (batch, key_head)))
        .map(|(batch, key_head)| Task {
            batch,
            key_head,
            dq: dq.as_mut().map_or_else(Vec::new, |dq| dq.by_ref().take(dims.group_size()).collect()),
            dk: dk.as_mut().and_then(Iterator::next),
            dv: dv.as_mut().and_then(Iterator::next),
        })
        .collect();
    let bytes = bytes_per_task::<E>(problem).unwrap_or_else(|| unreachable!("the scratch was sized before"));
    let [pieces, small_pieces] = Pieces::both::<E>(problem);
    let scratch = workers::divide(scratch, bytes, config.thread_count());
    workers::run(tasks, scratch, |task, scratch| {
        if plan::is_small::<E>(problem, task.batch) {
            small.task(task, &mut Scratch::carve(&small_pieces, scratch));
        } else {
            shared.task(task, &mut Scratch::carve(&pieces, scratch));
        }
    });
}

/// Cuts a gradient `[B, length, heads, D]` into `[length, D]` of each head, batch row by batch row.
fn heads<'a, T: Scalar>(view: ViewMut<'a>) -> Vec<HostViewMut<'a, T>> {
    (view.into_axis(0).flat_map(|batch| batch.into_axis(1)))
        .map(|head| {
            head.host_mut().unwrap_or_else(|| unreachable!("a checked call has gradients of its dtype"))
        })
        .collect()
}

/// What a block's gradient is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GradientOf {
    /// The scaled products of queries and keys, below the softcap: what dq and dk are made of.
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

    /// Whether the logsumexp of the keys at hand is that of the whole row, to within rounding.
    ///
    /// A logsumexp in f32 has lost digits, and an output in f16 or bf16 has lost more. Where the keys at hand are all
    /// the row has, their own sums give both back. Where they are a part (context parallelism), the given numbers
    /// stand for the rest of the row. Four units in the last place is what two ways of summing differ by; a rest of
    /// the row that hides in it is as small as the rounding of the logsumexp itself. `epsilon` is that of the stored
    /// logsumexp.
    fn is_of(&self, own: C, epsilon: f64) -> bool {
        let magnitude = |x: C| x.to_f64().abs();
        let unit = epsilon * magnitude(own).max(magnitude(self.lse)).max(1.0);
        magnitude(own - self.lse) <= 4.0 * unit
    }
}

impl<'a, E: Operand> Shared<'a, E> {
    fn new(problem: &'a Problem, inputs: &Inputs<'a>, saved: &BackwardInputs<'a>) -> Self {
        fn host<'a, T: attention_core::Scalar>(view: attention_core::View<'a>) -> HostView<'a, T> {
            view.host()
                .unwrap_or_else(|| unreachable!("a checked call has tensors of its dtypes in host memory"))
        }
        Self {
            problem,
            query: host(inputs.query),
            key: host(inputs.key),
            value: host(inputs.value),
            out: host(saved.out),
            d_out: host(saved.d_out),
            lse: host(saved.lse),
            d_lse: saved.d_lse.map(host),
            terms: Terms::new(problem, inputs),
            sinks: inputs.sinks.map(AnyFloat::new),
        }
    }

    /// What the forward pass left of a row. The product of output and its gradient is summed in f64: it is
    /// subtracted from products that it nearly equals.
    pub(crate) fn row_state(&self, batch: usize, head: usize, query: usize) -> RowState<E::Compute> {
        let statistic = |value: E::Statistics| E::Compute::from_f64(value.to_f64());
        let lse = statistic(self.lse.at(&[batch, query, head]));
        if lse == E::Compute::NEG_INFINITY {
            // The row attends to nothing, and whatever its gradients hold does not matter.
            return RowState { lse, product: E::Compute::ZERO, d_lse: E::Compute::ZERO };
        }
        let (out, d_out) = (self.out.row(&[batch, query, head]), self.d_out.row(&[batch, query, head]));
        let product: f64 = match (out.contiguous(), d_out.contiguous()) {
            (Some(out), Some(d_out)) => out.iter().zip(d_out).map(|(o, d)| o.to_f64() * d.to_f64()).sum(),
            _ => out.iter().zip(d_out.iter()).map(|(o, d)| o.to_f64() * d.to_f64()).sum(),
        };
        let d_lse =
            self.d_lse.as_ref().map_or(E::Compute::ZERO, |d_lse| statistic(d_lse.at(&[batch, query, head])));
        RowState { lse, product: E::Compute::from_f64(product), d_lse }
    }

    fn sink(&self, head: usize) -> Option<E::Compute> {
        self.sinks.as_ref().map(|sinks| sinks.at(&[head]))
    }

    fn task(&self, mut task: Task<'_, E::Element>, scratch: &mut Scratch<'_, E::Compute>) {
        let (problem, batch) = (self.problem, task.batch);
        let dims = problem.dims();
        let queries = problem.query_len(batch);
        let keys = problem.key_range_of_rows(batch, 0..queries);
        let key_head = Head::<E>::new(&self.key, batch, task.key_head);
        let value_head = Head::<E>::new(&self.value, batch, task.key_head);
        let key_panels = Panels::pack(&key_head, keys.clone(), scratch.key_panels, scratch.row);
        let value_panels = Panels::pack(&value_head, keys.clone(), scratch.value_panels, scratch.row);
        let dense_keys = (!task.dq.is_empty()).then(|| Dense::pack(&key_head, keys.clone(), scratch.keys));
        let dk = &mut scratch.dk[..if task.dk.is_some() { keys.len() * dims.head_dim } else { 0 }];
        let dv = &mut scratch.dv[..if task.dv.is_some() { keys.len() * dims.value_head_dim } else { 0 }];
        dk.fill(E::Compute::ZERO);
        dv.fill(E::Compute::ZERO);

        let stride = plan::logits_stride(keys.len()).unwrap_or_else(|| unreachable!("sized before"));
        let group = task.key_head * dims.group_size()..(task.key_head + 1) * dims.group_size();
        for head in group.clone() {
            let all = Rows { batch, heads: head..head + 1, queries: 0..queries };
            for (rows, block_keys) in plan::blocks(problem, &all, &keys, MATRICES) {
                let columns = key_panels.columns(&block_keys);
                let block = &mut scratch.block;
                self.d_logits(
                    GradientOf::Products,
                    &rows,
                    &columns,
                    &key_panels,
                    &value_panels,
                    stride,
                    block,
                );
                let count = rows.len();
                // Only columns of real keys: behind them lies the padding of the last panel.
                let valid = columns.start..(columns.start + columns.count).min(keys.end);
                if task.dv.is_some() {
                    let d_out = &mut block.d_out[..count * dims.value_head_dim];
                    add_outer(
                        block.probabilities,
                        block.probabilities,
                        stride,
                        &valid,
                        &keys,
                        E::Compute::ONE,
                        d_out,
                        dv,
                    );
                }
                if let Some(dense_keys) = &dense_keys {
                    let scale = self.terms.scale;
                    let (weights, marks) = (&*block.d_logits, &*block.probabilities);
                    dense_keys.weighted_sum(weights, marks, stride, count, &columns, scale, block.dq);
                    let dq = &mut task.dq[head - group.start];
                    for (query, row) in rows.queries.clone().zip(block.dq.chunks_exact(dims.head_dim)) {
                        write_row::<E>(dq.row_mut(&[query]), row);
                    }
                }
                if task.dk.is_some() {
                    let query = &mut block.query[..count * dims.head_dim];
                    let scale = self.terms.scale;
                    add_outer(block.d_logits, block.probabilities, stride, &valid, &keys, scale, query, dk);
                }
            }
        }
        for dq in &mut task.dq {
            for query in queries..dims.query_length {
                dq.row_mut(&[query]).fill_with(|_| E::Element::from_f32(0.0));
            }
        }
        for (gradient, sums, width) in [(task.dk, &*dk, dims.head_dim), (task.dv, &*dv, dims.value_head_dim)]
        {
            let Some(mut gradient) = gradient else { continue };
            let untouched = (0..keys.start).chain(keys.end..dims.key_length);
            for key in untouched {
                gradient.row_mut(&[key]).fill_with(|_| E::Element::from_f32(0.0));
            }
            for (key, row) in keys.clone().zip(sums.chunks_exact(width)) {
                write_row::<E>(gradient.row_mut(&[key]), row);
            }
        }
    }

    /// Computes a block's probabilities after dropout (with the marks of what takes no part) and the gradients of
    /// its logits or products, and leaves its queries and output gradients packed.
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
        let mut states = Vec::with_capacity(rows.len());
        for (index, (head, query)) in rows.iter().enumerate() {
            let batch = rows.batch;
            read_row::<E>(
                self.query.row(&[batch, query, head]),
                &mut block.query[index * dims.head_dim..][..dims.head_dim],
            );
            read_row::<E>(
                self.d_out.row(&[batch, query, head]),
                &mut block.d_out[index * dims.value_head_dim..][..dims.value_head_dim],
            );
            states.push(self.row_state(batch, head, query));
        }
        let queries = &block.query[..rows.len() * dims.head_dim];
        key_panels.product(queries, columns, self.terms.scale, block.probabilities, stride);
        let d_out = &block.d_out[..rows.len() * dims.value_head_dim];
        value_panels.product(d_out, columns, E::Compute::ONE, block.d_logits, stride);
        dispatch(SoftmaxGradient {
            shared: self,
            rows,
            columns,
            states: &states,
            probabilities: block.probabilities,
            d_logits: block.d_logits,
            capped: block.capped,
            stride,
            of,
        });
    }
}

/// From products to probabilities, and from products of output gradients and values to gradients of the logits.
struct SoftmaxGradient<'b, 'a, E: Operand> {
    shared: &'b Shared<'a, E>,
    rows: &'b Rows,
    columns: &'b Columns,
    states: &'b [RowState<E::Compute>],
    probabilities: &'b mut [E::Compute],
    d_logits: &'b mut [E::Compute],
    capped: &'b mut [E::Compute],
    stride: usize,
    of: GradientOf,
}

impl<E: Operand> Kernel for SoftmaxGradient<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { shared, rows, columns, states, probabilities, d_logits, capped, stride, of } = self;
        let (problem, batch) = (shared.problem, rows.batch);
        let keys = problem.key_value_len(batch);
        for (index, (head, query)) in rows.iter().enumerate() {
            let at = index * stride;
            let p = &mut probabilities[at..][..columns.count];
            let d = &mut d_logits[at..][..columns.count];
            let mut capped = shared.terms.softcap.map(|_| &mut capped[at..][..columns.count]);
            let state = &states[index];
            if state.lse == E::Compute::NEG_INFINITY {
                p.fill(E::Compute::DISALLOWED);
                d.fill(E::Compute::ZERO);
                continue;
            }
            shared.terms.apply::<FMA>(batch, (head, query), columns, p, capped.as_deref_mut());
            let own = softmax::<_, FMA>(p, shared.sink(head));
            let whole = state.is_of(own.lse, E::STATISTICS_EPSILON);
            // exp(x - lse) = exp(x - max) / (sum * exp(lse - own lse)).
            let total = if whole { own.total } else { own.total * (state.lse - own.lse).exp_lane::<FMA>() };
            if let Some(dropout) = RowDropout::new(problem, batch, head, query) {
                dropout.for_each(columns, keys, |column, factor| d[column] *= factor);
            }
            for (d, p) in d.iter_mut().zip(p.iter_mut()) {
                let allowed = !p.is_disallowed();
                *p = if allowed { *p / total } else { *p };
                *d = if allowed { *d } else { E::Compute::ZERO };
            }
            let delta = if whole { sum_of_products(p, d) - state.d_lse } else { state.delta() };
            for (d, &p) in d.iter_mut().zip(&*p) {
                *d = if p.is_disallowed() { E::Compute::ZERO } else { p * (*d - delta) };
            }
            if let (Some(cap), Some(capped), GradientOf::Products) = (shared.terms.softcap, capped, of) {
                for (d, (&capped, &p)) in d.iter_mut().zip(capped.iter().zip(&*p)) {
                    let ratio = capped / cap;
                    let slope = E::Compute::ONE - ratio * ratio;
                    *d = if p.is_disallowed() { E::Compute::ZERO } else { *d * slope };
                }
            }
            if let Some(dropout) = RowDropout::new(problem, batch, head, query) {
                dropout.apply(columns, keys, p);
            }
        }
    }
}

/// `sums[key] += factor * sum over rows of weights[row][key] * values[row]` for the columns `valid`; `sums` begins
/// at the first of `keys`.
///
/// A row of `values` that is not finite counts only where `marks` says that the key takes part, and is zeroed.
#[allow(clippy::too_many_arguments, reason = "a matrix product has many dimensions")]
fn add_outer<C: Compute>(
    weights: &[C],
    marks: &[C],
    stride: usize,
    valid: &Range<usize>,
    keys: &Range<usize>,
    factor: C,
    values: &mut [C],
    sums: &mut [C],
) {
    let (count, width) = (valid.len(), sums.len() / keys.len().max(1));
    if count == 0 {
        return;
    }
    let rows = values.len() / width;
    let sums = &mut sums[(valid.start - keys.start) * width..][..count * width];
    let not_finite = set_apart(values, width);
    gemm(
        MatMut::new(sums, count, width, width),
        Destination::Accumulate,
        factor,
        Mat::new(weights, rows, count, stride).transposed(),
        Mat::new(values, rows, width, width),
    );
    for (row, values) in not_finite {
        for (column, sums) in sums.chunks_exact_mut(width).enumerate() {
            if !marks[row * stride + column].is_disallowed() {
                add_scaled(sums, factor * weights[row * stride + column], &values);
            }
        }
    }
}
