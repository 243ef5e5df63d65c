//! The padded call that means what a packed or paged one means: each sequence is a batch row with lengths.

use attention_core::{CallData, Dims, Inputs, Problem, Role, View};

use super::Dense;
use super::dense::integers;
use crate::cases::Layout;
use crate::tensor::HostTensor;

/// Where the rows of sequences are in the tensors of one side of a call. Read from starts, tables and lengths
/// as `docs/semantics.md` has it, apart from the core.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The first two axes of the tensors.
    axes: [usize; 2],
    batch: usize,
    /// How many rows each sequence has in the padded call.
    longest: usize,
    /// By row of the padded call, `[B, longest]`: which row of the tensors it is.
    rows: Vec<Option<usize>>,
}

/// Where the rows of packed and paged sequences are; `None` for a side that is dense.
#[derive(Clone, Debug)]
pub(crate) struct Padding {
    queries: Option<Places>,
    keys: Option<Places>,
}

impl Places {
    fn packed(total: usize, starts: &[i64], longest: usize) -> Self {
        let mut rows = Vec::new();
        for ends in starts.windows(2) {
            rows.extend((0..longest as i64).map(|row| {
                let row = ends[0] + row;
                (row < ends[1]).then_some(row as usize)
            }));
        }
        Self { axes: [1, total], batch: starts.len().saturating_sub(1), longest, rows }
    }

    /// `table` is `[B, most]`, of which entries that no length reaches are not looked at.
    fn paged([pages, page_size]: [usize; 2], table: &[i64], lengths: &[i64], longest: usize) -> Self {
        let most = table.len() / lengths.len().max(1);
        let mut rows = Vec::new();
        for (batch, &length) in lengths.iter().enumerate() {
            rows.extend((0..longest).map(|key| {
                let page = || table[batch * most + key / page_size] as usize;
                ((key as i64) < length).then(|| page() * page_size + key % page_size)
            }));
        }
        Self { axes: [pages, page_size], batch: lengths.len(), longest, rows }
    }

    /// The tensor of the padded call, with this number where no row of the laid out one is.
    pub(crate) fn pad(&self, tensor: &HostTensor, fill: f64) -> HostTensor {
        let (shape, row) = self.shape([self.batch, self.longest], tensor);
        tensor.rearranged(shape, Layout::Contiguous, |index| {
            self.rows[index / row].map(|source| source * row + index % row).ok_or(fill)
        })
    }

    /// The packed or paged tensor of a padded one. `of_no_sequence` is in the rows that no sequence has.
    pub(crate) fn lay_out(
        &self,
        tensor: &HostTensor,
        layout: Layout,
        mut of_no_sequence: impl FnMut() -> f64,
    ) -> HostTensor {
        let (shape, row) = self.shape(self.axes, tensor);
        let mut sources = vec![None; self.axes.iter().product()];
        for (padded, of_tensor) in self.rows.iter().enumerate() {
            if let Some(of_tensor) = *of_tensor {
                sources[of_tensor].get_or_insert(padded);
            }
        }
        tensor.rearranged(shape, layout, |index| {
            sources[index / row].map(|source| source * row + index % row).ok_or_else(&mut of_no_sequence)
        })
    }

    /// By row of the tensors: whether any sequence has it.
    pub(crate) fn taken(&self) -> Vec<bool> {
        let mut taken = vec![false; self.axes.iter().product()];
        self.rows.iter().flatten().for_each(|&row| taken[row] = true);
        taken
    }

    /// Which row of the tensors row `row` of sequence `batch` is.
    pub(crate) fn of(&self, batch: usize, row: usize) -> Option<usize> {
        self.rows[batch * self.longest + row]
    }

    /// The shape with these first axes, and how many elements a row has.
    fn shape(&self, axes: [usize; 2], tensor: &HostTensor) -> (Dims, usize) {
        let own = tensor.desc().shape();
        let shape: Vec<usize> = axes.into_iter().chain(own[2..].iter().copied()).collect();
        (Dims::from_slice(&shape).expect("at most four axes"), own[2..].iter().product::<usize>().max(1))
    }
}

impl Padding {
    /// That of a call; `None` where both sides are dense.
    ///
    /// # Panics
    /// Where the numbers are not those of the problem, or not in host memory.
    pub(crate) fn of(problem: &Problem, data: &CallData<'_>) -> Option<Self> {
        let d = problem.dims();
        let axes = |role: Role| {
            let shape = problem.tensor(role).expect("every problem has it").shape();
            [shape[0], shape[1]]
        };
        Self::new(data, [d.query_length, d.key_length], [axes(Role::Query), axes(Role::Key)])
    }

