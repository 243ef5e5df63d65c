//! Which keys a row may attend to: lengths, mask, causal masking, window, and a bias of -inf.

use attention_core::{CallData, DType, Dimensions, Inputs, Problem, QueryOffset, RowLayout, View, Window};

use super::Dense;
use super::dense::integers;

/// Everything that decides what is allowed, but for products of -inf.
#[derive(Clone, Debug)]
pub struct Structure {
    dims: Dimensions,
    causal: bool,
    /// What is added to `t`, by batch row.
    offsets: Vec<i128>,
    window: Window,
    query_lengths: Vec<usize>,
    key_lengths: Vec<usize>,
    mask: Option<Dense>,
    bias: Option<Dense>,
}

/// The tensors' positions that no allowed pair of a query and a key touches.
#[derive(Clone, Debug)]
pub struct Dead {
    dims: Dimensions,
    queries: Vec<bool>,
    keys: Vec<bool>,
}

impl Structure {
    /// Reads what a problem and the inputs of a call say.
    ///
    /// # Panics
    /// Where the inputs are not those of the problem, or not in host memory, and where sequences are packed
    /// or in pages: [`Oracle`](super::Oracle) reads the padded call in their place.
    pub fn read(problem: &Problem, inputs: &Inputs<'_>) -> Self {
        assert!(
            problem.query_layout() == RowLayout::Dense && problem.key_layout() == RowLayout::Dense,
            "the structure of a packed or paged call is that of the padded one"
        );
        let dims = problem.dims();
        let list = |lengths: Option<View<'_>>, full: usize| match lengths {
            None => vec![full; dims.batch],
            Some(lengths) => {
                let lengths = integers(&lengths);
                lengths.into_iter().map(|length| usize::try_from(length).expect("a length")).collect()
            }
        };
        let CallData { query_offset, query_offsets, .. } = inputs.data;
        let query_lengths = list(inputs.data.query_lengths, dims.query_length);
        let key_lengths = list(inputs.data.key_value_lengths, dims.key_length);
        let offsets = match (query_offsets, query_offset) {
            (Some(offsets), _) => integers(&offsets).into_iter().map(i128::from).collect(),
            (None, QueryOffset::Fixed(offset)) => vec![offset.into(); dims.batch],
            (None, QueryOffset::BottomRight) => key_lengths
                .iter()
                .zip(&query_lengths)
                .map(|(&keys, &rows)| keys as i128 - rows as i128)
                .collect(),
        };
        Self {
            dims,
            causal: problem.causal(),
            offsets,
            window: problem.window(),
            query_lengths,
            key_lengths,
            mask: inputs.mask.map(|mask| full_rank(Dense::read(&mask))),
            bias: inputs.bias.map(|bias| full_rank(in_precision_of_logits(Dense::read(&bias), problem))),
        }
    }

    /// `pos = t + offset`. In i128, which nothing here can overflow.
    pub fn position(&self, b: usize, t: usize) -> i128 {
        t as i128 + self.offsets[b]
    }

    /// Whether query row `t` of batch row `b` is padding.
    pub fn is_padded(&self, b: usize, t: usize) -> bool {
        t >= self.query_lengths[b]
    }

    /// Whether query `t` of head `n` may attend to key `j`.
    pub fn allows(&self, b: usize, n: usize, t: usize, j: usize) -> bool {
        let bias = self.bias.as_ref().map(|bias| bias.data[bias.broadcast_flat([b, n, t, j])]);
        bias != Some(f64::NEG_INFINITY) && self.allows_without_bias(b, n, t, j)
    }

    /// Whether query `t` of head `n` may attend to key `j`, whatever the bias says.
    pub fn allows_without_bias(&self, b: usize, n: usize, t: usize, j: usize) -> bool {
        let (position, key) = (self.position(b, t), j as i128);
        let Window { left, right } = self.window;
        !self.is_padded(b, t)
            && j < self.key_lengths[b]
            && self.mask.as_ref().is_none_or(|mask| mask.data[mask.broadcast_flat([b, n, t, j])] != 0.0)
            && (!self.causal || key <= position)
            && left.is_none_or(|left| key >= position - left as i128)
            && right.is_none_or(|right| key <= position + right as i128)
    }

    /// What nothing may read.
    pub fn dead(&self) -> Dead {
        let d = self.dims;
        let mut dead = Dead {
            dims: d,
            queries: vec![true; d.batch * d.query_length * d.query_heads],
            keys: vec![true; d.batch * d.key_length * d.key_heads],
        };
        for b in 0..d.batch {
            for n in 0..d.query_heads {
                for t in 0..d.query_length {
                    for j in 0..d.key_length {
                        if self.allows(b, n, t, j) {
                            dead.queries[(b * d.query_length + t) * d.query_heads + n] = false;
                            dead.keys[(b * d.key_length + j) * d.key_heads + n / d.group_size()] = false;
                        }
                    }
                }
            }
        }
        dead
    }
}

impl Dead {
    /// Whether the query row has nothing to attend to.
    pub fn query(&self, b: usize, t: usize, n: usize) -> bool {
        self.queries[(b * self.dims.query_length + t) * self.dims.query_heads + n]
    }

    /// Makes keys that are one and the same place alive together: `place` says which place a key is.
    pub(crate) fn share(&mut self, place: impl Fn(usize, usize) -> Option<usize>) {
        let d = self.dims;
        let mut alive = std::collections::BTreeSet::new();
        for revive in [false, true] {
            for b in 0..d.batch {
                for j in 0..d.key_length {
                    let Some(place) = place(b, j) else { continue };
                    for k in 0..d.key_heads {
                        let key = &mut self.keys[(b * d.key_length + j) * d.key_heads + k];
                        if revive {
                            *key &= !alive.contains(&(place, k));
                        } else if !*key {
                            alive.insert((place, k));
                        }
                    }
                }
            }
        }
    }

    /// Whether no query attends to the key.
    pub fn key(&self, b: usize, j: usize, k: usize) -> bool {
        self.keys[(b * self.dims.key_length + j) * self.dims.key_heads + k]
    }
}

/// Bias, slopes and sinks are read in the precision of the logits: what only a wider dtype holds is infinite
/// there.
pub(super) fn in_precision_of_logits(mut tensor: Dense, problem: &Problem) -> Dense {
    if problem.dtype().accumulator() != DType::F64 {
        tensor.data.iter_mut().for_each(|x| *x = f64::from(*x as f32));
    }
    tensor
}

/// Adds leading axes of size 1 until there are four.
pub(super) fn full_rank(mut tensor: Dense) -> Dense {
    while tensor.shape.len() < 4 {
        tensor.shape.insert(0, 1);
    }
    tensor
}
