//! The gradient of the bias, for every broadcast: a pass of its own over the parts of `dbias`.
//!
//! A part is a range of elements of `dbias` that no other task writes; its task visits, in order, every block
//! of logits that the bias was broadcast to and adds their gradients. That recomputes the logits, and needs
//! neither a matrix of the size of the logits nor an order among threads.

use std::ops::Range;

use attention_core::{DType, RowLayout, Scalar, ViewMut};
use attention_threads::Team;
use half::{bf16, f16};

use super::bias_parts::{PART_KEYS, PART_QUERIES, Part, bias_shape, parts, sums_bytes};
use super::block::GradientOf;
use super::pieces::{MATRICES, Scratch, Sizes};
use super::shared::Shared;
use crate::cut;
use crate::logits::Rows;
use crate::operand::{Head, Operand};
use crate::packed::{PANEL, Panels};
use crate::scratch::Carver;
use crate::workers;

/// Computes `dbias`, `[Bb, Nb, Tb, Sb]`, each axis 1 or that of the logits.
pub(super) fn run<E: Operand>(
    shared: &Shared<'_, E>,
    small: &Shared<'_, E::Small>,
    sizes: &Sizes,
    dbias: ViewMut<'_>,
    team: &Team,
    scratch: &mut [u8],
) {
    shared.runs.dbias_as.count(dbias.desc().dtype());
    let problem = shared.problem;
    let shape = bias_shape(problem).unwrap_or_else(|| unreachable!("the problem has the gradient"));
    if dbias.desc().is_empty() {
        // Of how many batch rows or heads says nothing about time.
        return;
    }
    let size = |axis: usize, piece: usize| if shape[axis] == 1 { 1 } else { piece };
    // Views and parts go over batches, heads, queries and keys in this order.
    let views = dbias
        .into_axis(0)
        .flat_map(|view| view.into_axis(0))
        .flat_map(move |view| view.into_chunks(0, size(2, PART_QUERIES)))
        .flat_map(move |view| view.into_chunks(1, size(3, PART_KEYS)));
    let tasks = parts(problem, shape).zip(views);
    let cut = &shared.runs.dbias_task;
    // Of many short sequences, most have no rows in most parts: parts behind the first rows look at the
    // others alone.
    let is_packed = problem.query_layout() == RowLayout::Packed;
    let long: Option<Vec<usize>> = (is_packed && shape[0] == 1 && shape[2] > PART_QUERIES).then(|| {
        let all = problem.sequences_with_queries(0..problem.dims().batch);
        all.filter(|&batch| problem.query_len(batch) > PART_QUERIES).collect()
    });

    let sums_bytes = sums_bytes(problem).unwrap_or_else(|| unreachable!("sized before"));
    workers::run(team, sizes.workers, tasks, scratch, sizes.bytes_per_worker, |(part, view), scratch| {
        let [rows, columns] = [0, 1].map(|axis| view.desc().shape()[axis]);
        if rows < shape[2] {
            cut.part_of_rows.count();
        }
        if columns < shape[3] {
            cut.part_of_keys.count();
        }
        let (sums, rest) = scratch.split_at_mut(sums_bytes);
        let sums = Carver::new(sums).take::<f64>(rows * columns);
        sums.fill(0.0);
        let add = |batch| {
            if cut::is_small::<E>(problem, batch) {
                let mut scratch = Scratch::carve(&sizes.small_pieces, rest);
                add_batch(small, batch, &part, shape, sums, columns, &mut scratch);
            } else {
                let mut scratch = Scratch::carve(&sizes.pieces, rest);
                add_batch(shared, batch, &part, shape, sums, columns, &mut scratch);
            }
        };
        match &long {
            Some(long) if part.queries.start > 0 => long.iter().copied().for_each(add),
            _ if cut::has_logits(problem) => {
                problem.sequences_with_queries(part.batches.clone()).for_each(add)
            }
            _ => {}
        }
        write_rows(view, sums);
    });
}

/// Writes the numbers of all rows, rounded.
fn write_rows(view: ViewMut<'_>, numbers: &[f64]) {
    fn typed<T: Scalar>(view: ViewMut<'_>, numbers: &[f64]) {
        let Some(mut view) = view.host_mut::<T>() else {
            unreachable!("a checked call has the gradient in host memory")
        };
        let columns = view.shape()[1];
        for (row, numbers) in numbers.chunks_exact(columns.max(1)).enumerate() {
            view.row_mut(&[row]).fill_with(|column| T::from_f64(numbers[column]));
        }
    }
    match view.desc().dtype() {
        DType::F64 => typed::<f64>(view, numbers),
        DType::F32 => typed::<f32>(view, numbers),
        DType::F16 => typed::<f16>(view, numbers),
        DType::Bf16 => typed::<bf16>(view, numbers),
        dtype => unreachable!("a checked call has a bias of a float dtype, got {dtype}"),
    }
}

