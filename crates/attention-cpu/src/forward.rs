//! The forward pass: blocks of query rows against all their keys.

use attention_core::{Dimensions, ForwardCall, HostView, HostViewMut, Inputs, Problem, Scalar, ViewMut};
use bytemuck::Pod;

use crate::bias::AnyFloat;
use crate::config::CpuConfig;
use crate::elementary::Compute;
use crate::logits::{Rows, Terms};
use crate::operand::{Head, Operand, read_row, write_row};
use crate::packed::{Columns, Dense, Panels, panel_elements};
use crate::plan::{self, Task, TaskSize};
use crate::scratch::{Carver, piece_bytes};
use crate::simd::{Kernel, dispatch};
use crate::softmax::{RowDropout, RowSoftmax, softmax};
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
    /// Makes room for a task; `None` on overflow.
    fn make_room(&mut self, task: &Task, dims: Dimensions) -> Option<()> {
        let keys = task.keys.len();
        if !plan::few_rows(task.rows.len()) {
            self.panels = self.panels.max(panel_elements(keys, dims.head_dim)?);
            self.values = self.values.max(keys.checked_mul(dims.value_head_dim)?);
        }
        let rows = task.rows.len().min(plan::block_rows(keys, 1));
        self.query = self.query.max(rows.checked_mul(dims.head_dim)?);
        self.logits = self.logits.max(rows.checked_mul(plan::logits_stride(keys)?)?);
        self.sums = self.sums.max(rows.checked_mul(dims.value_head_dim)?);
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

/// What a problem takes, read off its tasks once.
pub(crate) struct Sizes {
    /// Large enough for every task of the batch rows that are not small.
    pieces: Pieces,
    /// Large enough for every task of the small batch rows.
    small_pieces: Pieces,
    /// Bytes of scratch a worker needs.
    pub(crate) bytes_per_worker: usize,
    /// How many tasks can run side by side.
    pub(crate) tasks: usize,
}

impl Sizes {
    /// `None` on overflow.
    pub(crate) fn of<E: Operand>(problem: &Problem) -> Option<Self> {
        let dims = problem.dims();
        let row = dims.head_dim.max(dims.value_head_dim).checked_mul(direct::KEYS)?;
        let empty = Pieces { row, ..Pieces::default() };
        let (mut pieces, mut small_pieces, mut tasks) = (empty, empty, 0);
        for task in plan::tasks(problem) {
            let small = plan::is_small::<E>(problem, task.rows.batch);
            if small { &mut small_pieces } else { &mut pieces }.make_room(&task, dims)?;
            tasks += 1;
        }
        let bytes = pieces.bytes::<E::Compute>()?;
        let small_bytes = small_pieces.bytes::<<E::Small as Operand>::Compute>()?;
        Some(Self { pieces, small_pieces, bytes_per_worker: bytes.max(small_bytes), tasks })
    }
}

/// What a task writes: for each of its heads, its query rows of the output and the logsumexp.
struct Outputs<'a, T, L> {
    out: Vec<HostViewMut<'a, T>>,
    lse: Vec<HostViewMut<'a, L>>,
}

/// Everything that the tasks of a call share.
struct Shared<'a, E: Operand> {
    problem: &'a Problem,
    query: HostView<'a, E::Element>,
    key: HostView<'a, E::Element>,
    value: HostView<'a, E::Element>,
    terms: Terms<'a, E::Compute>,
    sinks: Option<AnyFloat<'a>>,
}

/// Runs a checked call in checked scratch.
pub(crate) fn run<E: Operand>(call: ForwardCall<'_>, config: &CpuConfig, scratch: &mut [u8]) {
    let (problem, inputs, outputs) = call.into_parts();
    let shared = Shared::<E>::new(problem, &inputs);
    let small = Shared::<E::Small>::new(problem, &inputs);
    let lse = outputs.lse.map(|lse| cut::<E::Statistics>(lse, problem));
    let mut out = cut::<E::Element>(outputs.out, problem).into_iter();
    let mut lse = lse.map(Vec::into_iter);
    // The outputs were cut in the order of the tasks.
    let mut tasks: Vec<_> = plan::tasks(problem)
        .map(|task| {
            let heads = task.rows.heads.len();
            let out = out.by_ref().take(heads).collect();
            let lse = lse.as_mut().map_or_else(Vec::new, |lse| lse.by_ref().take(heads).collect());
            (task, Outputs { out, lse })
        })
        .collect();
    // Under causal masking the last rows of a head see the most keys: begin with those.
    tasks.reverse();

    let sizes = Sizes::of::<E>(problem).unwrap_or_else(|| unreachable!("the scratch was sized before"));
    let scratch = workers::divide(scratch, sizes.bytes_per_worker, config.thread_count());
    workers::run(tasks, scratch, |(task, mut outputs), scratch| {
        if plan::is_small::<E>(problem, task.rows.batch) {
            small.task(&task, &mut outputs, &mut Scratch::carve(&sizes.small_pieces, scratch));
        } else {
            shared.task(&task, &mut outputs, &mut Scratch::carve(&sizes.pieces, scratch));
        }
    });
}

