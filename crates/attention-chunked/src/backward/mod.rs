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

use attention_core::{BackwardCall, BackwardInputs, Gradients, Inputs, Problem, Role, Scalar};

use self::gradient::RowState;
use self::pair::{Layout, Pair};
use self::states::{SharedStates, State, Workers};
use crate::config::{ChunkedConfig, Plan, Sizes};
use crate::engine::Engine;
use crate::paths::{Path, Taken};
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
    states: &'a [State],
    layout: Layout,
    taken: &'a Taken,
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
    let heads = dims.batch as u128 * dims.key_heads as u128;
    let both = wanted.contains(Gradients::QUERY)
        && (wanted.contains(Gradients::KEY) || wanted.contains(Gradients::VALUE));
    // Five products by the busiest thread, against seven spread evenly.
    let threads = threads.max(1) as u128;
    // Waking a thread takes longer than all of a small call.
    let is_small = dims.logits().iter().product::<usize>() <= plan::SMALL_LOGITS;
    both && (is_small || heads.div_ceil(threads) * 5 * threads <= 7 * heads)
}

/// The tasks of a call: found by their number, since a list would grow with the batch.
#[derive(Clone, Copy, Debug, Default)]
struct Tasks {
    together: bool,
    batch: usize,
    key_heads: usize,
    /// The most tasks of a batch row: for a key/value head if together, else for a chunk of its keys. Numbers go over
    /// the batch rows in steps of this; a batch row with fewer tasks leaves numbers without one.
    keys_per_row: usize,
    /// The most tasks of a batch row for rows of dq.
    queries_per_row: usize,
    /// How many threads have something to do.
    workers: usize,
}

impl Tasks {
    /// `keys` gives the keys of a chunk and `rows` the rows of one for a batch row.
    fn of(
        problem: &Problem,
        threads: usize,
        keys: impl Fn(usize) -> usize,
        rows: impl Fn(usize) -> usize,
    ) -> Self {
        let dims = problem.dims();
        // An empty gradient has no tasks, whatever the number of batch rows.
        let writes = |role: Role| problem.tensor(role).is_some_and(|desc| !desc.is_empty());
        let (dq, dkv) = (writes(Role::DQuery), writes(Role::DKey) || writes(Role::DValue));
        let together = together(problem, threads);
        let for_keys = |batch: usize| match (together, dkv) {
            (true, _) if dq || dkv => dims.key_heads,
            (false, true) => dims.key_length.div_ceil(keys(batch)).saturating_mul(dims.key_heads),
            _ => 0,
        };
        let for_queries = |batch: usize| {
            if together || !dq { 0 } else { plan::Cut::of(problem, batch, rows(batch)).count(problem, batch) }
        };
        let most =
            |count: &dyn Fn(usize) -> usize| plan::different_rows(problem).map(count).max().unwrap_or(0);
        let (keys_per_row, queries_per_row) = (most(&for_keys), most(&for_queries));
        let workers =
            plan::count_up_to(problem, threads, |batch| for_keys(batch).saturating_add(for_queries(batch)));
        let (batch, key_heads) = (dims.batch, dims.key_heads);
        Self { together, batch, key_heads, keys_per_row, queries_per_row, workers }
    }

    /// How many numbers there are.
    fn count(&self) -> usize {
        self.batch * self.keys_per_row + self.batch * self.queries_per_row
    }

    /// The task of a number, if it has one.
    fn at(
        &self,
        problem: &Problem,
        number: usize,
        keys: impl Fn(usize) -> usize,
        rows: impl Fn(usize) -> usize,
    ) -> Option<Task> {
        let for_keys = self.batch * self.keys_per_row;
        if let Some(number) = number.checked_sub(for_keys) {
            let (batch, index) = (number / self.queries_per_row, number % self.queries_per_row);
            return plan::Cut::of(problem, batch, rows(batch)).rows(problem, batch, index).map(Task::Queries);
        }
        let (batch, index) = (number / self.keys_per_row, number % self.keys_per_row);
        if self.together {
            return Some(Task::Together { batch, key_head: index });
        }
        let chunks = self.keys_per_row / self.key_heads;
        let (key_head, first) = (index / chunks, index % chunks * keys(batch));
        (first < problem.dims().key_length).then_some(Task::Keys { batch, key_head, first })
    }
}

