//! Packed and paged calls made at random, and the dense calls that mean the same.

use std::ops::Range;

use attention_chunked::ChunkedBackend;
use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dropout, ForwardCall,
    ForwardOutputs, Gradients, Inputs, QueryOffset, Role, ScratchBuffer, View, ViewMut, Window,
};

use super::{Data, dims, random};

/// Small reproducible numbers.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut new = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1);
        new.below(2);
        new
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    pub(crate) fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// The sequence and the row that something is of, if any.
type Place = Option<(usize, usize)>;

/// How the keys of sequences lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keys {
    Packed,
    /// `[B, longest, K, H]` with lengths.
    Dense,
    /// In pages of this size, in any order. If `shared`, sequences have their first page in common; if
    /// `by_head`, pages are `[K, page size, H]` in memory.
    Paged {
        size: usize,
        shared: bool,
        by_head: bool,
    },
}

/// A call of sequences: its options, and by [`element`](Self::element) its numbers.
#[derive(Clone, Debug)]
pub(crate) struct Sequences {
    pub(crate) dtype: DType,
    /// Query heads, key/value heads, head dimension, value head dimension.
    pub(crate) heads: [usize; 4],
    /// Query rows and keys of each sequence.
    pub(crate) lengths: Vec<[usize; 2]>,
    /// The keys that take part, where some do not.
    pub(crate) used: Option<Vec<usize>>,
    /// Packed rows and keys of no sequence.
    pub(crate) behind: [usize; 2],
    pub(crate) packed_queries: bool,
    pub(crate) keys: Keys,
    /// Elements between neighbouring heads and rows, and between neighbours in a row.
    pub(crate) gaps: [usize; 2],
    pub(crate) causal: bool,
    pub(crate) window: Window,
    pub(crate) offset: QueryOffset,
    pub(crate) offsets: Option<Vec<i64>>,
    pub(crate) scale: Option<f64>,
    pub(crate) softcap: Option<f64>,
    /// Whether there are slopes, and for each sequence its own.
    pub(crate) slopes: Option<bool>,
    pub(crate) sinks: bool,
    /// Which axes of `[B, N, T, S]` are full.
    pub(crate) bias: Option<[bool; 4]>,
    pub(crate) mask: Option<[bool; 4]>,
    pub(crate) dropout: Option<Dropout>,
    pub(crate) d_lse: bool,
    /// Whether the call says how long the longest sequence is.
    pub(crate) bounded: bool,
    /// Whether some operands are infinite.
    pub(crate) infinite: bool,
    pub(crate) seed: u32,
}

/// A tensor in memory, full of NaN where it has gaps.
struct Tensor {
    data: Data,
    shape: Vec<usize>,
    strides: Vec<isize>,
}

impl Tensor {
    /// With axes in this order in memory, outermost first.
    fn new(
        dtype: DType,
        shape: &[usize],
        order: &[usize],
        gaps: [usize; 2],
        at: &dyn Fn(&[usize]) -> f64,
    ) -> Self {
        let mut strides = vec![0; shape.len()];
        let mut step = 1 + gaps[1];
        for (position, &axis) in order.iter().enumerate().rev() {
            strides[axis] = step as isize;
            step *= shape[axis].max(1);
            if position + 2 >= order.len() {
                step += gaps[0] * (1 + gaps[1]);
            }
        }
        let mut numbers = vec![f64::NAN; step];
        for_each_index(shape, &mut |index| {
            let place: isize = index.iter().zip(&strides).map(|(&i, &stride)| i as isize * stride).sum();
            numbers[place as usize] = at(index);
        });
        Self { data: Data::new(dtype, &numbers), shape: shape.to_vec(), strides }
    }

    /// With axes in the order of memory.
    fn in_order(dtype: DType, shape: &[usize], gaps: [usize; 2], at: &dyn Fn(&[usize]) -> f64) -> Self {
        let order: Vec<usize> = (0..shape.len()).collect();
        Self::new(dtype, shape, &order, gaps, at)
    }

    /// Of the shape of another, full of NaN.
    fn like(dtype: DType, other: &Self, gaps: [usize; 2]) -> Self {
        Self::in_order(dtype, &other.shape, gaps, &|_| f64::NAN)
    }

