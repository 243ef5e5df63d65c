//! The forward pass: blocks of query rows against all their keys.

use std::marker::PhantomData;

use attention_core::{
    CallProblem, Element, ForwardCall, HostView, HostViewMut, Inputs, Problem, Scalar, SequenceRows, View,
    ViewMut,
};
use bytemuck::Pod;

use crate::bias::AnyFloat;
use crate::cache::{Cache, KeyScale};
use crate::config::CpuConfig;
use crate::cut::{self, SizedRows, Task, TaskSize};
use crate::elementary::Compute;
use crate::logits::{Rows, Terms};
use crate::operand::{Head, Operand, Read, read_row, write_row};
use crate::packed::{Columns, Dense, Panels, panel_elements};
use crate::scratch::{Carver, piece_bytes};
use crate::sequences::{BySequence, Sequences, Side};
use crate::simd::dispatch;
use crate::softmax::{RowDropout, RowSoftmax, SoftmaxRows};
use crate::variants::Runs;
use crate::{direct, workers};

/// Elements of each piece of a worker's scratch.
#[derive(Clone, Copy, Debug, Default)]
struct Pieces {
    panels: usize,
    values: usize,
    row: usize,
    query: usize,
    logits: usize,
    sums: usize,
}

impl Pieces {
    /// Makes room for the tasks of some batch rows; `None` on overflow.
    fn make_room(&mut self, problem: &Problem, sized: SizedRows) -> Option<()> {
        let dims = problem.dims();
        let rows = sized.task_rows(problem);
        let keys = sized.keys_of(problem, sized.task_queries(problem));
        // The last task of a head may be the only one of few rows, and the other way round the first is the
        // largest.
        if !cut::few_rows(rows) {
            self.panels = self.panels.max(panel_elements(keys, dims.head_dim)?);
            self.values = self.values.max(keys.checked_mul(dims.value_head_dim)?);
        }
        // Tasks that see fewer keys have blocks of more rows.
        let block = rows.min(cut::block_rows(0, 1));
        self.query = self.query.max(block.checked_mul(dims.head_dim)?);
        self.logits = self.logits.max(cut::block_elements(rows, keys, 1)?);
        self.sums = self.sums.max(block.checked_mul(dims.value_head_dim)?);
        Some(())
    }

    fn bytes<C>(&self) -> Option<usize> {
        [self.panels, self.values, self.row, self.query, self.logits, self.sums]
            .into_iter()
            .try_fold(0usize, |bytes, count| bytes.checked_add(piece_bytes::<C>(count)?))
    }
}

/// A worker's scratch.
struct Scratch<'a, C> {
    panels: &'a mut [C],
    values: &'a mut [C],
    row: &'a mut [C],
    query: &'a mut [C],
    logits: &'a mut [C],
    sums: &'a mut [C],
}

impl<'a, C: Pod> Scratch<'a, C> {
    fn carve(pieces: &Pieces, bytes: &'a mut [u8]) -> Self {
        let mut carver = Carver::new(bytes);
        Self {
            panels: carver.take(pieces.panels),
            values: carver.take(pieces.values),
            row: carver.take(pieces.row),
            query: carver.take(pieces.query),
            logits: carver.take(pieces.logits),
            sums: carver.take(pieces.sums),
        }
    }
}

/// What every call of a problem takes.
#[derive(Debug)]
pub(crate) struct Sizes {
    /// Large enough for every task of batch rows that are not small.
    pieces: Pieces,
    /// Large enough for every task of small batch rows.
    small_pieces: Pieces,
    /// Bytes of scratch a worker needs.
    pub(crate) bytes_per_worker: usize,
    /// The most threads that have something to do.
    pub(crate) workers: usize,
}

