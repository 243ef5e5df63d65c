//! A sequence of a packed or paged call alone: the same bits as among others.

use super::invariance::is_summed_over_batch;
use super::{Base, Laid, SavedTensors, Stop};
use crate::cases::{Case, CaseData, KeyRows, Layout, Layouts, Numbers};
use crate::tensor::{HostTensor, unravel};

/// The most sequences of a case that are called alone.
const MOST: usize = 3;

impl Base<'_> {
    /// Calls sequences alone, packed or paged as they are; the number of them.
    pub(crate) fn sequences_alone(&self) -> Result<usize, Stop> {
        let batch = self.case.dims.batch;
        if self.case.sequences.is_none() || batch < 2 {
            return Ok(0);
        }
        // The dropout stream counts sequences, so only the first one keeps its bits.
        let most = if self.case.options.dropout.is_some() { 1 } else { MOST };
        let rows: Vec<usize> =
            (0..batch).filter(|&row| row + 1 < most || row + 1 == batch || row == 0).collect();
        let rows = &rows[..rows.len().min(most)];
        rows.iter().try_for_each(|&row| self.sequence_alone(row))?;
        Ok(rows.len())
    }

    fn sequence_alone(&self, row: usize) -> Result<(), Stop> {
        let (case, data) = (self.case.alone(row), self.data.alone(row));
        let saved = self.saved.map(|saved| saved.alone(row));
        let laid = Laid::new(&case, &data, saved.as_ref());
        let problem = self
            .problem_of(&case, &laid.data)
            // The range of the offsets is that of all sequences.
            .and_then(|problem| problem.to_builder().alignment(self.problem.alignment()).build())
            .map_err(|error| Stop::failed(format!("sequence {row} alone: {error}")))?;
        let part = laid.invocation(&problem, &case.layouts).run(self.subject.backend)?;
        for (role, alone) in part.iter() {
            let whole = self.results.get(role).expect("the same outputs");
            if is_summed_over_batch(role, whole, self.case.dims.batch) {
                continue;
            }
            let (bits, values) = (whole.bits(), whole.values());
            let (alone_bits, alone_values) = (alone.bits(), alone.values());
            for index in 0..alone_bits.len() {
                let among = row * alone_bits.len() + index;
                let both_nan = values[among].is_nan() && alone_values[index].is_nan();
                if bits[among] != alone_bits[index] && !both_nan {
                    let at = unravel(among, &whole.desc().shape());
                    return Err(Stop::failed(format!(
                        "{role}{at:?} is {:e} among other sequences and {:e} with sequence {row} alone",
                        values[among], alone_values[index]
                    )));
                }
            }
        }
        Ok(())
    }
}

impl Case {
    /// The case with one of its sequences.
    fn alone(&self, row: usize) -> Self {
        let mut case = self.clone();
        case.dims.batch = 1;
        case.layouts = Layouts::default();
        let options = &mut case.options;
        for lengths in [&mut options.query_lengths, &mut options.key_value_lengths].into_iter().flatten() {
            *lengths = vec![lengths[row]];
        }
        if let Some(offsets) = &mut options.query_offsets {
            *offsets = vec![offsets[row]];
        }
        if let Some(sequences) = &mut case.sequences {
            // Rows of no sequence are others too.
            sequences.query_tail = sequences.query_tail.map(|tail| tail + 1);
            match &mut sequences.keys {
                KeyRows::Packed { tail, unused } => {
                    *tail += 1;
                    if let Some(unused) = unused {
                        *unused = vec![unused[row]];
                    }
                }
                KeyRows::Paged { spare, .. } => *spare += 1,
                KeyRows::Dense => {}
            }
        }
        case
    }
}

impl CaseData {
    /// The tensors with one batch row.
    fn alone(&self, row: usize) -> Self {
        let broadcast = |tensor: &Option<HostTensor>, rank: usize| {
            tensor.as_ref().map(|tensor| {
                let shape = tensor.desc().shape();
                if shape.rank() == rank && shape[0] > 1 { alone(tensor, row) } else { tensor.clone() }
            })
        };
        let list = |tensor: &Option<HostTensor>| tensor.as_ref().map(|tensor| alone(tensor, row));
        Self {
            query: alone(&self.query, row),
            key: alone(&self.key, row),
            value: alone(&self.value, row),
            mask: broadcast(&self.mask, 4),
            bias: broadcast(&self.bias, 4),
            alibi_slopes: broadcast(&self.alibi_slopes, 2),
            sinks: self.sinks.clone(),
            numbers: Numbers {
                query_offsets: list(&self.numbers.query_offsets),
                query_lengths: list(&self.numbers.query_lengths),
                key_value_lengths: list(&self.numbers.key_value_lengths),
                key_scales: broadcast(&self.numbers.key_scales, 2),
                value_scales: broadcast(&self.numbers.value_scales, 2),
                ..self.numbers.clone()
            },
            d_out: alone(&self.d_out, row),
            d_lse: list(&self.d_lse),
            garbage: self.garbage,
        }
    }
}

impl SavedTensors {
    fn alone(&self, row: usize) -> Self {
        Self { out: alone(&self.out, row), lse: alone(&self.lse, row) }
    }
}

/// One index of the first axis.
fn alone(tensor: &HostTensor, row: usize) -> HostTensor {
    let mut shape = tensor.desc().shape();
    shape[0] = 1;
    let count: usize = shape.iter().product();
    tensor.rearranged(shape, Layout::Contiguous, |index| Ok(row * count + index))
}
