//! The gradients of query, key and value: one task for each key/value head, block by block of its query rows.
//!
//! With probabilities `P`, dropout factors `D` and `delta = <d_out, out> - d_lse` for a row: `dv = (D P)^T
//! d_out`, `dx = P (D (d_out v^T) - delta)`, `dq = scale * dx k`, `dk = scale * dx^T q`, with the slope of
//! the softcap between `dx` and the products (Dao et al., arXiv 2205.14135, appendix B.2).

mod bias_gradient;
mod bias_parts;
mod block;
mod few_rows;
mod pieces;
mod shared;
mod sink_gradient;

use std::ops::Range;

use attention_core::{BackwardCall, HostViewMut, Problem, Scalar, ViewMut};

use self::block::GradientOf;
use self::pieces::{MATRICES, Scratch};
use self::shared::{Shared, Task};
use crate::config::CpuConfig;
use crate::direct::add_scaled;
use crate::elementary::Compute;
use crate::gemm::{Destination, Mat, MatMut, gemm};
use crate::logits::Rows;
use crate::operand::{Head, Operand, write_row};
use crate::packed::{Dense, Panels, set_apart};
use crate::sequences::{BySequence, Sequence, Sequences, Side};
use crate::variants::Runs;
use crate::{cut, sequences, workers};

pub(crate) use self::pieces::Sizes;

/// Runs a checked call in checked scratch.
pub(crate) fn run<E: Operand>(
    call: BackwardCall<'_>,
    sizes: &Sizes,
    config: &CpuConfig,
    scratch: &mut [u8],
    runs: &Runs,
) {
    let (problem, inputs, saved, outputs) = call.into_parts();
    let (problem, team) = (&problem, &config.team(sizes.workers));
    let shared = Shared::<E>::new(problem, &inputs, &saved, runs);
    let small = Shared::<E::Small>::new(problem, &inputs, &saved, runs);
    if let Some(dsinks) = outputs.dsinks {
        sink_gradient::run(&shared, &small, sizes, dsinks, team, scratch);
    }
    if let Some(dbias) = outputs.dbias {
        bias_gradient::run(&shared, &small, sizes, dbias, team, scratch);
    }
    let written = [&outputs.dq, &outputs.dk, &outputs.dv];
    if written.into_iter().flatten().all(|view| view.desc().is_empty()) {
        // No gradient is wanted, or there is none of any batch row, however many there are.
        return;
    }

    let by_sequence = |side, view| {
        BySequence::new(problem, side, view, |rows| {
            rows.into_axis(1).for_each(|head| zero(&mut host::<E::Element>(head), |rows| 0..rows));
        })
    };
    let outputs = [
        outputs.dq.map(|dq| by_sequence(Side::Queries, dq)),
        outputs.dk.map(|dk| by_sequence(Side::Keys, dk)),
        outputs.dv.map(|dv| by_sequence(Side::Keys, dv)),
    ];
    let key_heads = problem.dims().key_heads;
    let sequences = sequences::with_rows(problem, sizes.workers);
    let workers = sequences.saturating_mul(key_heads).min(sizes.workers);
    let tasks = Sequences::new(problem, workers, outputs).flat_map(move |sequence| tasks(problem, sequence));
    workers::run(team, workers, tasks, scratch, sizes.bytes_per_task, |task, scratch| {
        if cut::is_small::<E>(problem, task.batch) {
            small.task(task, &mut Scratch::carve(&sizes.small_pieces, scratch));
        } else {
            shared.task(task, &mut Scratch::carve(&sizes.pieces, scratch));
        }
    });
}

/// Cuts the gradients of a sequence, `[rows, heads, D]`, into those of each key/value head.
fn tasks<'a, T: Scalar>(
    problem: &Problem,
    (batch, [dq, dk, dv]): Sequence<'a, 3>,
) -> impl Iterator<Item = Task<'a, T>> + Send + use<'a, T> {
    let dims = problem.dims();
    let mut groups = dq.map(|dq| dq.into_chunks(1, dims.group_size()));
    let [mut dk, mut dv] = [dk, dv].map(|gradient| gradient.map(|gradient| gradient.into_axis(1)));
    (0..dims.key_heads).map(move |key_head| Task {
        batch,
        key_head,
        dq: groups
            .as_mut()
            .and_then(Iterator::next)
            .map_or_else(Vec::new, |group| group.into_axis(1).map(host).collect()),
        dk: dk.as_mut().and_then(Iterator::next).map(host),
        dv: dv.as_mut().and_then(Iterator::next).map(host),
    })
}

fn host<'a, T: Scalar>(view: ViewMut<'a>) -> HostViewMut<'a, T> {
    view.host_mut().unwrap_or_else(|| unreachable!("a checked call has gradients of its dtype"))
}

