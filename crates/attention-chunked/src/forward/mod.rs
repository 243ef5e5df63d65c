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

use attention_core::ForwardCall;

use self::call::{Forward, Outputs};
pub(crate) use self::tasks::Needs;
use self::tasks::Task;
use crate::config::ChunkedConfig;
use crate::cut;
use crate::engine::Engine;
use crate::paths::Taken;
use crate::workers;

/// Runs a checked call of a problem that was planned to take this, in checked scratch, and marks the paths
/// that it takes: on the engine, and on the small one.
pub(crate) fn run<E: Engine, Small: Engine>(
    engine: E,
    small: Option<Small>,
    call: ForwardCall<'_>,
    planned: &Needs,
    config: &ChunkedConfig,
    scratch: &mut [u8],
    taken: [&Taken; 2],
) {
    let (problem, inputs, outputs) = call.into_parts();
    let outputs = Outputs::new(problem, outputs);
    let sizes = config.sizes();
    let (recut, team) = config.team(planned, scratch.len(), |threads| {
        Needs::of::<E, Small>(problem, small.is_some(), &sizes, threads)
    });
    let &Needs { layout, small: small_layout, decode, bytes, slot, ref tasks } =
        recut.as_ref().unwrap_or(planned);
    let limit = |batch: usize| {
        if small.is_some() && cut::is_small(problem, batch) { small_layout.rows } else { layout.rows }
    };
    let forward = Forward::new(engine, problem, &inputs, layout, decode, taken[0]);
    let small = small.map(|small| Forward::new(small, problem, &inputs, small_layout, decode, taken[1]));
    let small_of = |batch: usize| small.as_ref().filter(|_| cut::is_small(problem, batch));
    let (slots, scratch) = scratch.split_at_mut(slot * tasks.splits.len());
    let slots = Slots { first: slots.as_mut_ptr(), bytes: slot, count: tasks.splits.len() };

    workers::run(tasks.count(problem), &team, scratch, bytes, &|number, memory| {
        let Some(task) = tasks.at(problem, limit, number) else { return };
        // SAFETY: the tasks are different rows or different slots, and each is run once.
        unsafe {
            match task {
                Task::Chunk(rows) => match small_of(rows.batch) {
                    Some(small) => small.task(&rows, &outputs, memory),
                    None => forward.task(&rows, &outputs, memory),
                },
                Task::Decode(heads) => heads.with_rows(problem, |rows| match small_of(heads.batch) {
                    Some(small) => small.decode(rows, &outputs, memory),
                    None => forward.decode(rows, &outputs, memory),
                }),
                Task::DecodeSplit { heads, keys, slot } => heads.with_rows(problem, |rows| {
                    let to = slots.range(slot..slot + 1);
                    match small_of(heads.batch) {
                        Some(small) => small.decode_split(rows, keys, to, memory),
                        None => forward.decode_split(rows, keys, to, memory),
                    }
                }),
            }
        }
    });
    workers::run(tasks.combines.len(), &team, scratch, bytes, &|index, memory| {
        let (heads, range) = &tasks.combines[index];
        // SAFETY: the combinations are of different rows and different slots, whose splits are done.
        unsafe {
            let splits = slots.range(range.clone());
            heads.with_rows(problem, |rows| match small_of(heads.batch) {
                Some(small) => small.combine_splits(rows, splits, slot, &outputs, memory),
                None => forward.combine_splits(rows, splits, slot, &outputs, memory),
            });
        }
    });
}

/// Memory for partial results that tasks share: each uses slots of its own.
struct Slots {
    first: *mut u8,
    bytes: usize,
    count: usize,
}

// SAFETY: an exclusive piece of memory, whose parts are handed out by an unsafe method.
unsafe impl Sync for Slots {}

impl Slots {
    /// # Safety
    /// Nobody else uses these slots, and the memory is still borrowed.
    #[allow(clippy::mut_from_ref, reason = "the caller vouches for exclusive slots")]
    unsafe fn range(&self, slots: Range<usize>) -> &mut [u8] {
        assert!(slots.start <= slots.end && slots.end <= self.count);
        // SAFETY: inside the memory that the slots were made of; exclusive by the caller's word.
        unsafe {
            std::slice::from_raw_parts_mut(self.first.add(slots.start * self.bytes), slots.len() * self.bytes)
        }
    }
}