impl Sizes {
    /// With tasks counted up to `threads`; `None` on overflow.
    pub(crate) fn of<E: Operand>(problem: &Problem, threads: usize) -> Option<Self> {
        let dims = problem.dims();
        let row = dims.head_dim.max(dims.value_head_dim).checked_mul(direct::KEYS)?;
        let empty = Pieces { row, ..Pieces::default() };
        let (mut pieces, mut small_pieces) = (empty, empty);
        let rows = cut::has_rows(problem).then(|| cut::sized_rows::<E>(problem));
        for sized in rows.into_iter().flatten() {
            let pieces = if sized.are_small { &mut small_pieces } else { &mut pieces };
            pieces.make_room(problem, sized)?;
        }
        let bytes = pieces.bytes::<E::Compute>()?;
        let small_bytes = small_pieces.bytes::<<E::Small as Read>::Compute>()?;
        let workers = cut::most_tasks(problem, threads);
        Some(Self { pieces, small_pieces, bytes_per_worker: bytes.max(small_bytes), workers })
    }
}

/// What a task writes: for each of its heads, its query rows of the output and the logsumexp.
struct Outputs<'a, T, L> {
    out: Vec<HostViewMut<'a, T>>,
    lse: Vec<HostViewMut<'a, L>>,
}

/// The elements of keys and values.
type Cached<K, E> = <<K as Cache>::Of<E> as Read>::Element;

/// Everything that the tasks of a call share.
struct Shared<'a, E: Operand, K: Cache> {
    problem: &'a CallProblem<'a>,
    query: HostView<'a, E::Element>,
    key: HostView<'a, Cached<K, E>>,
    value: HostView<'a, Cached<K, E>>,
    terms: Terms<'a, E::Compute>,
    sinks: Option<AnyFloat<'a>>,
    runs: &'a Runs,
}

/// Runs a checked call in checked scratch.
pub(crate) fn run<E: Operand, K: Cache>(
    call: ForwardCall<'_>,
    sizes: &Sizes,
    config: &CpuConfig,
    scratch: &mut [u8],
    runs: &Runs,
) {
    let (problem, inputs, outputs) = call.into_parts();
    let problem = &problem;
    // Lengths and starts may leave fewer tasks than were planned for.
    let workers = cut::task_count(problem, sizes.workers);
    let outputs = [
        Some(BySequence::new(problem, Side::Queries, outputs.out, fill_with::<E::Element>(0.0))),
        outputs.lse.map(|lse| {
            let fill = fill_with::<E::Statistics>(f32::NEG_INFINITY);
            BySequence::new(problem, Side::Queries, lse, fill)
        }),
    ];
    if !cut::has_rows(problem) {
        return;
    }
    let shared = Shared::<E, K>::new(problem, &inputs, runs);
    let small = Shared::<E::Small, K>::new(problem, &inputs, runs);
    let tasks = Queue::<E::Element, E::Statistics>::new(problem, Sequences::new(problem, workers, outputs));
    workers::run(
        &config.team(workers),
        workers,
        tasks,
        scratch,
        sizes.bytes_per_worker,
        |(task, mut outputs), scratch| {
            if cut::is_small::<E>(problem, task.rows.batch) {
                small.task(&task, &mut outputs, &mut Scratch::carve(&sizes.small_pieces, scratch));
            } else {
                shared.task(&task, &mut outputs, &mut Scratch::carve(&sizes.pieces, scratch));
            }
        },
    );
}

type Parts<'a> = Box<dyn Iterator<Item = ViewMut<'a>> + Send + 'a>;

/// Cuts the outputs into what each task writes, task by task, and fills the padded rows of each sequence on
/// the way: with 0 an output, with -inf a logsumexp.
struct Queue<'p, 'a, T, L> {
    problem: &'p CallProblem<'p>,
    /// The sequences to come, with their rows of the output, `[T, N, Hv]`, and of the logsumexp, `[T, N]`.
    sequences: Sequences<'p, 'a, 2>,
    /// The sequence at hand, once there is one.
    batch: usize,
    sequence: Option<SequenceRows>,
    /// The query heads to come of the sequence at hand, `[T, Hv]` and `[T]`, real rows only.
    out_heads: Parts<'a>,
    lse_heads: Option<Parts<'a>>,
    next_head: usize,
    /// The query heads of the tasks at hand: their rows that no task has yet.
    out_left: Vec<ViewMut<'a>>,
    lse_left: Vec<ViewMut<'a>>,
    queries_left: usize,
    elements: PhantomData<(T, L)>,
}

