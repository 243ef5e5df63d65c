//! The tensors of a call with packed or paged sequences, made of those of the padded call that means the
//! same.

use std::borrow::Cow;

use attention_core::{DType, Role};

use super::numbers::{dtype_for, tensor};
use super::{Case, CaseData, KeyRows, Layout, Numbers, Sequences};
use crate::oracle::{Dead, Padding, Structure};
use crate::rng::Rng;
use crate::tensor::HostTensor;

impl Sequences {
    /// Other layouts of sequences of these lengths; `None` is the padded one.
    pub(crate) fn others(&self, case: &Case, backward: bool) -> Vec<Option<Self>> {
        let unused =
            case.lengths(Role::Key).into_iter().map(|length| 2.min(case.dims.key_length - length)).collect();
        let packed = |keys: KeyRows| Self { query_tail: Some(1), keys };
        let mut others = vec![
            packed(KeyRows::Packed { tail: 0, unused: None }),
            packed(KeyRows::Packed { tail: 9, unused: Some(unused) }),
            packed(KeyRows::Dense),
        ];
        if !backward {
            others.push(Self::paged(1));
            others.push(packed(Self::paged(5).keys));
        }
        others.into_iter().map(Some).chain([None]).filter(|other| other.as_ref() != Some(self)).collect()
    }
}

impl Case {
    /// How many query rows each sequence has, or keys.
    pub(crate) fn lengths(&self, role: Role) -> Vec<usize> {
        let (lengths, full) = match role {
            Role::Query => (&self.options.query_lengths, self.dims.query_length),
            _ => (&self.options.key_value_lengths, self.dims.key_length),
        };
        lengths.clone().unwrap_or_else(|| vec![full; self.dims.batch])
    }

