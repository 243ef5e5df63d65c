//! Sequences with random lengths, contents and options.

use std::ops::Range;

use attention_core::{
    CallData, Dropout, Element, Inputs, Problem, ProblemBuilder, QueryOffset, Scalar, View, Window,
};

use super::store::{LAYOUTS, Layout, Store};

/// Numbers in [-1, 1) and below a bound, a pure function of the seed.
pub(crate) struct Random(pub(crate) u32);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.next() as usize % bound
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    pub(crate) fn floats<T: Scalar>(&mut self, count: usize) -> Vec<T> {
        (0..count).map(|_| T::from_f32(self.next() as f32 / (1 << 23) as f32 - 1.0)).collect()
    }
}

/// The rows of a sequence: queries, keys in its tensors, and keys that take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lengths {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) used: usize,
}

/// Row-major operands of one sequence.
#[derive(Debug)]
pub(crate) struct Operands<T, L> {
    pub(crate) query: Vec<T>,
    pub(crate) key: Vec<T>,
    pub(crate) value: Vec<T>,
    pub(crate) d_out: Vec<T>,
    pub(crate) d_lse: Vec<L>,
}

/// Options, and tensors that all sequences share.
#[derive(Debug)]
pub(crate) struct Case<T, L> {
    pub(crate) lengths: Vec<Lengths>,
    pub(crate) operands: Vec<Operands<T, L>>,
    /// `N, K, H, Hv`.
    pub(crate) heads: [usize; 4],
    pub(crate) layout: Layout,
    pub(crate) has_d_lse: bool,
    causal: bool,
    window: Window,
    offset: QueryOffset,
    offsets: Option<Vec<i64>>,
    softcap: Option<f64>,
    dropout: Option<Dropout>,
    mask: Option<Store<f32>>,
    mask_bits: Vec<bool>,
    pub(crate) bias: Option<Store<f64>>,
    slopes: Option<Store<f32>>,
    sinks: Option<Store<f64>>,
}

impl<T: Scalar + Element, L: Scalar + Element> Case<T, L> {
    pub(crate) fn new(lengths: Vec<Lengths>, random: &mut Random) -> Self {
        let key_heads = 1 + random.below(2);
        let heads = [key_heads * (1 + random.below(3)), key_heads, 1 + random.below(9), 1 + random.below(9)];
        let [n, k, h, hv] = heads;
        let operands = (lengths.iter())
            .map(|rows| Operands {
                query: random.floats(rows.queries * n * h),
                key: random.floats(rows.used * k * h),
                value: random.floats(rows.used * k * hv),
                d_out: random.floats(rows.queries * n * hv),
                d_lse: random.floats(rows.queries * n),
            })
            .collect();
        let batch = lengths.len();
        let longest = |rows: fn(&Lengths) -> usize| lengths.iter().map(rows).max().unwrap_or(0);
        let full = [batch, n, longest(|rows| rows.queries), longest(|rows| rows.keys)];
        let broadcast =
            |random: &mut Random| full.map(|size| if size > 1 && random.once_in(2) { size } else { 1 });
        let (mask_shape, bias_shape) = (broadcast(random), broadcast(random));
        let has = [(); 8].map(|()| random.once_in(4));
        let mask_bits = (0..mask_shape.iter().product()).map(|_| !random.once_in(5)).collect();
        let mask = has[0].then(|| Store::new(mask_shape, Layout::Contiguous));
        let bias = has[1].then(|| {
            let mut numbers: Vec<f64> = random.floats(bias_shape.iter().product());
            numbers.iter_mut().for_each(|number| {
                *number = if random.once_in(20) { f64::NEG_INFINITY } else { *number };
            });
            Store::of(bias_shape, Layout::Contiguous, &numbers)
        });
        let slopes_of_each = random.once_in(2);
        let slopes = has[2].then(|| match slopes_of_each {
            true => Store::of([batch, n], Layout::Contiguous, &random.floats(batch * n)),
            false => Store::of([n], Layout::Contiguous, &random.floats(n)),
        });
        // Large ones make logsumexps above which the sinks are weighed by the rows' own sums.
        let size = random.one_of(&[1.0, 1.0, 1000.0]);
        let sinks = has[3].then(|| {
            let numbers: Vec<f64> = random.floats::<f64>(n).iter().map(|number| number * size).collect();
            Store::of([n], Layout::Contiguous, &numbers)
        });
        let side = |random: &mut Random| random.once_in(4).then(|| random.below(40));
        let offset = match random.below(3) {
            0 => QueryOffset::BottomRight,
            1 => QueryOffset::Fixed(random.below(20) as i64 - 10),
            _ => QueryOffset::TOP_LEFT,
        };
        let offsets = (0..batch).map(|_| random.below(30) as i64 - 15).collect();
        Self {
            operands,
            heads,
            layout: random.one_of(&LAYOUTS),
            has_d_lse: has[4],
            causal: random.once_in(2),
            window: Window { left: side(random), right: side(random) },
            offset,
            offsets: has[5].then_some(offsets),
            softcap: has[6].then_some(1.5),
            dropout: has[7].then_some(Dropout { rate: 0.3, seed: 17, offset: 5 }),
            mask,
            mask_bits,
            bias,
            slopes,
            sinks,
            lengths,
        }
    }