    /// That of a call with these numbers, longest sequences, and first two axes of queries and of keys.
    pub(crate) fn new(data: &CallData<'_>, longest: [usize; 2], axes: [[usize; 2]; 2]) -> Option<Self> {
        let read = |view: View<'_>| integers(&view);
        let queries = data.query_starts.map(|starts| Places::packed(axes[0][1], &read(starts), longest[0]));
        let keys = match (data.key_value_starts, data.block_table) {
            (Some(starts), _) => Some(Places::packed(axes[1][1], &read(starts), longest[1])),
            (None, Some(table)) => {
                let lengths = data.key_value_lengths.expect("keys in pages have lengths");
                Some(Places::paged(axes[1], &read(table), &read(lengths), longest[1]))
            }
            (None, None) => None,
        };
        (queries.is_some() || keys.is_some()).then_some(Self { queries, keys })
    }

    /// The tensor of a call, of that of the padded call. `of_no_sequence` is in the rows that no sequence
    /// has.
    pub(crate) fn lay_out(
        &self,
        role: Role,
        tensor: &HostTensor,
        layout: Layout,
        of_no_sequence: impl FnMut() -> f64,
    ) -> HostTensor {
        match self.places(role) {
            Some(places) => places.lay_out(tensor, layout, of_no_sequence),
            None => tensor.clone(),
        }
    }

    /// Where the rows of this tensor are, if it is packed or in pages.
    pub(crate) fn places(&self, role: Role) -> Option<&Places> {
        use Role::{DKey, DLse, DOut, DQuery, DValue, Key, Lse, Out, Query, Value};
        match role {
            Query | Out | Lse | DOut | DLse | DQuery => self.queries.as_ref(),
            Key | Value | DKey | DValue => self.keys.as_ref(),
            _ => None,
        }
    }
}

/// The inputs of the padded call, as far as they are others.
pub(super) struct PaddedInputs {
    pub(super) problem: Problem,
    operands: [HostTensor; 3],
    query_lengths: Option<HostTensor>,
    key_value_lengths: Option<HostTensor>,
}

impl PaddedInputs {
    /// Of a packed or paged call; `None` for a dense one.
    pub(super) fn new(problem: &Problem, inputs: &Inputs<'_>) -> Option<Self> {
        let padding = Padding::of(problem, &inputs.data)?;
        let operand = |role: Role, view: &View<'_>| {
            let tensor = owned(view);
            // No row that is not there is looked at.
            padding.places(role).map_or(tensor.clone(), |places| places.pad(&tensor, 0.0))
        };
        let operands = [
            operand(Role::Query, &inputs.query),
            operand(Role::Key, &inputs.key),
            operand(Role::Value, &inputs.value),
        ];
        let between = |starts: View<'_>| {
            let starts = integers(&starts);
            let length = |batch: usize| starts[batch + 1] - starts[batch];
            HostTensor::from_integers(
                attention_core::DType::I64,
                [starts.len() - 1],
                Layout::Contiguous,
                length,
            )
        };
        let query_lengths = inputs.data.query_starts.map(between);
        let starts = inputs.data.key_value_starts.filter(|_| inputs.data.key_value_lengths.is_none());
        let key_value_lengths = starts.map(between);
        let mut padded = Self { problem: problem.clone(), operands, query_lengths, key_value_lengths };
        let builder = padded.inputs(inputs).problem().causal(problem.causal()).window(problem.window());
        padded.problem = builder.build().expect("the padded form of a valid problem is valid");
        Some(padded)
    }

    pub(super) fn inputs<'a>(&'a self, given: &Inputs<'a>) -> Inputs<'a> {
        let [query, key, value] = self.operands.each_ref().map(HostTensor::view);
        let lengths = |own: &'a Option<HostTensor>| own.as_ref().map(HostTensor::view);
        let data = CallData {
            query_starts: None,
            key_value_starts: None,
            block_table: None,
            query_lengths: lengths(&self.query_lengths).or(given.data.query_lengths),
            key_value_lengths: lengths(&self.key_value_lengths).or(given.data.key_value_lengths),
            ..given.data
        };
        Inputs { query, key, value, data, ..*given }
    }
}

/// A copy with four axes: packed tensors may come without the one in front.
fn owned(view: &View<'_>) -> HostTensor {
    let read = Dense::read(view);
    let mut shape = read.shape;
    if shape.len() < 4 {
        shape.insert(0, 1);
    }
    let shape = Dims::from_slice(&shape).expect("at most four axes");
    HostTensor::from_values(view.desc().dtype(), shape, Layout::Contiguous, |index| read.data[index])
}