impl<'p, 'a, T: Scalar, L: Scalar> Queue<'p, 'a, T, L> {
    fn new(problem: &'p CallProblem<'p>, sequences: Sequences<'p, 'a, 2>) -> Self {
        Self {
            problem,
            sequences,
            batch: 0,
            sequence: None,
            out_heads: Box::new(std::iter::empty()),
            lse_heads: None,
            next_head: 0,
            out_left: Vec::new(),
            lse_left: Vec::new(),
            queries_left: 0,
            elements: PhantomData,
        }
    }

    /// Takes the next sequence in hand; `None` behind the last.
    fn begin_sequence(&mut self) -> Option<()> {
        let (batch, [out, lse]) = self.sequences.next()?;
        let sequence = self.problem.sequence(batch);
        let queries = sequence.queries();
        (self.batch, self.sequence, self.next_head) = (batch, Some(sequence), 0);
        let out = out.unwrap_or_else(|| unreachable!("a sequence with rows has rows of the output"));
        self.out_heads = heads::<T>(out, queries, 0.0);
        self.lse_heads = lse.map(|lse| heads::<L>(lse, queries, f32::NEG_INFINITY));
        Some(())
    }
}

/// Fills the rows from `queries` on and cuts the others into heads.
fn heads<'a, T: Scalar>(view: ViewMut<'a>, queries: usize, padding: f32) -> Parts<'a> {
    let length = view.shape()[0];
    let [live, padded] = view
        .split(0, [queries, length - queries])
        .unwrap_or_else(|_| unreachable!("a query length is at most T"));
    fill_with::<T>(padding)(padded);
    Box::new(live.into_axis(1))
}

/// Writes one number to all of `[rows, N]` or `[rows, N, Hv]`.
fn fill_with<T: Scalar>(number: f32) -> impl Fn(ViewMut<'_>) {
    move |rows| rows.into_axis(0).for_each(|row| fill(host::<T>(row), T::from_f32(number)))
}

fn host<'a, T: Scalar>(view: ViewMut<'a>) -> HostViewMut<'a, T> {
    view.host_mut().unwrap_or_else(|| unreachable!("a checked call has outputs of its dtype in host memory"))
}

impl<'a, T: Scalar, L: Scalar> Iterator for Queue<'_, 'a, T, L> {
    type Item = (Task, Outputs<'a, T, L>);

    fn next(&mut self) -> Option<Self::Item> {
        let group = self.problem.dims().group_size();
        loop {
            let Some(sequence) = self.sequence else {
                self.begin_sequence()?;
                continue;
            };
            let queries = sequence.queries();
            let size = TaskSize::of(queries, group);
            if self.queries_left == 0 {
                // The heads of the tasks to come: some that share a key/value head.
                let in_group = group - self.next_head % group;
                self.out_left.clear();
                self.out_left.extend(self.out_heads.by_ref().take(size.heads.min(in_group)));
                if self.out_left.is_empty() || queries == 0 {
                    self.begin_sequence()?;
                    continue;
                }
                self.lse_left.clear();
                if let Some(lse) = &mut self.lse_heads {
                    self.lse_left.extend(lse.take(self.out_left.len()));
                }
                self.next_head += self.out_left.len();
                self.queries_left = queries;
            }
            let batch = self.batch;
            // Under causal masking the last rows of a head see the most keys: begin with those.
            let first = (self.queries_left - 1) / size.queries * size.queries;
            let queries = first..self.queries_left;
            self.queries_left = first;
            let heads = self.next_head - self.out_left.len()..self.next_head;
            let keys = sequence.key_range_of_rows(queries.clone());
            let outputs = Outputs {
                out: take_rows(&mut self.out_left, first),
                lse: take_rows(&mut self.lse_left, first),
            };
            let rows = Rows { batch, heads: heads.clone(), queries };
            return Some((Task { key_head: heads.start / group, rows, keys }, outputs));
        }
    }
}