impl<E: Operand> Shared<'_, E> {
    fn task(&self, mut task: Task<'_, E::Element>, scratch: &mut Scratch<'_, E::Compute>) {
        let (problem, batch) = (self.problem, task.batch);
        let dims = problem.dims();
        let sequence = problem.sequence(batch);
        let queries = sequence.queries();
        let keys = sequence.key_range_of_rows(0..queries);
        let group = task.key_head * dims.group_size()..(task.key_head + 1) * dims.group_size();
        let rows = Rows { batch, heads: group.clone(), queries: 0..queries };
        self.count(&rows);
        if cut::few_rows(rows.len()) {
            self.few_rows(&mut task, &rows, keys.clone(), scratch);
            fill_padding(task, queries, &keys);
            return;
        }
        let places = problem.key_places(batch);
        let key_head = Head::<E>::new(&self.key, places, task.key_head);
        let value_head = Head::<E>::new(&self.value, places, task.key_head);
        let key_panels = Panels::pack(&key_head, keys.clone(), scratch.key_panels, scratch.row, self.runs);
        let value_panels =
            Panels::pack(&value_head, keys.clone(), scratch.value_panels, scratch.row, self.runs);
        let dense_keys =
            (!task.dq.is_empty()).then(|| Dense::pack(&key_head, keys.clone(), scratch.keys, self.runs));
        let dk = &mut scratch.dk[..if task.dk.is_some() { keys.len() * dims.head_dim } else { 0 }];
        let dv = &mut scratch.dv[..if task.dv.is_some() { keys.len() * dims.value_head_dim } else { 0 }];
        dk.fill(E::Compute::ZERO);
        dv.fill(E::Compute::ZERO);

        let stride = cut::logits_stride(keys.len()).unwrap_or_else(|| unreachable!("sized before"));
        for head in group.clone() {
            let all = Rows { batch, heads: head..head + 1, queries: 0..queries };
            for (rows, block_keys) in cut::blocks(problem, &all, &keys, MATRICES) {
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
                        self.runs,
                    );
                }
                if let Some(dense_keys) = &dense_keys {
                    let (_, scale) = self.terms.gradient_scale;
                    let (weights, marks) = (&*block.d_logits, &*block.probabilities);
                    dense_keys.weighted_sum(weights, marks, stride, count, &columns, scale, block.dq);
                    let dq = &mut task.dq[head - group.start];
                    for (query, row) in rows.queries.clone().zip(block.dq.chunks_exact_mut(dims.head_dim)) {
                        // As in the forward pass, a zero is positive.
                        row.iter_mut().for_each(|sum| *sum += E::Compute::ZERO);
                        write_row::<E>(dq.row_mut(&[query]), row);
                    }
                }
                if task.dk.is_some() {
                    let query = &mut block.query[..count * dims.head_dim];
                    let (_, scale) = self.terms.gradient_scale;
                    add_outer(
                        block.d_logits,
                        block.probabilities,
                        stride,
                        &valid,
                        &keys,
                        scale,
                        query,
                        dk,
                        self.runs,
                    );
                }
            }
        }
        let sums = [(&mut task.dk, &*dk, dims.head_dim), (&mut task.dv, &*dv, dims.value_head_dim)];
        for (gradient, sums, width) in sums {
            let Some(gradient) = gradient else { continue };
            for (key, row) in keys.clone().zip(sums.chunks_exact(width)) {
                write_row::<E>(gradient.row_mut(&[key]), row);
            }
        }
        fill_padding(task, queries, &keys);
    }

    /// Counts the paths of a task over these rows.
    fn count(&self, rows: &Rows) {
        let backward = &E::runs(self.runs).backward;
        if cut::few_rows(rows.len()) { &backward.unpacked } else { &backward.packed }.count();
        if self.terms.gradient_scale.0 != E::Compute::ONE {
            E::Compute::runs(self.runs).scaled_twice.count();
        }
        self.terms.count();
    }
}

/// Writes zeros to the gradients of padded queries and of keys that no query can see.
fn fill_padding<T: Scalar>(task: Task<'_, T>, queries: usize, keys: &Range<usize>) {
    for mut dq in task.dq {
        zero(&mut dq, |length| queries..length);
    }
    for mut gradient in [task.dk, task.dv].into_iter().flatten() {
        zero(&mut gradient, |length| (0..keys.start).chain(keys.end..length));
    }
}

/// Writes zeros to the rows of a gradient `[length, D]` that `rows` names.
fn zero<T: Scalar, R: Iterator<Item = usize>>(
    gradient: &mut HostViewMut<'_, T>,
    rows: impl FnOnce(usize) -> R,
) {
    for row in rows(gradient.shape()[0]) {
        gradient.row_mut(&[row]).fill_with(|_| T::from_f32(0.0));
    }
}

/// `sums[key] += factor * sum over rows of weights[row][key] * values[row]` for the columns `valid`; `sums`
/// begins at the first of `keys`.
///
/// A row of `values` that is not finite counts only where `marks` says that the key takes part, and is
/// zeroed.
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
    runs: &Runs,
) {
    let (count, width) = (valid.len(), sums.len() / keys.len().max(1));
    if count == 0 {
        return;
    }
    let rows = values.len() / width;
    let sums = &mut sums[(valid.start - keys.start) * width..][..count * width];
    let not_finite = set_apart(values, width);
    if !not_finite.is_empty() {
        C::runs(runs).not_finite_rows.count();
    }
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
                add_scaled(sums, factor, weights[row * stride + column], &values);
            }
        }
    }
}
