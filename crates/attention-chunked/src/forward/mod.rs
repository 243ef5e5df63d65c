//! The forward pass: chunks of query rows, against chunks of keys and values that are packed once for all of
//! them (Rabe and Staats, arXiv 2112.05682).
//!
//! A task is a chunk of query rows of heads that share a key/value head. It goes over its keys chunk by
//! chunk; a chunk of keys and values is packed, and each block of rows meets it in blocks of keys: products,
//! online softmax, weighted sum of values. What is carried from block to block is a shift near the maximum,
//! the sum and the value of each row.

mod call;
mod chunk;
mod decode;
mod finish;
mod layout;
pub(crate) mod softmax;
mod tasks;

use std::ops::Range;

use attention_core::{CallProblem, ForwardOutputs, Inputs};

use self::call::{Forward, Outputs};
pub(crate) use self::tasks::Needs;
use self::tasks::{SplitHeads, Task, Tasks};
use crate::config::ChunkedConfig;
use crate::cut;
use crate::engine::Engine;
use crate::paths::Taken;
use crate::workers;

/// A checked call.
pub(crate) struct Call<'c> {
    pub(crate) problem: &'c CallProblem<'c>,
    pub(crate) inputs: &'c Inputs<'c>,
    pub(crate) outputs: ForwardOutputs<'c>,
}

/// Runs a call of a problem that was planned to take this, in checked scratch, and marks the paths
/// that it takes: on the engine, and on the small one.
pub(crate) fn run<E: Engine, Small: Engine>(
    engine: E,
    small: Option<Small>,
    call: Call<'_>,
    planned: &Needs,
    config: &ChunkedConfig,
    scratch: &mut [u8],
    taken: [&Taken; 2],
) {
    let Call { problem, inputs, outputs } = call;
    let (has_small, sizes) = (small.is_some(), config.sizes());
    let outputs = Outputs::new(problem, outputs);
    let mut tasks = planned.tasks::<E, Small>(problem);
    let (fewer, team) = config.team(tasks.workers, scratch.len(), |threads| {
        Needs::of::<E, Small>(problem, has_small, &sizes, threads)
    });
    let needs = fewer.as_ref().unwrap_or(planned);
    if fewer.is_some() {
        tasks = needs.tasks::<E, Small>(problem);
    }
    let Tasks { layout, small: small_layout, decode, has_small_rows, has_large_rows, workers, .. } = *tasks;
    // Making one takes a tenth of the time of the smallest calls.
    let large = has_large_rows.then(|| Forward::new(engine, problem, inputs, layout, decode, taken[0]));
    let large =
        || large.as_ref().unwrap_or_else(|| unreachable!("a task is of a row that is small or large"));
    let small = small
        .filter(|_| has_small_rows)
        .map(|small| Forward::new(small, problem, inputs, small_layout, decode, taken[1]));
    let is_small = |batch: usize| has_small && cut::is_small(problem, batch);
    let small_of = |batch: usize| small.as_ref().filter(|_| is_small(batch));
    let (slots, scratch) = scratch.split_at_mut(needs.slots);
    let slots = Slots { first: slots.as_mut_ptr(), bytes: slots.len() };
    let (bytes, scratch) = (needs.bytes, &mut scratch[..workers * needs.bytes]);

    workers::run(tasks.count(problem), &team, scratch, bytes, &|number, memory| {
        let Some(task) = tasks.at(problem, is_small, number) else { return };
        // SAFETY: `workers::run` calls this once per number, and different numbers are tasks of different
        // rows or different slots, so no other thread writes these rows or uses these bytes. `slots` borrows
        // the scratch, which lives until this function returns.
        unsafe {
            match task {
                Task::Chunk(rows) => match small_of(rows.batch) {
                    Some(small) => small.task(&rows, &outputs, memory),
                    None => large().task(&rows, &outputs, memory),
                },
                Task::Decode(heads) => heads.with_rows(problem, |rows| match small_of(heads.batch) {
                    Some(small) => small.decode(rows, &outputs, memory),
                    None => large().decode(rows, &outputs, memory),
                }),
                Task::DecodeSplit { heads, keys, to } => heads.with_rows(problem, |rows| {
                    let to = slots.range(to);
                    match small_of(heads.batch) {
                        Some(small) => small.decode_split(rows, keys, to, memory),
                        None => large().decode_split(rows, keys, to, memory),
                    }
                }),
            }
        }
    });
    workers::run(tasks.split.len(), &team, scratch, bytes, &|index, memory| {
        let split @ SplitHeads { heads, slot, .. } = &tasks.split[index];
        // SAFETY: `workers::run` calls this once per index, and different indices are combinations of
        // different rows and different slots. The tasks that wrote the slots have returned, since the first
        // `workers::run` has.
        unsafe {
            let splits = slots.range(split.slots());
            heads.with_rows(problem, |rows| match small_of(heads.batch) {
                Some(small) => small.combine_splits(rows, splits, *slot, &outputs, memory),
                None => large().combine_splits(rows, splits, *slot, &outputs, memory),
            });
        }
    });
}

/// Memory for partial results that tasks share: each uses bytes of its own.
struct Slots {
    first: *mut u8,
    bytes: usize,
}

// SAFETY: the pointer is that of an exclusive slice of bytes, which are reached through `range` only; its
// caller guarantees that nothing else uses the bytes.
unsafe impl Sync for Slots {}

impl Slots {
    /// # Safety
    /// Nothing else uses these bytes while the result lives, and the slice that the slots were made of is
    /// still borrowed.
    #[allow(clippy::mut_from_ref, reason = "the caller vouches for exclusive bytes")]
    unsafe fn range(&self, bytes: Range<usize>) -> &mut [u8] {
        assert!(bytes.start <= bytes.end && bytes.end <= self.bytes);
        // SAFETY: the assert checked that the bytes are in the slice that the slots were made of; the caller
        // guarantees that it is still borrowed and that nothing else uses these bytes.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(bytes.start), bytes.len()) }
    }
}
