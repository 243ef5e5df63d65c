//! The backward pass: the logits of a block are computed again from queries and keys, and turned into probabilities
//! with the logsumexp that the forward pass left; nothing of the size of the logits is ever held (Rabe and Staats,
//! arXiv 2112.05682, section 4; Dao et al., arXiv 2205.14135, appendix B).
//!
//! With probabilities `P`, dropout factors `D` and `delta = <d_out, out> - d_lse` for a row:
//! `dv = (D P)^T d_out`, `dx = P (D (d_out v^T) - delta)`, `dq = scale * dx k`, `dk = scale * dx^T q`, with the slope
//! of the softcap between `dx` and the products.
//!
//! There are two ways to cut the work, with the same bits: *together*, a task is a key/value head and computes all
//! three gradients from five products a block, and *apart*, tasks are chunks of query rows (for dq) and chunks of
//! keys (for dk and dv), seven products a block and any number of threads.

mod bias;
mod gradient;
mod pair;
mod states;

use attention_core::{BackwardCall, BackwardInputs, Gradients, Inputs, Problem};

use self::gradient::RowState;
use self::pair::{Layout, Pair};
use crate::config::Sizes;
use crate::engine::Engine;
use crate::plan::{self, Rows};
use crate::scratch::Pieces;
use crate::tensor::{Floats, SharedOutput};
use crate::terms::Terms;
use crate::workers;

/// Everything that the tasks of a call share.
pub(crate) struct Backward<'a, E: Engine> {
    engine: E,
    problem: &'a Problem,
    query: Floats<'a>,
    key: Floats<'a>,
    value: Floats<'a>,
    d_out: Floats<'a>,
    terms: Terms<'a, E::F>,
    /// Of every query row, `[B, N, T]`.
    states: &'a [[f64; 2]],
    layout: Layout,
}

/// The gradients of query, key and value that a call writes.
struct Outputs<'a> {
    dq: Option<SharedOutput<'a>>,
    dk: Option<SharedOutput<'a>>,
    dv: Option<SharedOutput<'a>>,
}

/// What a task computes.
#[derive(Clone, Debug)]
enum Task {
    /// Every gradient of a key/value head.
    Together { batch: usize, key_head: usize },
    /// dq of some rows.
    Queries(Rows),
    /// dk and dv of a chunk of keys.
    Keys { batch: usize, key_head: usize, first: usize },
}

impl Task {
    fn batch(&self) -> usize {
        match self {
            Self::Together { batch, .. } | Self::Keys { batch, .. } => *batch,
            Self::Queries(rows) => rows.batch,
        }
    }
}

/// Whether one task a key/value head keeps the threads busy enough to be worth its two products less.
fn together(problem: &Problem, threads: usize) -> bool {
    let dims = problem.dims();
    let wanted = problem.gradients();
    let heads = dims.batch * dims.key_heads;
    let both = wanted.contains(Gradients::QUERY)
        && (wanted.contains(Gradients::KEY) || wanted.contains(Gradients::VALUE));
    // Five products by the busiest thread, against seven spread evenly.
    both && heads.div_ceil(threads.max(1)) * 5 * threads <= 7 * heads
}

/// The tasks of a call; `keys` gives the keys of a chunk and `rows` the rows of one for a batch row.
fn tasks(
    problem: &Problem,
    threads: usize,
    keys: impl Fn(usize) -> usize,
    rows: impl Fn(usize) -> usize,
) -> Vec<Task> {
    let dims = problem.dims();
    let heads =
        || (0..dims.batch).flat_map(move |batch| (0..dims.key_heads).map(move |key_head| (batch, key_head)));
    let wanted = problem.gradients();
    let mut tasks = Vec::new();
    if together(problem, threads) {
        tasks.extend(heads().map(|(batch, key_head)| Task::Together { batch, key_head }));
        return tasks;
    }
    if wanted.contains(Gradients::KEY) || wanted.contains(Gradients::VALUE) {
        for (batch, key_head) in heads() {
            let chunks = (0..dims.key_length).step_by(keys(batch));
            tasks.extend(chunks.map(|first| Task::Keys { batch, key_head, first }));
        }
    }
    if wanted.contains(Gradients::QUERY) {
        tasks.extend(plan::row_tasks(problem, rows).map(Task::Queries));
    }
    tasks
}

impl<'a, E: Engine> Backward<'a, E> {
    fn new(
        engine: E,
        problem: &'a Problem,
        inputs: &Inputs<'a>,
        saved: &BackwardInputs<'a>,
        states: &'a [[f64; 2]],
        layout: Layout,
    ) -> Self {
        Self {
            engine,
            problem,
            query: Floats::new(inputs.query),
            key: Floats::new(inputs.key),
            value: Floats::new(inputs.value),
            d_out: Floats::new(saved.d_out),
            terms: Terms::new(problem, inputs),
            states,
            layout,
        }
    }

    /// The state of a query row.
    fn state(&self, batch: usize, head: usize, query: usize) -> RowState {
        let dims = self.problem.dims();
        let [lse, delta] = self.states[(batch * dims.query_heads + head) * dims.query_length + query];
        RowState { lse, delta }
    }

    /// Every query row of a key/value head.
    fn all_rows(&self, batch: usize, key_head: usize) -> Rows {
        let group = self.problem.dims().group_size();
        let heads = key_head * group..(key_head + 1) * group;
        Rows { batch, key_head, heads, queries: 0..self.problem.query_len(batch) }
    }

