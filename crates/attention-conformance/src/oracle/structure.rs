//! Which keys a row may attend to: lengths, mask, causal masking, window, and a bias of -inf.

use attention_core::{DType, Dimensions, Inputs, Lengths, Problem, QueryOffset, Sequences, Window};

use super::Dense;

/// Everything that decides what is allowed, but for products of -inf.
#[derive(Clone, Debug)]
pub struct Structure {
    dims: Dimensions,
    causal: bool,
    offset: QueryOffset,
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
    /// Reads what a problem and its mask say.
    ///
    /// # Panics
    /// For a sequence structure that this version does not know.
    pub fn read(problem: &Problem, inputs: &Inputs<'_>) -> Self {
        let dims = problem.dims();
        let list = |lengths: &Lengths, full: usize| match lengths {
            Lengths::Full => vec![full; dims.batch],
            Lengths::PerBatch(lengths) => lengths.to_vec(),
            _ => panic!("a kind of lengths that the oracle does not know"),
        };
        let Sequences::Dense { query, key_value } = problem.sequences() else {
            panic!("a sequence structure that the oracle does not know");
        };
        Self {
            dims,
            causal: problem.causal(),
            offset: problem.query_offset(),
            window: problem.window(),
            query_lengths: list(query, dims.query_length),
            key_lengths: list(key_value, dims.key_length),
            mask: inputs.mask.map(|mask| full_rank(Dense::read(&mask))),
            bias: inputs.bias.map(|bias| full_rank(in_precision_of_logits(Dense::read(&bias), problem))),
        }
    }

    /// `pos = t + offset`. In i128, which nothing here can overflow.
    pub fn position(&self, b: usize, t: usize) -> i128 {
        let offset = match self.offset {
            QueryOffset::Fixed(offset) => i128::from(offset),
            QueryOffset::BottomRight => self.key_lengths[b] as i128 - self.query_lengths[b] as i128,
        };
        t as i128 + offset
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

    /// Whether no query attends to the key.
    pub fn key(&self, b: usize, j: usize, k: usize) -> bool {
        self.keys[(b * self.dims.key_length + j) * self.dims.key_heads + k]
    }
}

/// Bias, slopes and sinks are read in the precision of the logits: what only a wider dtype holds is infinite there.
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