    /// The tensors of the call, made of those of the padded one, which they are where nothing is packed or in
    /// pages.
    pub fn laid_out<'d>(&self, padded: &'d CaseData) -> Cow<'d, CaseData> {
        let Some(sequences) = &self.sequences else { return Cow::Borrowed(padded) };
        let numbers = self.numbers_of(sequences, &padded.numbers);
        let Some(padding) = self.padding(&numbers) else { return Cow::Borrowed(padded) };
        let mut rng = Rng::named(self.content.seed, "rows of no sequence");
        let mut lay_out = |role: Role, tensor: &HostTensor| {
            padding.lay_out(role, tensor, self.layouts.of(role), || of_no_sequence(padded.garbage, &mut rng))
        };
        Cow::Owned(CaseData {
            query: lay_out(Role::Query, &padded.query),
            key: lay_out(Role::Key, &padded.key),
            value: lay_out(Role::Value, &padded.value),
            d_out: lay_out(Role::DOut, &padded.d_out),
            d_lse: padded.d_lse.as_ref().map(|d_lse| lay_out(Role::DLse, d_lse)),
            mask: padded.mask.clone(),
            bias: padded.bias.clone(),
            alibi_slopes: padded.alibi_slopes.clone(),
            sinks: padded.sinks.clone(),
            numbers,
            garbage: padded.garbage,
        })
    }

    /// Gives all keys that share a place the numbers of the first of them.
    pub(crate) fn share(&self, padded: &mut CaseData) {
        let Some(padding) = self.sharing(padded) else { return };
        for (role, tensor) in [(Role::Key, &mut padded.key), (Role::Value, &mut padded.value)] {
            let places = padding.places(role).expect("keys are in pages");
            let together = places.pad(&places.lay_out(tensor, Layout::Contiguous, || 0.0), 0.0);
            *tensor = together;
        }
    }

    /// What nothing may read in the padded call, and no sequence that shares a key.
    pub(super) fn dead(&self, structure: &Structure, padded: &CaseData) -> Dead {
        let mut dead = structure.dead();
        if let Some(padding) = self.sharing(padded) {
            let places = padding.places(Role::Key).expect("keys are in pages");
            dead.share(|batch, key| places.of(batch, key));
        }
        dead
    }

    /// Where rows are, where sequences share some.
    fn sharing(&self, padded: &CaseData) -> Option<Padding> {
        let sequences = self.sequences.as_ref().filter(|sequences| sequences.share_keys())?;
        self.padding(&self.numbers_of(sequences, &padded.numbers))
    }

    /// Where rows are, by the numbers of a call of this case.
    pub(crate) fn padding(&self, numbers: &Numbers) -> Option<Padding> {
        let longest = [self.dims.query_length, self.dims.key_length];
        let keys = match &self.sequences.as_ref()?.keys {
            KeyRows::Paged { page_size, .. } => [self.pages(), *page_size],
            _ => [1, self.key_rows()],
        };
        Padding::new(&numbers.data(), longest, [[1, self.query_rows()], keys])
    }

    /// The rows of packed queries.
    fn query_rows(&self) -> usize {
        let tail = self.sequences.as_ref().and_then(|sequences| sequences.query_tail).unwrap_or(0);
        self.lengths(Role::Query).into_iter().sum::<usize>() + tail
    }

    /// The rows of packed keys.
    fn key_rows(&self) -> usize {
        let Some(Sequences { keys: KeyRows::Packed { tail, unused }, .. }) = &self.sequences else {
            return 0;
        };
        let unused: usize = unused.iter().flatten().sum();
        self.lengths(Role::Key).into_iter().sum::<usize>() + unused + tail
    }

    /// How many pages there are.
    fn pages(&self) -> usize {
        let Some(Sequences { keys: KeyRows::Paged { page_size, spare, shared, .. }, .. }) = self.sequences
        else {
            return 0;
        };
        let needed = self.pages_of(page_size);
        let own: usize = needed.iter().map(|&needed| needed.saturating_sub(shared)).sum();
        own + needed.into_iter().max().unwrap_or(0).min(shared) + spare
    }

    /// How many pages each sequence needs.
    fn pages_of(&self, page_size: usize) -> Vec<usize> {
        self.lengths(Role::Key).into_iter().map(|length| length.div_ceil(page_size)).collect()
    }

    /// The numbers of the call, of those of the padded one.
    fn numbers_of(&self, sequences: &Sequences, padded: &Numbers) -> Numbers {
        let mut numbers = padded.clone();
        let lengths =
            |role: Role| -> Vec<i64> { self.lengths(role).into_iter().map(|length| length as i64).collect() };
        if sequences.query_tail.is_some() {
            numbers.query_lengths = None;
            numbers.query_starts = Some(tensor(self, Role::QueryStarts, &starts(&lengths(Role::Query))));
        }
        let own_lengths = || tensor(self, Role::KeyValueLengths, &lengths(Role::Key));
        match &sequences.keys {
            KeyRows::Packed { unused, .. } => {
                let mut rows = lengths(Role::Key);
                match unused {
                    None => numbers.key_value_lengths = None,
                    Some(unused) => {
                        rows.iter_mut().zip(unused).for_each(|(row, &unused)| *row += unused as i64);
                        numbers.key_value_lengths.get_or_insert_with(own_lengths);
                    }
                }
                numbers.key_value_starts = Some(tensor(self, Role::KeyValueStarts, &starts(&rows)));
            }
            KeyRows::Paged { page_size, shared, in_order, .. } => {
                numbers.block_table = Some(self.table(*page_size, *shared, *in_order));
                numbers.key_value_lengths.get_or_insert_with(own_lengths);
            }
            KeyRows::Dense => {
                numbers.key_value_lengths.get_or_insert_with(own_lengths);
            }
        }
        numbers
    }

    /// A table with one column more than any sequence needs, whose entries that none needs are no pages.
    fn table(&self, page_size: usize, shared: usize, in_order: bool) -> HostTensor {
        let (needed, pages) = (self.pages_of(page_size), self.pages());
        let most = needed.iter().copied().max().unwrap_or(0);
        let mut rng = Rng::named(self.content.seed, "block table");
        let mut order: Vec<usize> = (0..pages).collect();
        if !in_order {
            (1..pages).for_each(|page| order.swap(page, rng.below(page + 1)));
        }
        let together: Vec<usize> = order.drain(..most.min(shared)).collect();
        let mut own = order.into_iter();
        let mut entries = Vec::new();
        for &needed in &needed {
            entries.extend((0..=most).map(|entry| match entry {
                _ if entry >= needed => rng.pick(&[-1, -1, i64::from(i32::MAX), pages as i64]),
                _ if entry < shared => together[entry] as i64,
                _ => own.next().expect("pages were counted") as i64,
            }));
        }
        let dtype = dtype_for(self, Role::BlockTable, &[pages as i64]);
        let layout = self.layouts.of(Role::BlockTable);
        HostTensor::from_integers(dtype, [needed.len(), most + 1], layout, |index| entries[index])
    }
}

/// Gives the case a seed by which the integers of this role have this dtype.
pub(super) fn draw_dtype(case: &mut Case, role: Role, dtype: DType) {
    while dtype_for(case, role, &[]) != dtype {
        case.content.seed += 1;
    }
}

/// Where sequences of these lengths start, and the end of the last.
pub(crate) fn starts(lengths: &[i64]) -> Vec<i64> {
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// A number of a row that no sequence has.
pub(crate) fn of_no_sequence(garbage: bool, rng: &mut Rng) -> f64 {
    if garbage { rng.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 6e4]) } else { rng.normal() }
}
