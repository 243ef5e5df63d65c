//! Packed and paged tensors as padded ones, and back.

use attention_conformance::oracle::Dense;
use attention_core::{CallProblem, Role, RowLayout};

use super::Flaw;

/// Which side of a call a tensor is on.
fn is_of_queries(role: Role) -> bool {
    !matches!(role, Role::Key | Role::Value | Role::DKey | Role::DValue)
}

/// How the rows of a tensor lie.
fn layout(problem: &CallProblem<'_>, role: Role) -> RowLayout {
    if is_of_queries(role) { problem.query_layout() } else { problem.key_layout() }
}

/// How many rows each sequence has in a padded tensor.
fn longest(problem: &CallProblem<'_>, role: Role) -> usize {
    if is_of_queries(role) { problem.dims().query_length } else { problem.dims().key_length }
}

/// The rows of the tensor that sequence `b` has, as the two first indices.
fn rows(problem: &CallProblem<'_>, role: Role, b: usize, flaw: Flaw) -> Vec<[usize; 2]> {
    let batch = problem.dims().batch;
    let b = if flaw == Flaw::ReadsTheNextSequence { (b + 1) % batch } else { b };
    let places = if is_of_queries(role) { problem.query_places(b) } else { problem.key_places(b) };
    let mut rows: Vec<[usize; 2]> = (0..places.rows()).map(|row| places.of(row)).collect();
    match flaw {
        Flaw::IgnoresStarts if layout(problem, role) == RowLayout::Packed => {
            rows.iter_mut().enumerate().for_each(|(row, place)| *place = [0, row]);
        }
        // As if pages were in the order of the tensor.
        Flaw::IgnoresTheTable => {
            if let RowLayout::Paged { page_size } = layout(problem, role) {
                rows.iter_mut()
                    .enumerate()
                    .for_each(|(row, place)| *place = [row / page_size, row % page_size]);
            }
        }
        _ => {}
    }
    rows
}

/// The tensor with each sequence's rows in a batch row of its own, and zeros behind them.
pub(crate) fn padded(problem: &CallProblem<'_>, role: Role, mut tensor: Dense, flaw: Flaw) -> Dense {
    if layout(problem, role) == RowLayout::Dense {
        return tensor;
    }
    let (batch, longest) = (problem.dims().batch, longest(problem, role));
    let row: usize = tensor.shape[2..].iter().product();
    let mut data = vec![0.0; batch * longest * row];
    for b in 0..batch {
        for (at, [outer, inner]) in rows(problem, role, b, flaw).into_iter().take(longest).enumerate() {
            let (to, from) = ((b * longest + at) * row, (outer * tensor.shape[1] + inner) * row);
            data[to..to + row].copy_from_slice(&tensor.data[from..from + row]);
        }
    }
    tensor.data = data;
    (tensor.shape[0], tensor.shape[1]) = (batch, longest);
    tensor
}

/// The numbers of a padded output as those of the tensor, with what rows of no sequence have.
pub(crate) fn laid_out(problem: &CallProblem<'_>, role: Role, padded: Vec<f64>, flaw: Flaw) -> Vec<f64> {
    if layout(problem, role) == RowLayout::Dense {
        return padded;
    }
    let shape = problem.tensor(role).unwrap().shape();
    let (longest, row) = (longest(problem, role), shape[2..].iter().product::<usize>());
    let empty = if role == Role::Lse { f64::NEG_INFINITY } else { 0.0 };
    let mut data = vec![empty; shape.iter().product()];
    for b in 0..problem.dims().batch {
        for (at, [outer, inner]) in rows(problem, role, b, Flaw::None).into_iter().enumerate() {
            let (from, to) = ((b * longest + at) * row, (outer * shape[1] + inner) * row);
            data[to..to + row].copy_from_slice(&padded[from..from + row]);
        }
    }
    if flaw == Flaw::LeavesRowsOfNoSequence {
        let ends = if is_of_queries(role) {
            problem.query_rows_of_no_sequence()
        } else {
            problem.keys_of_no_sequence()
        };
        data.truncate(ends.start * row);
    }
    data
}

/// The first rows of sequence `b` in packed queries and keys.
pub(crate) fn starts(problem: &CallProblem<'_>, b: usize) -> [usize; 2] {
    let first = |layout: RowLayout, role: Role| match layout {
        RowLayout::Packed => rows(problem, role, b, Flaw::None).first().map_or(0, |row| row[1]),
        _ => 0,
    };
    [first(problem.query_layout(), Role::Query), first(problem.key_layout(), Role::Key)]
}