/// Cuts the rows from `first` on off each view.
fn take_rows<'a, T: Scalar>(views: &mut Vec<ViewMut<'a>>, first: usize) -> Vec<HostViewMut<'a, T>> {
    let mut taken = Vec::with_capacity(views.len());
    for view in std::mem::take(views) {
        let length = view.shape()[0];
        let [rest, rows] =
            view.split(0, [first, length - first]).unwrap_or_else(|_| unreachable!("rows that are left"));
        taken.push(host(rows));
        views.push(rest);
    }
    taken
}

/// Writes one number everywhere: `[N]` or `[N, Hv]`.
fn fill<T: Scalar>(mut view: HostViewMut<'_, T>, value: T) {
    if view.shape().rank() == 1 {
        view.row_mut(&[]).fill_with(|_| value);
    } else {
        for index in 0..view.shape()[0] {
            view.row_mut(&[index]).fill_with(|_| value);
        }
    }
}

/// An operand of a checked call.
fn operand<'a, T: Element + Pod>(view: View<'a>) -> HostView<'a, T> {
    view.host().unwrap_or_else(|| unreachable!("a checked call has operands of its dtypes in host memory"))
}

impl<'a, E: Operand, K: Cache> Shared<'a, E, K> {
    fn new(problem: &'a CallProblem<'a>, inputs: &Inputs<'a>, runs: &'a Runs) -> Self {
        Self {
            problem,
            query: operand(inputs.query),
            key: operand(inputs.key),
            value: operand(inputs.value),
            terms: Terms::new(problem, inputs, runs),
            sinks: inputs.sinks.map(|sinks| AnyFloat::new(sinks, problem.dtype().accumulator())),
            runs,
        }
    }

    fn task(
        &self,
        task: &Task,
        outputs: &mut Outputs<'_, E::Element, E::Statistics>,
        scratch: &mut Scratch<'_, E::Compute>,
    ) {
        let batch = task.rows.batch;
        let places = self.problem.key_places(batch);
        let keys = Head::<K::Of<E>>::new(&self.key, places, task.key_head);
        let values = Head::<K::Of<E>>::new(&self.value, places, task.key_head);
        let key_scale = K::key_scale(self.problem, batch, task.key_head, self.terms.scale);
        self.count(task);
        keys.count(E::runs(self.runs));
        if cut::few_rows(task.rows.len()) {
            self.direct(task, &keys, &values, &key_scale, outputs, scratch);
            return;
        }
        let panels = Panels::pack(&keys, task.keys.clone(), scratch.panels, scratch.row, self.runs);
        let values = Dense::pack(&values, task.keys.clone(), scratch.values, self.runs);
        let stride = cut::logits_stride(task.keys.len()).unwrap_or_else(|| unreachable!("sized before"));
        for (rows, keys) in cut::blocks(self.problem, &task.rows, &task.keys, 1) {
            self.read_queries(&rows, &key_scale, scratch.query);
            let columns = panels.columns(&keys);
            let width = self.query.shape()[3];
            panels.product(
                &scratch.query[..rows.len() * width],
                &columns,
                key_scale.of_products,
                scratch.logits,
                stride,
            );
            let results = self.softmax(&rows, &columns, scratch.logits, stride);
            values.weighted_sum(
                scratch.logits,
                scratch.logits,
                stride,
                rows.len(),
                &columns,
                E::Compute::ONE,
                scratch.sums,
            );
            self.write(task, &rows, &results, scratch.sums, outputs);
        }
    }

    /// Counts the paths that a task takes.
    fn count(&self, task: &Task) {
        let (few, of_operand) = (cut::few_rows(task.rows.len()), E::runs(self.runs));
        let eight_bit = K::EIGHT_BIT.map(|index| &of_operand.eight_bit[index]);
        for forward in std::iter::once(&of_operand.forward).chain(eight_bit) {
            if few { &forward.unpacked } else { &forward.packed }.count();
        }
        let cut = &self.runs.forward_task;
        match task.rows.queries.len() < self.problem.query_len(task.rows.batch) {
            true if few => &cut.end_of_head,
            true => &cut.part_of_head,
            false if task.rows.heads.len() > 1 => &cut.heads,
            false => &cut.head,
        }
        .count();
        self.terms.count();
    }