    fn view(&self) -> View<'_> {
        self.data.view_with(&self.shape, &self.strides)
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        self.data.view_mut_with(&self.shape, &self.strides)
    }

    fn bits(&self) -> Bits {
        let all = self.data.bits();
        let mut bits = Vec::new();
        for_each_index(&self.shape, &mut |index| {
            let place: isize = index.iter().zip(&self.strides).map(|(&i, &stride)| i as isize * stride).sum();
            bits.push(all[place as usize]);
        });
        Bits { bits, shape: self.shape.clone() }
    }
}

fn for_each_index(shape: &[usize], work: &mut dyn FnMut(&[usize])) {
    if shape.contains(&0) {
        return;
    }
    let mut index = vec![0; shape.len()];
    loop {
        work(&index);
        let Some(axis) = (0..shape.len()).rev().find(|&axis| index[axis] + 1 < shape[axis]) else { return };
        index[axis] += 1;
        index[axis + 1..].fill(0);
    }
}

/// The bits of a tensor, without gaps.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bits {
    bits: Vec<u64>,
    shape: Vec<usize>,
}

impl Bits {
    /// Everything at these indices of the first axes.
    pub(crate) fn at(&self, leading: &[usize]) -> &[u64] {
        let (first, rest) = self.shape.split_at(leading.len());
        let count: usize = rest.iter().product();
        let mut number = 0;
        for (&index, &size) in leading.iter().zip(first) {
            assert!(index < size, "{leading:?} outside {:?}", self.shape);
            number = number * size + index;
        }
        &self.bits[number * count..][..count]
    }
}

/// What the passes wrote; no gradients where keys are in pages.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Written {
    pub(crate) out: Bits,
    pub(crate) lse: Bits,
    pub(crate) gradients: Option<Written3>,
    pub(crate) dbias: Option<Bits>,
    pub(crate) dsinks: Option<Bits>,
}

/// The gradients of queries, keys and values.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Written3 {
    pub(crate) dq: Bits,
    pub(crate) dk: Bits,
    pub(crate) dv: Bits,
}

/// A number between -1 and 1 that depends on all of these.
fn number(seed: u32, role: u32, index: [usize; 4]) -> f64 {
    let mut state = seed ^ role.wrapping_mul(0x9e37_79b9);
    for index in index {
        state = (state ^ index as u32).wrapping_mul(0x85eb_ca6b);
        state ^= state >> 13;
        state = state.wrapping_mul(0xc2b2_ae35);
        state ^= state >> 16;
    }
    f64::from(state >> 8) / f64::from(1u32 << 23) - 1.0
}

/// The roles of numbers.
const QUERY: u32 = 0;
const KEY: u32 = 1;
const VALUE: u32 = 2;
const D_OUT: u32 = 3;
const D_LSE: u32 = 4;
const BIAS: u32 = 5;
const MASK: u32 = 6;
const SLOPE: u32 = 7;
const INFINITE: u32 = 8;