/// Cuts an output `[B, T, N]` or `[B, T, N, Hv]` into parts of one head each, in the order of the tasks, and fills
/// the padded rows: with 0 an output, with -inf a logsumexp.
fn cut<'a, T: attention_core::Scalar>(output: ViewMut<'a>, problem: &Problem) -> Vec<HostViewMut<'a, T>> {
    let dims = problem.dims();
    let is_lse = output.shape().rank() == 3;
    let host = |view: ViewMut<'a>| {
        view.host_mut::<T>()
            .unwrap_or_else(|| unreachable!("a checked call has outputs of its dtype in host memory"))
    };
    let mut parts = Vec::new();
    for (batch, output) in output.into_axis(0).enumerate() {
        let queries = problem.query_len(batch);
        let [live, padding] = output
            .split(0, [queries, dims.query_length - queries])
            .unwrap_or_else(|_| unreachable!("a query length is at most T"));
        for row in padding.into_axis(0) {
            fill(host(row), if is_lse { T::from_f32(f32::NEG_INFINITY) } else { T::from_f32(0.0) });
        }
        let size = TaskSize::of(queries, dims.group_size());
        let mut heads: Vec<_> = live.into_axis(1).map(|head| head.into_chunks(0, size.queries)).collect();
        // No query heads make no groups, and the size of a group may be 0 then.
        for group in heads.chunks_mut(dims.group_size().max(1)) {
            for heads in group.chunks_mut(size.heads) {
                for _ in 0..queries.div_ceil(size.queries) {
                    parts.extend(heads.iter_mut().filter_map(Iterator::next).map(host));
                }
            }
        }
    }
    parts
}

/// Writes one number everywhere: `[N]` or `[N, Hv]`.
fn fill<T: attention_core::Scalar>(mut view: HostViewMut<'_, T>, value: T) {
    if view.shape().rank() == 1 {
        view.row_mut(&[]).fill_with(|_| value);
    } else {
        for index in 0..view.shape()[0] {
            view.row_mut(&[index]).fill_with(|_| value);
        }
    }
}

impl<'a, E: Operand> Shared<'a, E> {
    fn new(problem: &'a Problem, inputs: &Inputs<'a>) -> Self {
        let host = |view: attention_core::View<'a>| {
            view.host::<E::Element>()
                .unwrap_or_else(|| unreachable!("a checked call has operands of its dtype in host memory"))
        };
        Self {
            problem,
            query: host(inputs.query),
            key: host(inputs.key),
            value: host(inputs.value),
            terms: Terms::new(problem, inputs),
            sinks: inputs.sinks.map(AnyFloat::new),
        }
    }

    fn sink(&self, head: usize) -> Option<E::Compute> {
        self.sinks.as_ref().map(|sinks| sinks.at(&[head]))
    }

    fn task(
        &self,
        task: &Task,
        outputs: &mut Outputs<'_, E::Element, E::Statistics>,
        scratch: &mut Scratch<'_, E::Compute>,
    ) {
        let batch = task.rows.batch;
        let keys = Head::<E>::new(&self.key, batch, task.key_head);
        let values = Head::<E>::new(&self.value, batch, task.key_head);
        if plan::few_rows(task.rows.len()) {
            self.direct(task, &keys, &values, outputs, scratch);
            return;
        }
        let panels = Panels::pack(&keys, task.keys.clone(), scratch.panels, scratch.row);
        let values = Dense::pack(&values, task.keys.clone(), scratch.values);
        let stride = plan::logits_stride(task.keys.len()).unwrap_or_else(|| unreachable!("sized before"));
        for (rows, keys) in plan::blocks(self.problem, &task.rows, &task.keys, 1) {
            self.read_queries(&rows, scratch.query);
            let columns = panels.columns(&keys);
            let width = self.query.shape()[3];
            panels.product(
                &scratch.query[..rows.len() * width],
                &columns,
                self.terms.scale,
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

    fn read_queries(&self, rows: &Rows, to: &mut [E::Compute]) {
        let width = self.query.shape()[3];
        for ((head, query), to) in rows.iter().zip(to.chunks_exact_mut(width)) {
            read_row::<E>(self.query.row(&[rows.batch, query, head]), to);
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
        struct Block<'b, 'a, E: Operand> {
            shared: &'b Shared<'a, E>,
            rows: &'b Rows,
            columns: &'b Columns,
            logits: &'b mut [E::Compute],
            stride: usize,
        }

        impl<E: Operand> Kernel for Block<'_, '_, E> {
            type Output = Vec<RowSoftmax<E::Compute>>;

            #[inline(always)]
            fn run<const FMA: bool>(self) -> Self::Output {
                let Self { shared, rows, columns, logits, stride } = self;
                let mut results = Vec::with_capacity(rows.len());
                for ((head, query), row) in rows.iter().zip(logits.chunks_mut(stride)) {
                    let row = &mut row[..columns.count];
                    shared.terms.apply::<FMA>(rows.batch, (head, query), columns, row, None);
                    results.push(softmax::<_, FMA>(row, shared.sink(head)));
                }
                results
            }
        }

        let results = dispatch(Block { shared: self, rows, columns, logits: &mut *logits, stride });
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
        for (((head, query), result), sums) in rows.iter().zip(results).zip(sums.chunks_exact_mut(width)) {
            for sum in sums.iter_mut() {
                *sum = *sum / result.total;
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
        keys: &Head<'_, E>,
        values: &Head<'_, E>,
        outputs: &mut Outputs<'_, E::Element, E::Statistics>,
        scratch: &mut Scratch<'_, E::Compute>,
    ) {
        let rows = &task.rows;
        let columns = Columns { start: task.keys.start, count: task.keys.len() };
        let stride = plan::logits_stride(task.keys.len()).unwrap_or_else(|| unreachable!("sized before"));
        let (width, value_width) = (keys.width(), values.width());
        self.read_queries(rows, scratch.query);
        let queries = &scratch.query[..rows.len() * width];
        let scale = self.terms.scale;
        direct::products(keys, task.keys.clone(), queries, scale, scratch.row, scratch.logits, stride);
        let results = self.softmax(rows, &columns, scratch.logits, stride);
        let sums = &mut scratch.sums[..rows.len() * value_width];
        direct::weighted_sums(values, task.keys.clone(), scratch.logits, stride, scratch.row, sums);
        self.write(task, rows, &results, scratch.sums, outputs);
    }
}
