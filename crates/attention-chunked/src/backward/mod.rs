//! The backward pass: the logits of a block are computed again from queries and keys, and turned into
//! probabilities with the logsumexp that the forward pass left; nothing of the size of the logits is ever
//! held (Rabe and Staats, arXiv 2112.05682, section 4; Dao et al., arXiv 2205.14135, appendix B).
//!
//! With probabilities `P`, dropout factors `D` and `delta = <d_out, out> - d_lse` for a row:
//! `dv = (D P)^T d_out`, `dx = P (D (d_out v^T) - delta)`, `dq = scale * dx k`, `dk = scale * dx^T q`, with
//! the slope of the softcap between `dx` and the products.
//!
//! There are two ways to cut the work, with the same bits: *together*, a task is a key/value head and
//! computes all three gradients from five products a block, and *apart*, tasks are chunks of query rows (for
//! dq) and chunks of keys (for dk and dv), seven products a block and any number of threads.

mod bias;
mod bias_parts;
mod block;
mod call;
mod gradient;
mod layout;
mod pack;
mod packed;
mod pair;
mod states;
mod tasks;

use attention_core::{BackwardInputs, BackwardOutputs, CallProblem, Inputs, Scalar};

use self::block::Pair;
use self::call::{Backward, Outputs};
use self::packed::PackedTasks;
use self::states::{SharedStates, State, Workers};
pub(crate) use self::tasks::Needs;
use self::tasks::Task;
use crate::config::ChunkedConfig;
use crate::cut;
use crate::engine::Engine;
use crate::logits::Terms;
use crate::paths::{Path, Taken};
use crate::scratch::Pieces;
use crate::tensor::{Floats, SharedOutput};
use crate::workers;

/// A checked call.
pub(crate) struct Call<'c> {
    pub(crate) problem: &'c CallProblem<'c>,
    pub(crate) inputs: &'c Inputs<'c>,
    pub(crate) saved: &'c BackwardInputs<'c>,
    pub(crate) outputs: BackwardOutputs<'c>,
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
    let Call { problem, inputs, saved, outputs } = call;
    let sizes = config.sizes();
    let (recut, team) = config.team(planned.workers(), scratch.len(), |threads| {
        Needs::of::<E, Small>(problem, small.is_some(), &sizes, threads)
    });
    let needs = recut.as_ref().unwrap_or(planned);
    let (states, scratch) = scratch.split_at_mut(needs.states);
    let has_small = small.is_some();
    let is_small = |batch: usize| has_small && cut::is_small(problem, batch);
    let units = (Terms::<E::F>::new(problem, inputs).unit(), Terms::<Small::F>::new(problem, inputs).unit());
    let split = |batch: usize, lse: f64| {
        if is_small(batch) { states::split(units.1, lse) } else { states::split(units.0, lse) }
    };
    let (states, any_lost) = states::compute(problem, saved, split, states, &team);
    if any_lost {
        let (lse, sinks) = (Floats::new(saved.lse), inputs.sinks.map(Floats::new));
        let shared = SharedStates::new(states);
        let bytes = needs.bytes;
        let of = Backward::new(engine, problem, inputs, saved, &[], needs.layout, taken[0]);
        states::replace(
            &of,
            &lse,
            sinks.as_ref(),
            |batch| !is_small(batch),
            shared,
            Workers { team: &team, scratch: &mut *scratch, bytes },
        );
        if let Some(small) = small {
            let of = Backward::new(small, problem, inputs, saved, &[], needs.small, taken[1]);
            states::replace(
                &of,
                &lse,
                sinks.as_ref(),
                is_small,
                shared,
                Workers { team: &team, scratch: &mut *scratch, bytes },
            );
        }
    }
    let states: &[State] = states;
    if let Some(dsinks) = outputs.dsinks {
        taken[0].mark(Path::Sinks);
        let unit = |batch: usize| if is_small(batch) { units.1.to_f64() } else { units.0.to_f64() };
        states::sink_gradient(problem, inputs, states, unit, dsinks);
    }

    let backward = Backward::new(engine, problem, inputs, saved, states, needs.layout, taken[0]);
    let small =
        small.map(|small| Backward::new(small, problem, inputs, saved, states, needs.small, taken[1]));
    if let Some(dbias) = outputs.dbias {
        bias::run(&backward, small.as_ref(), dbias, &team, needs.bytes, scratch);
    }

    let outputs = Outputs {
        dq: outputs.dq.map(SharedOutput::new),
        dk: outputs.dk.map(SharedOutput::new),
        dv: outputs.dv.map(SharedOutput::new),
    };
    if let Some(dq) = &outputs.dq {
        // SAFETY: this thread alone has `outputs`, since the tasks begin below.
        cut::for_each_padded_row(problem, |index| unsafe { dq.zero_row(index) });
    }
    let no_sequence =
        if outputs.dk.is_some() || outputs.dv.is_some() { problem.keys_of_no_sequence() } else { 0..0 };
    for key in no_sequence {
        for head in 0..problem.dims().key_heads {
            for output in [&outputs.dk, &outputs.dv].into_iter().flatten() {
                // SAFETY: this thread alone has `outputs`, since the tasks begin below.
                unsafe { output.zero_row([0, key, head]) };
            }
        }
    }
    let layout = |batch: usize| if is_small(batch) { needs.small } else { needs.layout };
    let tasks = needs.tasks;
    let packed = cut::is_packed(problem).then(|| PackedTasks::of(&tasks, problem, team.size(), layout));
    let count = packed.as_ref().map_or_else(|| tasks.count(), PackedTasks::count);
    workers::run(count, &team, scratch, needs.bytes, &|number, memory| {
        let task = match &packed {
            Some(packed) => packed.at(problem, number, layout),
            None => tasks.at(problem, number, layout),
        };
        let Some(task) = task else { return };
        // SAFETY: `workers::run` calls this once per number, and `at` gives a different task for each number,
        // so no other thread runs this task.
        unsafe {
            match &small {
                Some(small) if is_small(task.batch()) => small.task(&task, &outputs, memory),
                _ => backward.task(&task, &outputs, memory),
            }
        }
    });
}

impl<'a, E: Engine> Backward<'a, E> {
    /// # Safety
    /// No other thread runs this task, and all tasks of the call are of one `Tasks`.
    unsafe fn task(&self, task: &Task, outputs: &Outputs<'a>, memory: &mut [u8]) {
        self.taken.mark(match task {
            Task::Together { .. } => Path::Together,
            Task::Queries(_) => Path::Queries,
            Task::Keys { .. } => Path::Keys,
        });
        let mut scratch = self.layout.scratch::<E>(&mut Pieces::of(memory));
        self.engine.with_state(|| {
            // SAFETY: a task writes gradients of the rows and keys that its description names: all of a
            // key/value head, some rows, or a chunk of keys. Different tasks name different ones, and the
            // caller guarantees that no other thread runs this task.
            unsafe {
                match task {
                    Task::Together { batch, key_head } => {
                        let rows = self.all_rows(*batch, *key_head);
                        Pair { backward: self, rows: &rows, dq: true, dkv: true }.all(outputs, &mut scratch);
                    }
                    Task::Queries(rows) => {
                        Pair { backward: self, rows, dq: true, dkv: false }.all(outputs, &mut scratch);
                    }
                    Task::Keys { batch, key_head, first } => {
                        let rows = self.all_rows(*batch, *key_head);
                        let pair = Pair { backward: self, rows: &rows, dq: false, dkv: true };
                        pair.keys(*first, outputs, &mut scratch);
                    }
                }
            }
        });
    }
}