impl Sequences {
    /// A random call.
    pub(crate) fn random(dtype: DType, seed: u64) -> Self {
        let mut r = Random::new(seed);
        let (key_heads, group) = (r.pick(&[1, 2, 3]), r.pick(&[1, 1, 2, 4]));
        let (width, other) = (r.pick(&[1, 5, 8, 16, 40, 64]), r.pick(&[3, 8, 16, 40]));
        let most = r.pick(&[3, 20, 20, 70]);
        let mut lengths: Vec<[usize; 2]> =
            (0..r.below(6)).map(|_| [r.below(most), r.below(2 * most)]).collect();
        if r.one_in(4) {
            lengths.iter_mut().for_each(|[queries, _]| *queries = (*queries).min(2));
        }
        if !lengths.is_empty() && r.one_in(3) {
            // One long among short ones, in several blocks of keys.
            let index = r.below(lengths.len());
            lengths[index] = [r.pick(&[1, 90, 130]), r.pick(&[300, 600])];
        }
        if r.one_in(8) {
            lengths.iter_mut().for_each(|[queries, _]| *queries = 0);
        }
        let packed_queries = !r.one_in(4);
        let keys = match r.below(if packed_queries { 5 } else { 1 }) {
            0 => Keys::Paged { size: r.pick(&[1, 2, 13, 16, 64]), shared: r.one_in(2), by_head: r.one_in(2) },
            1 => Keys::Dense,
            _ => Keys::Packed,
        };
        if !packed_queries {
            let longest = lengths.iter().map(|&[queries, _]| queries).max().unwrap_or(2);
            lengths.iter_mut().for_each(|[queries, _]| *queries = longest);
        }
        let used: Vec<usize> = lengths.iter().map(|&[_, keys]| r.below(keys + 1)).collect();
        let bottom_right = r.one_in(3);
        let offsets: Vec<i64> = lengths.iter().map(|_| r.below(20) as i64 - 5).collect();
        let axes = |r: &mut Random| std::array::from_fn(|_| r.one_in(2));
        Self {
            dtype,
            heads: [group * key_heads, key_heads, width, if r.one_in(2) { width } else { other }],
            used: r.one_in(2).then_some(used),
            lengths,
            behind: [r.pick(&[0, 0, 3]), r.pick(&[0, 0, 5])],
            packed_queries,
            keys,
            gaps: r.pick(&[[0, 0], [0, 0], [4, 0], [2, 1]]),
            causal: r.one_in(2),
            window: r.pick(&[
                Window::UNBOUNDED,
                Window::UNBOUNDED,
                Window { left: Some(3), right: None },
                Window { left: Some(9), right: Some(2) },
            ]),
            offset: if bottom_right { QueryOffset::BottomRight } else { QueryOffset::Fixed(r.pick(&[0, 2])) },
            offsets: (!bottom_right && r.one_in(4)).then_some(offsets),
            scale: r.pick(&[None, None, Some(-0.4), Some(60.0)]),
            softcap: r.pick(&[None, None, None, Some(2.0)]),
            slopes: r.pick(&[None, None, None, Some(false), Some(true)]),
            sinks: r.one_in(3),
            bias: r.one_in(3).then(|| axes(&mut r)),
            mask: r.one_in(4).then(|| axes(&mut r)),
            dropout: r.one_in(4).then_some(Dropout { rate: 0.3, seed: 77, offset: 5 }),
            d_lse: r.one_in(2),
            bounded: !r.one_in(3),
            infinite: r.one_in(5),
            seed: r.below(1 << 30) as u32,
        }
    }

    /// A call without options.
    pub(crate) fn plain(dtype: DType, heads: [usize; 4], lengths: Vec<[usize; 2]>) -> Self {
        Self {
            dtype,
            heads,
            lengths,
            used: None,
            behind: [0; 2],
            packed_queries: true,
            keys: Keys::Packed,
            gaps: [0; 2],
            causal: false,
            window: Window::UNBOUNDED,
            offset: QueryOffset::TOP_LEFT,
            offsets: None,
            scale: None,
            softcap: None,
            slopes: None,
            sinks: false,
            bias: None,
            mask: None,
            dropout: None,
            d_lse: false,
            bounded: true,
            infinite: false,
            seed: 1,
        }
    }

    fn longest(&self) -> [usize; 2] {
        [0, 1].map(|side| self.lengths.iter().map(|lengths| lengths[side]).max().unwrap_or(0))
    }

    /// The keys of a sequence that take part.
    pub(crate) fn used(&self, batch: usize) -> usize {
        self.used.as_ref().map_or(self.lengths[batch][1], |used| used[batch])
    }

    /// A number of a row of a sequence; NaN where the row takes no part.
    fn element(&self, role: u32, batch: usize, row: usize, head: usize, column: usize) -> f64 {
        let is_key = role == KEY || role == VALUE;
        if row >= if is_key { self.used(batch) } else { self.lengths[batch][0] } {
            return f64::NAN;
        }
        let batch = match self.keys {
            Keys::Paged { size, shared: true, .. } if is_key && row < size => 0,
            _ => batch,
        };
        let is_rare = number(self.seed, INFINITE + role, [batch, row, head, 0]) > 0.95;
        if self.infinite && is_rare && column.is_multiple_of(3) {
            return f64::INFINITY;
        }
        number(self.seed, role, [batch, row, head, column])
    }

    /// A tensor of rows of heads; `at` says which sequence and row an index is of. Of the gradient of the
    /// logsumexp, without the last axis.
    fn tokens(&self, role: u32, shape: &[usize], gaps: [usize; 2], at: &dyn Fn(&[usize]) -> Place) -> Tensor {
        let head = shape.len() - 2;
        let element = |index: &[usize]| {
            let column = index.get(head + 1).copied().unwrap_or(0);
            at(index).map_or(f64::NAN, |(batch, row)| self.element(role, batch, row, index[head], column))
        };
        if role == D_LSE {
            return Tensor::in_order(self.statistics(), &shape[..=head], [0; 2], &element);
        }
        Tensor::in_order(self.dtype, shape, gaps, &element)
    }