/// Adds the gradients of all logits of a part that are in one batch row to the part's sums, rows of
/// `columns`.
fn add_batch<E: Operand>(
    shared: &Shared<'_, E>,
    batch: usize,
    part: &Part,
    shape: [usize; 4],
    sums: &mut [f64],
    columns: usize,
    scratch: &mut Scratch<'_, E::Compute>,
) {
    let problem = shared.problem;
    // 0 where there are no query heads, and then no head of a part either.
    let group = problem.dims().group_size().max(1);
    // Blocks and strides are those of the whole batch row, for which the scratch was sized.
    let sequence = problem.sequence(batch);
    let all_keys = sequence.key_range_of_rows(0..sequence.queries());
    let stride = cut::logits_stride(all_keys.len()).unwrap_or_else(|| unreachable!("sized before"));
    let queries = part.queries.start..part.queries.end.min(sequence.queries());
    let seen = sequence.key_range_of_rows(queries.clone());
    let keys = intersection(&seen, &part.keys);
    if keys.is_empty() {
        return;
    }
    let is_part = keys != seen;
    let at_hand = if is_part && has_far_rows(shared, batch, part, &queries) { &seen } else { &keys };
    // The last panel's columns behind the part stand for keys too, which count among those at hand where a
    // row sees them.
    let packed = at_hand.start..seen.end.min(at_hand.start + at_hand.len().next_multiple_of(PANEL));
    E::runs(shared.runs).dbias.of(shape[2] != 1, shape[3] != 1).count();
    shared.terms.count();
    for key_head in part.heads.start / group..part.heads.end.div_ceil(group) {
        let head = |view| Head::<E>::new(view, problem.key_places(batch), key_head);
        let key_panels =
            Panels::pack(&head(&shared.key), packed.clone(), scratch.key_panels, scratch.row, shared.runs);
        let value_panels = Panels::pack(
            &head(&shared.value),
            packed.clone(),
            scratch.value_panels,
            scratch.row,
            shared.runs,
        );
        for head in intersection(&(key_head * group..(key_head + 1) * group), &part.heads) {
            let rows = Rows { batch, heads: head..head + 1, queries: queries.clone() };
            for (rows, block_keys) in cut::blocks(problem, &rows, &all_keys, MATRICES) {
                let of_part = intersection(&block_keys, &keys);
                if of_part.is_empty() {
                    continue;
                }
                let block = &mut scratch.block;
                let block_columns = key_panels.columns(&intersection(&block_keys, at_hand));
                let of = GradientOf::Logits;
                shared.d_logits(of, &rows, &block_columns, &key_panels, &value_panels, stride, block);
                for (query, d_logits) in rows.queries.zip(block.d_logits.chunks(stride)) {
                    let row = if shape[2] == 1 { 0 } else { (query - part.queries.start) * columns };
                    let d_logits = &d_logits[of_part.start - block_columns.start..][..of_part.len()];
                    if shape[3] == 1 {
                        sums[row] += d_logits.iter().map(|d| d.to_f64()).sum::<f64>();
                    } else {
                        let sums = &mut sums[row + of_part.start - part.keys.start..];
                        for (sum, d) in sums.iter_mut().zip(d_logits) {
                            *sum += d.to_f64();
                        }
                    }
                }
            }
        }
    }
}

/// The logsumexp from which on the sum of a part of a row's keys cannot be told from that of all of them by
/// their logsumexps, which have lost those digits: the keys at hand are then all that the row sees.
const FAR: f64 = 128.0;

/// Whether a row of a part has such a logsumexp.
fn has_far_rows<E: Operand>(
    shared: &Shared<'_, E>,
    batch: usize,
    part: &Part,
    queries: &Range<usize>,
) -> bool {
    let places = shared.problem.query_places(batch);
    queries.clone().any(|query| {
        let [outer, row] = places.of(query);
        part.heads.clone().any(|head| {
            let lse = shared.lse.at(&[outer, row, head]).to_f64();
            lse.is_finite() && lse.abs() >= FAR
        })
    })
}

fn intersection(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