impl<'a, E: Engine> Backward<'a, E> {
    fn new(
        engine: E,
        problem: &'a Problem,
        inputs: &Inputs<'a>,
        saved: &BackwardInputs<'a>,
        states: &'a [State],
        layout: Layout,
        taken: &'a Taken,
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
            taken,
        }
    }

    /// The state of a query row.
    fn state(&self, batch: usize, head: usize, query: usize) -> RowState<E::F> {
        let dims = self.problem.dims();
        let state = self.states[(batch * dims.query_heads + head) * dims.query_length + query];
        RowState::of(state, self.terms.unit())
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
        self.taken.mark(match task {
            Task::Together { .. } => Path::Together,
            Task::Queries(_) => Path::Queries,
            Task::Keys { .. } => Path::Keys,
        });
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
    tasks: Tasks,
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
            let queries = plan::different_rows(problem).filter(|&batch| is_small(batch) == small);
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
        let states = states::bytes(problem)?;
        let keys = |batch: usize| if is_small(batch) { small.keys() } else { layout.keys() };
        let rows = |batch: usize| if is_small(batch) { small.rows() } else { layout.rows() };
        let tasks = Tasks::of(problem, threads, keys, rows);
        let bias = bias::Parts::of(problem).map_or(0, |parts| parts.count());
        // Sums of rows take the place of logsumexps that have lost digits, also where sinks alone have a gradient.
        let sums = usize::from(plan::has_rows(problem) && dims.key_heads > 0);
        let workers = threads.min(tasks.workers.max(bias).max(sums));
        Some(Self { layout, small, bytes, states, tasks, workers })
    }
}

impl Plan for Needs {
    fn workers(&self) -> usize {
        // The states of rows are computed without scratch, some hundred rows a task.
        self.workers.max(self.states >> 13)
    }

    fn scratch(&self) -> Option<usize> {
        self.bytes.checked_mul(self.workers)?.checked_add(self.states)
    }
}

/// Bytes of scratch of a call; `None` on overflow.
pub(crate) fn needs<E: Engine, Small: Engine>(
    problem: &Problem,
    has_small: bool,
    config: &ChunkedConfig,
) -> Option<usize> {
    Needs::of::<E, Small>(problem, has_small, &config.sizes(), config.planned_threads())?.scratch()
}

/// Runs a checked call in checked scratch, and marks the paths that it takes: on the engine, and on the small one.
pub(crate) fn run<E: Engine, Small: Engine>(
    engine: E,
    small: Option<Small>,
    call: BackwardCall<'_>,
    config: &ChunkedConfig,
    scratch: &mut [u8],
    taken: [&Taken; 2],
) {
    let (problem, inputs, saved, outputs) = call.into_parts();
    let sizes = config.sizes();
    let (needs, team) = config
        .begin(scratch.len(), |threads| Needs::of::<E, Small>(problem, small.is_some(), &sizes, threads));
    let (states, scratch) = scratch.split_at_mut(needs.states);
    let has_small = small.is_some();
    let is_small = |batch: usize| has_small && plan::is_small(problem, batch);
    let units =
        (Terms::<E::F>::new(problem, &inputs).unit(), Terms::<Small::F>::new(problem, &inputs).unit());
    let split = |batch: usize, lse: f64| {
        if is_small(batch) { states::split(units.1, lse) } else { states::split(units.0, lse) }
    };
    let (states, any_lost) = states::compute(problem, &saved, split, states, &team);
    if any_lost {
        let (lse, sinks) = (Floats::new(saved.lse), inputs.sinks.map(Floats::new));
        let shared = SharedStates::new(states);
        let bytes = needs.bytes;
        let of = Backward::new(engine, problem, &inputs, &saved, &[], needs.layout, taken[0]);
        states::replace(
            &of,
            &lse,
            sinks.as_ref(),
            |batch| !is_small(batch),
            shared,
            Workers { team: &team, scratch: &mut *scratch, bytes },
        );
        if let Some(small) = small {
            let of = Backward::new(small, problem, &inputs, &saved, &[], needs.small, taken[1]);
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
        states::sink_gradient(problem, &inputs, states, unit, dsinks);
    }

    let backward = Backward::new(engine, problem, &inputs, &saved, states, needs.layout, taken[0]);
    let small =
        small.map(|small| Backward::new(small, problem, &inputs, &saved, states, needs.small, taken[1]));
    if let Some(dbias) = outputs.dbias {
        bias::run(&backward, small.as_ref(), dbias, &team, needs.bytes, scratch);
    }

    let dims = problem.dims();
    let outputs = Outputs {
        dq: outputs.dq.map(SharedOutput::new),
        dk: outputs.dk.map(SharedOutput::new),
        dv: outputs.dv.map(SharedOutput::new),
    };
    if let Some(dq) = &outputs.dq {
        for batch in 0..if plan::may_have_padding(problem) { dims.batch } else { 0 } {
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
    let tasks = needs.tasks;
    workers::run(tasks.count(), &team, scratch, needs.bytes, &|number, memory| {
        let Some(task) = tasks.at(problem, number, keys, rows) else { return };
        // SAFETY: the tasks are different, and each is run once.
        unsafe {
            match &small {
                Some(small) if is_small(task.batch()) => small.task(&task, &outputs, memory),
                _ => backward.task(&task, &outputs, memory),
            }
        }
    });
}