    /// The dtype of the logsumexp.
    fn statistics(&self) -> DType {
        if self.dtype == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// The first packed row of each sequence, and the one behind the last.
    pub(crate) fn starts(&self, side: usize) -> Vec<i32> {
        let mut starts = vec![0];
        for lengths in &self.lengths {
            starts.push(starts[starts.len() - 1] + lengths[side] as i32);
        }
        starts
    }

    /// The sequence and row of every packed row; `None` behind the last sequence.
    fn packed(&self, side: usize) -> Vec<Place> {
        let of =
            |(batch, lengths): (usize, &[usize; 2])| (0..lengths[side]).map(move |row| Some((batch, row)));
        let rows = self.lengths.iter().enumerate().flat_map(of);
        rows.chain(std::iter::repeat_n(None, self.behind[side])).collect()
    }

    /// A block table of `[B, most]`, and the sequence and key of every slot of the pages.
    fn pages(&self, size: usize, shared: bool) -> (Vec<i32>, usize, Vec<Place>) {
        let mut r = Random::new(self.seed.into());
        let count = |batch: usize| self.used(batch).div_ceil(size);
        let needed: Vec<(usize, usize)> =
            (0..self.lengths.len()).flat_map(|b| (0..count(b)).map(move |page| (b, page))).collect();
        let most = self.longest()[1].div_ceil(size) + 1;
        // Two pages more than are needed, in any order.
        let mut order: Vec<usize> = (0..needed.len() + 2).collect();
        for index in (1..order.len()).rev() {
            order.swap(index, r.below(index + 1));
        }
        // Entries that no key needs are no pages.
        let mut table = vec![-1; self.lengths.len() * most];
        let mut slots = vec![None; order.len() * size];
        for (&(batch, page), &own) in needed.iter().zip(&order) {
            let at = if shared && page == 0 { order[order.len() - 1] } else { own };
            table[batch * most + page] = at as i32;
            for slot in 0..size.min(self.used(batch) - page * size) {
                slots[at * size + slot] = Some((batch, page * size + slot));
            }
        }
        (table, most, slots)
    }

    /// Runs the call as it is.
    pub(crate) fn run(&self, backend: &ChunkedBackend) -> Written {
        let [heads, key_heads, width, value_width] = self.heads;
        let ([longest, longest_keys], batch) = (self.longest(), self.lengths.len());
        let [query_starts, key_starts] = [0, 1].map(|side| self.starts(side));
        let [packed, packed_keys] = [0, 1].map(|side| self.packed(side));
        let of_packed = |rows: &[Place], role: u32, heads: usize, width: usize| {
            self.tokens(role, &[rows.len(), heads, width], self.gaps, &|at| rows[at[0]])
        };
        let dense = |role: u32, rows: usize, heads: usize, width: usize| {
            self.tokens(role, &[batch, rows, heads, width], self.gaps, &|at| Some((at[0], at[1])))
        };
        let of_queries = |role: u32, heads: usize, width: usize| {
            if self.packed_queries {
                of_packed(&packed, role, heads, width)
            } else {
                dense(role, longest, heads, width)
            }
        };
        let lengths: Vec<i64> = (0..batch).map(|b| self.used(b) as i64).collect();
        let mut data = CallData::default();
        if self.packed_queries {
            data.query_starts = Some(View::from_slice(&query_starts, [batch + 1]).unwrap());
        }
        if self.used.is_some() || self.keys != Keys::Packed {
            data.key_value_lengths = Some(View::from_slice(&lengths, [batch]).unwrap());
        }
        let table;
        let of_keys: Box<dyn Fn(u32, usize) -> Tensor> = match self.keys {
            Keys::Packed => {
                data.key_value_starts = Some(View::from_slice(&key_starts, [batch + 1]).unwrap());
                Box::new(|role, width| of_packed(&packed_keys, role, key_heads, width))
            }
            Keys::Dense => Box::new(|role, width| dense(role, longest_keys, key_heads, width)),
            Keys::Paged { size, shared, by_head } => {
                let (entries, most, slots) = self.pages(size, shared);
                table = entries;
                data.block_table = Some(View::from_slice(&table, [batch, most]).unwrap());
                let order = if by_head { [0, 2, 1, 3] } else { [0, 1, 2, 3] };
                Box::new(move |role, width| {
                    let shape = [slots.len() / size, size, key_heads, width];
                    Tensor::new(self.dtype, &shape, &order, self.gaps, &|at| {
                        let key = slots[at[0] * size + at[1]];
                        key.map_or(f64::NAN, |(batch, row)| self.element(role, batch, row, at[2], at[3]))
                    })
                })
            }
        };
        let operands = Operands {
            query: of_queries(QUERY, heads, width),
            key: of_keys(KEY, width),
            value: of_keys(VALUE, value_width),
            d_out: of_queries(D_OUT, heads, value_width),
            d_lse: of_queries(D_LSE, heads, 1),
        };
        self.call(backend, data, &operands, 0..batch, self.longest(), self.dropout)
    }

    /// Runs the same as one dense call with lengths.
    pub(crate) fn run_padded(&self, backend: &ChunkedBackend) -> Written {
        self.run_dense(backend, 0..self.lengths.len(), self.longest(), self.dropout)
    }

    /// Runs one sequence alone as a dense call.
    pub(crate) fn run_alone(&self, backend: &ChunkedBackend, batch: usize) -> Written {
        self.run_dense(backend, batch..batch + 1, self.lengths[batch], None)
    }

    fn run_dense(
        &self,
        backend: &ChunkedBackend,
        batches: Range<usize>,
        [longest, longest_keys]: [usize; 2],
        dropout: Option<Dropout>,
    ) -> Written {
        let [heads, key_heads, width, value_width] = self.heads;
        let dense = |role: u32, rows: usize, heads: usize, width: usize| {
            let shape = [batches.len(), rows, heads, width];
            self.tokens(role, &shape, [0; 2], &|at| Some((batches.start + at[0], at[1])))
        };
        let query_lengths: Vec<i64> = batches.clone().map(|b| self.lengths[b][0] as i64).collect();
        let lengths: Vec<i64> = batches.clone().map(|b| self.used(b) as i64).collect();
        let data = CallData {
            query_lengths: Some(View::from_slice(&query_lengths, [batches.len()]).unwrap()),
            key_value_lengths: Some(View::from_slice(&lengths, [batches.len()]).unwrap()),
            ..CallData::default()
        };
        let operands = Operands {
            query: dense(QUERY, longest, heads, width),
            key: dense(KEY, longest_keys, key_heads, width),
            value: dense(VALUE, longest_keys, key_heads, value_width),
            d_out: dense(D_OUT, longest, heads, value_width),
            d_lse: dense(D_LSE, longest, heads, 1),
        };
        self.call(backend, data, &operands, batches, [longest, longest_keys], dropout)
    }

    /// A call of these sequences: both passes, or the forward one where keys are in pages.
    fn call(
        &self,
        backend: &ChunkedBackend,
        data: CallData<'_>,
        operands: &Operands,
        batches: Range<usize>,
        longest: [usize; 2],
        dropout: Option<Dropout>,
    ) -> Written {
        let Operands { query, key, value, d_out, d_lse } = operands;
        let (dtype, heads, seed) = (self.dtype, self.heads[0], self.seed);
        let full = [batches.len(), heads, longest[0], longest[1]];
        let of_logits = |axes: [bool; 4], role: u32| {
            let shape: Vec<usize> = (0..4).map(|axis| if axes[axis] { full[axis] } else { 1 }).collect();
            Tensor::in_order(DType::F32, &shape, [0; 2], &|at| {
                let batch = if axes[0] { batches.start + at[0] } else { 0 };
                number(seed, role, [batch, at[1], at[2], at[3]])
            })
        };
        let bias = self.bias.map(|axes| of_logits(axes, BIAS));
        let mask = self.mask.map(|axes| of_logits(axes, MASK)).map(|mask| {
            let bytes: Vec<bool> = mask.data.numbers().iter().map(|&x| x < 0.4).collect();
            (bytes, mask.shape)
        });
        let slopes = self.slopes.map(|per_batch| {
            let shape = if per_batch { vec![batches.len(), heads] } else { vec![heads] };
            Tensor::in_order(DType::F32, &shape, [0; 2], &|at| {
                let batch = if per_batch { batches.start + at[0] } else { 0 };
                number(seed, SLOPE, [batch, at[at.len() - 1], 0, 0]).abs()
            })
        });
        let statistics = self.statistics();
        let sinks = self.sinks.then(|| Data::new(statistics, &random(heads, seed)));
        let offsets = self.offsets.as_ref().map(|offsets| &offsets[batches.clone()]);
        let inputs = Inputs {
            mask: mask.as_ref().map(|(mask, shape)| {
                // A mask without elements is a slice without elements.
                let count = shape.iter().product();
                View::from_slice(&mask[..count], dims(shape)).unwrap()
            }),
            bias: bias.as_ref().map(Tensor::view),
            alibi_slopes: slopes.as_ref().map(Tensor::view),
            sinks: sinks.as_ref().map(|sinks| sinks.view(&[heads])),
            data: CallData {
                scale: self.scale,
                softcap: self.softcap,
                query_offset: if offsets.is_some() { QueryOffset::TOP_LEFT } else { self.offset },
                query_offsets: offsets.map(|offsets| View::from_slice(offsets, [offsets.len()]).unwrap()),
                dropout,
                ..data
            },
            ..Inputs::new(query.view(), key.view(), value.view())
        };
        let keys_vary = data.key_value_starts.is_some() || data.block_table.is_some();
        // A mask or a bias with the axis says it otherwise.
        let bound = |axis: usize, varies: bool| {
            let is_said = [self.bias, self.mask].into_iter().flatten().any(|axes| axes[axis + 2]);
            (varies && (self.bounded || is_said)).then_some(longest[axis])
        };
        let bounds = [bound(0, data.query_starts.is_some()), bound(1, keys_vary)];
        let problem =
            || inputs.problem().causal(self.causal).window(self.window).longest(bounds[0], bounds[1]);

        let mut out = Tensor::like(dtype, d_out, self.gaps);
        let mut lse = Tensor::like(statistics, d_lse, [0; 2]);
        {
            let problem = problem().lse(true).layout(Role::Out, out.view().desc());
            let problem = problem.build().expect("a valid problem");
            let plan = backend.plan(&problem).expect("supported");
            let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
            let outputs = ForwardOutputs { out: out.view_mut(), lse: Some(lse.view_mut()) };
            let call = ForwardCall::new(&problem, inputs, outputs).expect("a valid call");
            plan.forward(call, scratch.scratch()).expect("the call runs");
        }
        if data.block_table.is_some() {
            let (out, lse) = (out.bits(), lse.bits());
            return Written { out, lse, gradients: None, dbias: None, dsinks: None };
        }
        let mut wanted = Gradients::QKV;
        if bias.is_some() {
            wanted = wanted | Gradients::BIAS;
        }
        if sinks.is_some() {
            wanted = wanted | Gradients::SINKS;
        }
        let [mut dq, mut dk, mut dv] = [query, key, value].map(|like| Tensor::like(dtype, like, self.gaps));
        let mut problem = problem().d_lse(self.d_lse).gradients(wanted);
        let roles = [Role::Out, Role::DOut, Role::DQuery, Role::DKey, Role::DValue];
        for (role, tensor) in roles.into_iter().zip([&out, d_out, &dq, &dk, &dv]) {
            problem = problem.layout(role, tensor.view().desc());
        }
        let problem = problem.build().expect("a valid problem");
        let plan = backend.plan(&problem).expect("supported");
        let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
        let mut dbias = bias.as_ref().map(|bias| Tensor::like(DType::F32, bias, [0; 2]));
        let mut dsinks =
            sinks.as_ref().map(|_| Tensor::in_order(statistics, &[heads], [0; 2], &|_| f64::NAN));
        let saved = BackwardInputs {
            out: out.view(),
            lse: lse.view(),
            d_out: d_out.view(),
            d_lse: self.d_lse.then(|| d_lse.view()),
        };
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut()),
            dk: Some(dk.view_mut()),
            dv: Some(dv.view_mut()),
            dbias: dbias.as_mut().map(Tensor::view_mut),
            dsinks: dsinks.as_mut().map(Tensor::view_mut),
        };
        let call = BackwardCall::new(&problem, inputs, saved, outputs).expect("a valid call");
        plan.backward(call, scratch.scratch()).expect("the call runs");
        Written {
            out: out.bits(),
            lse: lse.bits(),
            gradients: Some(Written3 { dq: dq.bits(), dk: dk.bits(), dv: dv.bits() }),
            dbias: dbias.as_ref().map(Tensor::bits),
            dsinks: dsinks.as_ref().map(Tensor::bits),
        }
    }
}

/// The tensors of a call in the form that it has.
struct Operands {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
}