    /// Adds the options to operands of the sequences of `batches`, with lengths and starts in `data`. Masks
    /// and biases have `rows` of their last axes.
    pub(crate) fn inputs<'a>(
        &'a self,
        [query, key, value]: [View<'a>; 3],
        data: CallData<'a>,
        batches: Range<usize>,
        rows: Option<[usize; 2]>,
    ) -> Inputs<'a> {
        let part = |view: View<'a>| {
            let mut view = view;
            let all =
                [(0, Some(batches.clone())), (2, rows.map(|[t, _]| 0..t)), (3, rows.map(|[_, s]| 0..s))];
            for (axis, range) in all {
                if view.shape()[axis] > 1
                    && let Some(range) = range
                {
                    view = view.narrow(axis, range).unwrap();
                }
            }
            view
        };
        let mask = self.mask.as_ref().map(|mask| View::from_slice(&self.mask_bits, mask.shape).unwrap());
        let offsets = self.offsets.as_ref().map(|offsets| &offsets[batches.clone()]);
        let slopes = self.slopes.as_ref().map(|slopes| match slopes.shape.rank() {
            2 => slopes.view().narrow(0, batches.clone()).unwrap(),
            _ => slopes.view(),
        });
        Inputs {
            mask: mask.map(part),
            bias: self.bias.as_ref().map(|bias| part(bias.view())),
            alibi_slopes: slopes,
            sinks: self.sinks.as_ref().map(Store::view),
            data: CallData {
                softcap: self.softcap,
                query_offset: self.offset,
                query_offsets: offsets.map(|offsets| View::from_slice(offsets, [offsets.len()]).unwrap()),
                dropout: self.dropout,
                ..data
            },
            ..Inputs::new(query, key, value)
        }
    }

    pub(crate) fn problem(&self, inputs: &Inputs<'_>) -> Problem {
        self.builder(inputs).build().unwrap()
    }

    pub(crate) fn builder(&self, inputs: &Inputs<'_>) -> ProblemBuilder {
        inputs.problem().lse(true).causal(self.causal).window(self.window)
    }

    /// The number of the sequence in a dense call that has its dropout bits: the sequences before it are
    /// empty there.
    pub(crate) fn before(&self, batch: usize) -> usize {
        if self.dropout.is_some() { batch } else { 0 }
    }
}

/// Some sequences: mostly short, some empty, now and then one that is long.
pub(crate) fn lengths(random: &mut Random) -> Vec<Lengths> {
    let one = |random: &mut Random| match random.below(12) {
        0 | 1 => 0,
        2 => 1,
        3 => 50 + random.below(100),
        4 => 130,
        _ => random.below(20),
    };
    let count = 1 + random.below(9);
    let is_shortened = random.once_in(2);
    let mut all: Vec<Lengths> = (0..count)
        .map(|_| {
            let (queries, keys) = (one(random), one(random));
            let used = if is_shortened { random.below(keys + 1) } else { keys };
            Lengths { queries, keys, used }
        })
        .collect();
    if random.once_in(8) {
        let at = random.below(count);
        all[at] = Lengths { queries: 530, keys: 70, used: 70 };
    }
    if random.once_in(8) {
        let at = random.below(count);
        all[at] = Lengths { queries: 1 + random.below(3), keys: 1500, used: 1400 };
    }
    all
}