    fn read_queries(&self, rows: &Rows, key_scale: &KeyScale<E::Compute>, to: &mut [E::Compute]) {
        let width = self.query.shape()[3];
        let places = self.problem.query_places(rows.batch);
        for ((head, query), to) in rows.iter().zip(to.chunks_exact_mut(width)) {
            let [outer, row] = places.of(query);
            read_row::<E>(self.query.row(&[outer, row, head]), to);
            key_scale.apply_to_query(to);
        }
    }

    /// Turns the products of a block into unnormalised probabilities, dropped out where the problem says so.
    fn softmax(
        &self,
        rows: &Rows,
        columns: &Columns,
        logits: &mut [E::Compute],
        stride: usize,
    ) -> Vec<RowSoftmax<E::Compute>> {
        let results = dispatch(SoftmaxRows {
            terms: &self.terms,
            sinks: self.sinks.as_ref(),
            rows,
            columns,
            logits: &mut *logits,
            stride,
            capped: None,
        });
        let keys = self.problem.key_value_len(rows.batch);
        for ((head, query), row) in rows.iter().zip(logits.chunks_mut(stride)) {
            if let Some(dropout) = RowDropout::new(self.problem, rows.batch, head, query) {
                dropout.apply(columns, keys, row);
            }
        }
        results
    }

    /// Normalises and writes the rows of a block.
    fn write(
        &self,
        task: &Task,
        rows: &Rows,
        results: &[RowSoftmax<E::Compute>],
        sums: &mut [E::Compute],
        outputs: &mut Outputs<'_, E::Element, E::Statistics>,
    ) {
        let width = self.value.shape()[3];
        let value_scale = K::value_scale::<E::Compute>(self.problem, task.rows.batch, task.key_head);
        for (((head, query), result), sums) in rows.iter().zip(results).zip(sums.chunks_exact_mut(width)) {
            for sum in sums.iter_mut() {
                // A zero is positive, whatever the signs of values that take no part.
                let mean = *sum / result.total;
                *sum = value_scale.map_or(mean, |scale| scale * mean) + E::Compute::ZERO;
            }
            let (head, query) = (head - task.rows.heads.start, query - task.rows.queries.start);
            write_row::<E>(outputs.out[head].row_mut(&[query]), sums);
            if let Some(lse) = outputs.lse.get_mut(head) {
                lse.set(&[query], E::Statistics::from_f64(result.lse.to_f64()));
            }
        }
    }

    /// A task of few rows: each key and value is read once, for all rows of the group.
    fn direct(
        &self,
        task: &Task,
        keys: &Head<'_, K::Of<E>>,
        values: &Head<'_, K::Of<E>>,
        key_scale: &KeyScale<E::Compute>,
        outputs: &mut Outputs<'_, E::Element, E::Statistics>,
        scratch: &mut Scratch<'_, E::Compute>,
    ) {
        let rows = &task.rows;
        let columns = Columns { start: task.keys.start, count: task.keys.len() };
        let stride = cut::logits_stride(task.keys.len()).unwrap_or_else(|| unreachable!("sized before"));
        let (width, value_width) = (keys.width(), values.width());
        [keys, values].into_iter().for_each(|rows| rows.count_borrowed(E::runs(self.runs)));
        self.read_queries(rows, key_scale, scratch.query);
        let queries = &scratch.query[..rows.len() * width];
        let scale = key_scale.of_products;
        direct::products(keys, task.keys.clone(), queries, scale, scratch.row, scratch.logits, stride);
        let results = self.softmax(rows, &columns, scratch.logits, stride);
        let sums = &mut scratch.sums[..rows.len() * value_width];
        direct::weighted_sums(values, task.keys.clone(), scratch.logits, stride, scratch.row, sums);
        self.write(task, rows, &results, scratch.sums, outputs);
    }
}