    /// # Safety
    /// No other thread runs this task.
    unsafe fn task(&self, task: &Task, outputs: &Outputs<'a>, memory: &mut [u8]) {
        let mut scratch = self.layout.scratch::<E>(&mut Pieces::of(memory));
        self.engine.with_state(|| {
            // SAFETY: a task writes the rows that its own description names.
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

/// The layouts of a problem's tasks, and what they take.
struct Needs {
    layout: Layout,
    small: Layout,
    /// Bytes of a worker's scratch.
    bytes: usize,
    /// Bytes of the states of all query rows.
    states: usize,
    workers: usize,
}

impl Needs {
    /// `None` on overflow.
    fn of<E: Engine, Small: Engine>(
        problem: &Problem,
        has_small: bool,
        sizes: &Sizes,
        threads: usize,
    ) -> Option<Self> {
        let dims = problem.dims();
        let is_together = together(problem, threads);
        let is_small = |batch: usize| has_small && plan::is_small(problem, batch);
        let rows_of = |small: bool| {
            let queries = (0..dims.batch).filter(|&batch| is_small(batch) == small);
            queries.map(|batch| problem.query_len(batch)).max()
        };
        let layout_of = |small: bool| rows_of(small).unwrap_or(0).checked_mul(dims.group_size());
        let layout = Layout::of::<E>(problem, sizes, layout_of(false)?, is_together);
        let small = Layout::of::<Small>(problem, sizes, layout_of(true)?, is_together);
        // A bias without batch rows has a gradient of zeros all the same.
        let mut bytes = bias::sums_bytes(problem)?;
        if rows_of(false).is_some() {
            bytes = bytes.max(layout.bytes::<E>()?);
        }
        if rows_of(true).is_some() {
            bytes = bytes.max(small.bytes::<Small>()?);
        }
        let states = dims.batch.checked_mul(dims.query_heads)?.checked_mul(dims.query_length)?;
        let states = states.checked_mul(size_of::<[f64; 2]>())?.checked_next_multiple_of(64)?;
        let keys = |batch: usize| if is_small(batch) { small.keys() } else { layout.keys() };
        let rows = |batch: usize| if is_small(batch) { small.rows() } else { layout.rows() };
        let count = tasks(problem, threads, keys, rows).len();
        let bias = bias::parts(problem).map_or(0, |parts| parts.len());
        Some(Self { layout, small, bytes, states, workers: threads.min(count.max(bias)) })
    }

    fn total(&self) -> Option<usize> {
        self.bytes.checked_mul(self.workers)?.checked_add(self.states)
    }
}

/// Bytes of scratch of a call; `None` on overflow.
pub(crate) fn needs<E: Engine, Small: Engine>(
    problem: &Problem,
    has_small: bool,
    sizes: &Sizes,
    threads: usize,
) -> Option<usize> {
    Needs::of::<E, Small>(problem, has_small, sizes, threads)?.total()
}

/// Runs a checked call in checked scratch.
pub(crate) fn run<E: Engine, Small: Engine>(
    engine: E,
    small: Option<Small>,
    call: BackwardCall<'_>,
    sizes: &Sizes,
    threads: usize,
    scratch: &mut [u8],
) {
    let (problem, inputs, saved, outputs) = call.into_parts();
    let needs = Needs::of::<E, Small>(problem, small.is_some(), sizes, threads)
        .unwrap_or_else(|| unreachable!("the scratch was sized before"));
    let (states, scratch) = scratch.split_at_mut(needs.states);
    let states = states::compute(problem, &saved, states, threads);
    if let Some(dsinks) = outputs.dsinks {
        states::sink_gradient(problem, &inputs, states, dsinks);
    }

    let backward = Backward::new(engine, problem, &inputs, &saved, states, needs.layout);
    let small = small.map(|small| Backward::new(small, problem, &inputs, &saved, states, needs.small));
    let is_small = |batch: usize| small.is_some() && plan::is_small(problem, batch);
    if let Some(dbias) = outputs.dbias {
        bias::run(&backward, small.as_ref(), dbias, threads, needs.bytes, scratch);
    }

    let dims = problem.dims();
    let outputs = Outputs {
        dq: outputs.dq.map(SharedOutput::new),
        dk: outputs.dk.map(SharedOutput::new),
        dv: outputs.dv.map(SharedOutput::new),
    };
    if let Some(dq) = &outputs.dq {
        for batch in 0..dims.batch {
            for query in problem.query_len(batch)..dims.query_length {
                for head in 0..dims.query_heads {
                    // SAFETY: no task has begun.
                    unsafe { dq.zero_row([batch, query, head]) };
                }
            }
        }
    }
    let keys = |batch: usize| if is_small(batch) { needs.small.keys() } else { needs.layout.keys() };
    let rows = |batch: usize| if is_small(batch) { needs.small.rows() } else { needs.layout.rows() };
    let tasks = tasks(problem, threads, keys, rows);
    workers::run(tasks.len(), threads, scratch, needs.bytes, |index, memory| {
        let task = &tasks[index];
        // SAFETY: the tasks are different, and each is run once.
        unsafe {
            match &small {
                Some(small) if is_small(task.batch()) => small.task(task, &outputs, memory),
                _ => backward.task(task, &outputs, memory),
            }
        }
    });
}
