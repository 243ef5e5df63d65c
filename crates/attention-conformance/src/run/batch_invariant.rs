//! The promise of batch invariance: each sequence of a call has the bits that it has alone, in a dense call
//! of its own sizes, and the bits that it has in every other layout and beside larger bounds.

use attention_core::Role;

use super::{Base, Laid, SavedTensors, Stop};
use crate::cases::{Broadcast, Case, CaseData, KeyRows, Layout, Layouts, Numbers, Sequences};
use crate::tensor::{HostTensor, unravel};

/// The most sequences of a case that are called alone.
const MOST: usize = 4;

/// More keys than this are cut on GPUs already, so larger bounds ask nothing new.
const MANY_KEYS: usize = 2048;

impl Base<'_> {
    /// Makes every call that must give the same bits of a sequence as this one.
    pub(super) fn batch_invariant(&self) -> Result<(), Stop> {
        let Case { dims, options, .. } = self.case;
        // The dropout stream counts sequences, so only the first one keeps its bits.
        let most = if options.dropout.is_some() { 1 } else { MOST };
        (0..dims.batch.min(most)).try_for_each(|row| self.dense_alone(row))?;
        self.layouts_of_sequences().into_iter().try_for_each(|sequences| {
            let how = match &sequences {
                Some(sequences) => format!("with its sequences as {sequences:?}"),
                None => "with its sequences as batch rows".to_owned(),
            };
            self.changed(&Case { sequences, layouts: Layouts::default(), ..self.case.clone() }, &how)
        })?;
        if dims.key_length > MANY_KEYS {
            return Ok(());
        }
        let (queries, keys) = (200, MANY_KEYS + 100);
        let how = format!("when its bounds are larger by {queries} queries and {keys} keys");
        self.changed(&self.padded_case(queries, keys), &how)
    }

    /// The layouts that the sequences may have.
    fn layouts_of_sequences(&self) -> Vec<Option<Sequences>> {
        let packed = |keys: KeyRows| Sequences { query_tail: Some(1), keys };
        let mut layouts = vec![
            packed(KeyRows::Packed { tail: 0, unused: None }),
            packed(KeyRows::Packed { tail: 9, unused: Some(vec![0; self.case.dims.batch]) }),
            packed(KeyRows::Dense),
        ];
        if self.saved.is_none() {
            layouts.push(Sequences::paged(1));
            layouts.push(Sequences::paged(16));
            layouts.push(packed(Sequences::paged(16).keys));
        }
        let others = layouts.into_iter().map(Some).chain([None]);
        others.filter(|sequences| *sequences != self.case.sequences).collect()
    }

    /// The sequence in a dense call of its own sizes.
    fn dense_alone(&self, row: usize) -> Result<(), Stop> {
        let case = self.case.dense_alone(row);
        if case.dims.query_length == 0 {
            return Ok(());
        }
        let data = self.data.dense_alone(self.case, &case, row);
        let saved = self.saved.map(|saved| {
            let d = case.dims;
            let shape = [1, d.query_length, d.query_heads, d.value_head_dim];
            SavedTensors { out: part(&saved.out, row, &shape), lse: part(&saved.lse, row, &shape[..3]) }
        });
        let laid = Laid::new(&case, &data, saved.as_ref());
        let problem = self
            .problem_of(&case, &laid.data)
            .map_err(|error| Stop::failed(format!("sequence {row} alone and dense: {error}")))?;
        self.subject
            .backend
            .supports(&problem)
            .map_err(|refusal| Stop::failed(format!("refuses sequence {row} alone and dense: {refusal}")))?;
        let alone = laid.invocation(&problem, &case.layouts).run(self.subject.backend)?;
        for (role, alone) in alone.iter() {
            if matches!(role, Role::DBias | Role::DSinks) {
                continue;
            }
            let whole = self.results.get(role).expect("the same outputs");
            let (shape, padded) = (alone.desc().shape(), whole.desc().shape());
            let (bits, values) = (whole.bits(), whole.values());
            let (alone_bits, alone_values) = (alone.bits(), alone.values());
            for index in 0..alone_bits.len() {
                let among = place(&unravel(index, &shape), row, &padded);
                let both_nan = values[among].is_nan() && alone_values[index].is_nan();
                if bits[among] != alone_bits[index] && !both_nan {
                    let at = unravel(among, &padded);
                    return Err(Stop::failed(format!(
                        "{role}{at:?} is {:e} among other sequences and {:e} with sequence {row} alone and dense",
                        values[among], alone_values[index]
                    )));
                }
            }
        }
        Ok(())
    }
}

impl Case {
    /// The case with one of its sequences, in tensors of its own sizes.
    fn dense_alone(&self, row: usize) -> Self {
        let mut case = self.clone();
        case.dims.batch = 1;
        case.dims.query_length = self.lengths(Role::Query)[row];
        case.dims.key_length = self.lengths(Role::Key)[row];
        case.layouts = Layouts::default();
        case.sequences = None;
        let options = &mut case.options;
        (options.query_lengths, options.key_value_lengths) = (None, None);
        if let Some(offsets) = &mut options.query_offsets {
            *offsets = vec![offsets[row]];
        }
        case
    }
}

impl CaseData {
    /// The tensors of a sequence, where `case` has it alone.
    fn dense_alone(&self, among: &Case, case: &Case, row: usize) -> Self {
        let d = case.dims;
        let broadcast = |tensor: &Option<HostTensor>, pattern: Option<Broadcast>| {
            let (tensor, pattern) = (tensor.as_ref()?, pattern?);
            // Whether the first axis is that of sequences, and has them.
            let own = if pattern.rank == 4 && pattern.full[0] { row } else { 0 };
            Some(part(tensor, own, &pattern.shape(&d)))
        };
        let results = [1, d.query_length, d.query_heads, d.value_head_dim];
        let slopes = |tensor: &HostTensor| match tensor.desc().rank() {
            2 => part(tensor, row, &[1, d.query_heads]),
            _ => tensor.clone(),
        };
        Self {
            query: part(&self.query, row, &[1, d.query_length, d.query_heads, d.head_dim]),
            key: part(&self.key, row, &[1, d.key_length, d.key_heads, d.head_dim]),
            value: part(&self.value, row, &[1, d.key_length, d.key_heads, d.value_head_dim]),
            mask: broadcast(&self.mask, among.options.mask),
            bias: broadcast(&self.bias, among.options.bias),
            alibi_slopes: self.alibi_slopes.as_ref().map(slopes),
            sinks: self.sinks.clone(),
            numbers: Numbers::of(case),
            d_out: part(&self.d_out, row, &results),
            d_lse: self.d_lse.as_ref().map(|d_lse| part(d_lse, row, &results[..3])),
            garbage: false,
        }
    }
}

/// Where an element of a sequence alone is among others, in a tensor of this shape.
fn place(at: &[usize], row: usize, padded: &[usize]) -> usize {
    let first = [row + at[0]].into_iter();
    first.chain(at[1..].iter().copied()).zip(padded).fold(0, |flat, (index, &size)| flat * size + index)
}

/// The beginning of each axis behind the first, and from the first axis what begins with index `row`.
fn part(tensor: &HostTensor, row: usize, shape: &[usize]) -> HostTensor {
    let padded = tensor.desc().shape();
    let dims = attention_core::Dims::from_slice(shape).expect("at most four axes");
    tensor.rearranged(dims, Layout::Contiguous, |index| Ok(place(&unravel(index, shape), row, &padded)))
}
