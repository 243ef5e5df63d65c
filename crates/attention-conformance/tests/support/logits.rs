//! The logits of a row.

use attention_core::{CallProblem, DType, DropoutStream, Feature, Problem, RowLayout};

use super::arithmetic::{Loaded, Real, clamp, read};
use super::sequences::starts;
use super::{Flaw, NaivePlan};

/// The numbers of the first call of a plan, which a right one forgets.
#[derive(Debug)]
pub(crate) struct First {
    /// By batch row: queries, keys and offset.
    rows: Vec<(usize, usize, i64)>,
    scale: f64,
    softcap: Option<f64>,
    dropout: Option<DropoutStream>,
}

impl First {
    fn of(problem: &CallProblem<'_>) -> Self {
        let row = |b: usize| (problem.query_len(b), problem.key_value_len(b), problem.offset(b));
        Self {
            rows: (0..problem.dims().batch).map(row).collect(),
            scale: problem.scale(),
            softcap: problem.softcap(),
            dropout: problem.dropout_stream(),
        }
    }
}

/// A logit, and what its gradient is multiplied by on its way to the product.
#[derive(Clone, Copy)]
pub(crate) struct Logit<A> {
    pub(crate) value: A,
    pub(crate) slope: A,
}

impl NaivePlan {
    fn first(&self, problem: &CallProblem<'_>) -> &First {
        self.first.get_or_init(|| First::of(problem))
    }

    /// Queries, keys and offset of a batch row.
    fn rows(&self, problem: &CallProblem<'_>, b: usize) -> (usize, usize, i64) {
        let (first, d) = (self.first(problem), problem.dims());
        let (queries, keys, offset) = (problem.query_len(b), problem.key_value_len(b), problem.offset(b));
        match self.flaw {
            Flaw::KeepsLengths => (first.rows[b].0, first.rows[b].1, offset),
            Flaw::KeepsOffsets => (queries, keys, first.rows[b].2),
            Flaw::IgnoresUsedKeys if problem.key_layout() == RowLayout::Packed => {
                (queries, problem.key_places(b).rows(), offset)
            }
            Flaw::Ignores(Feature::QueryLengths) => (d.query_length, keys, offset),
            Flaw::Ignores(Feature::KeyValueLengths) => (queries, d.key_length, offset),
            Flaw::Ignores(Feature::QueryOffset | Feature::QueryOffsets | Feature::BottomRight) => {
                (queries, keys, 0)
            }
            _ => (queries, keys, offset),
        }
    }

    pub(crate) fn scale(&self, problem: &CallProblem<'_>) -> f64 {
        match self.flaw {
            Flaw::ScaleOff(factor) => problem.scale() * factor,
            Flaw::KeepsScale => self.first(problem).scale,
            _ => problem.scale(),
        }
    }

    /// Which keys a row attends to, by structure and mask.
    pub(crate) fn keys(
        &self,
        problem: &CallProblem<'_>,
        inputs: &Loaded,
        [b, t, n]: [usize; 3],
    ) -> Vec<usize> {
        let ignores = |feature| self.flaw.ignores(feature);
        let (query_len, key_len, offset) = self.rows(problem, b);
        if t >= query_len {
            return Vec::new();
        }
        let mut position = i128::from(offset) + t as i128;
        if self.flaw == Flaw::OffsetOffByOne {
            position += 1;
        }
        if self.flaw == Flaw::PositionsOfTheTensor {
            position += starts(problem, b)[0] as i128;
        }
        let extra = i128::from(self.flaw == Flaw::WindowOffByOne);
        let window = problem.window();
        let mut allowed: Vec<usize> = (0..key_len)
            .filter(|&j| {
                let j = j as i128;
                (!problem.causal() || ignores(Feature::Causal) || j <= position)
                    && (ignores(Feature::WindowLeft)
                        || window.left.is_none_or(|left| j >= position - left as i128 - extra))
                    && (ignores(Feature::WindowRight)
                        || window.right.is_none_or(|right| j <= position + right as i128))
            })
            .filter(|&j| {
                let Some(mask) = inputs.mask.as_ref().filter(|_| !ignores(Feature::Mask)) else {
                    return true;
                };
                let attends = mask.at(&clamp(mask, [b, n, t, j])) != 0.0;
                attends != (self.flaw == Flaw::MaskInverted)
            })
            .filter(|&j| {
                let Some(bias) = inputs.bias.as_ref().filter(|_| !ignores(Feature::Bias)) else {
                    return true;
                };
                // Whatever the key holds.
                let bias = in_precision_of_logits(problem, bias.at(&clamp(bias, [b, n, t, j])));
                bias != f64::NEG_INFINITY && (self.flaw != Flaw::FarBelowIsMasked || bias > -1e9)
            })
            .collect();
        if self.flaw == Flaw::LastKeyMissing && allowed.len() > 1 {
            allowed.pop();
        }
        allowed
    }

    pub(crate) fn logit<A: Real>(
        &self,
        problem: &CallProblem<'_>,
        inputs: &Loaded,
        [b, t, n]: [usize; 3],
        j: usize,
    ) -> Logit<A> {
        let kv = self.key_head(problem, n);
        let mut product = A::from_f64(0.0);
        let (query, key) = (inputs.query.row(&[b, t, n]), inputs.key.row(&[b, j, kv]));
        for (&q, &k) in query.iter().zip(key) {
            product += A::from_f64(q) * A::from_f64(k);
        }
        let product = product * A::from_f64(self.scale(problem));
        let softcap =
            if self.flaw == Flaw::KeepsSoftcap { self.first(problem).softcap } else { problem.softcap() };
        let cap = softcap.filter(|_| !self.flaw.ignores(Feature::Softcap)).map(A::from_f64);
        let (one, mut slope) = (A::from_f64(1.0), A::from_f64(1.0));
        let capped = |x: A, slope: &mut A| match cap {
            None => x,
            Some(cap) => {
                let tanh = (x / cap).tanh();
                if self.flaw != Flaw::CapSlopeMissing {
                    *slope = one - tanh * tanh;
                }
                cap * tanh
            }
        };
        let mut value =
            if self.flaw == Flaw::SoftcapAfterBias { product } else { capped(product, &mut slope) };
        if let Some(slopes) = inputs.alibi_slopes.as_ref().filter(|_| !self.flaw.ignores(Feature::Alibi)) {
            let at: &[usize] = if slopes.shape.len() == 1 { &[n] } else { &[b, n] };
            let distance = (problem.position(b, t) as f64 - j as f64).abs();
            value = value - read::<A>(slopes, at) * A::from_f64(distance);
        }
        if let Some(bias) = inputs.bias.as_ref().filter(|_| !self.flaw.ignores(Feature::Bias)) {
            value += read::<A>(bias, &clamp(bias, [b, n, t, j]));
        }
        if self.flaw == Flaw::SoftcapAfterBias {
            value = capped(value, &mut slope);
        }
        Logit { value, slope }
    }

    pub(crate) fn key_head(&self, problem: &Problem, n: usize) -> usize {
        let d = problem.dims();
        if self.flaw == Flaw::GroupsInterleaved { n % d.key_heads } else { n / d.group_size() }
    }

    /// The factor of a probability under dropout.
    pub(crate) fn kept<A: Real>(&self, problem: &CallProblem<'_>, [b, t, n]: [usize; 3], j: usize) -> A {
        let stream = match self.flaw {
            Flaw::Ignores(Feature::Dropout) => None,
            Flaw::KeepsSeed => self.first(problem).dropout,
            Flaw::DropoutOtherSeed => problem.dropout_at(5, 5).map(|dropout| dropout.stream().unwrap()),
            _ => problem.dropout_stream(),
        };
        let Some(stream) = stream else { return A::from_f64(1.0) };
        let [first_row, first_key] =
            if self.flaw == Flaw::DropoutOfTheTensor { starts(problem, b) } else { [0, 0] };
        let (t, j) = (t + first_row, j + first_key);
        let kept = stream.keeps((b * problem.dims().query_heads + n) as u32, t as u32, j as u32);
        let scale = if self.flaw == Flaw::DropoutUnscaled { 1.0 } else { stream.keep_scale() };
        A::from_f64(if kept { scale } else { 0.0 })
    }

    pub(crate) fn sink<A: Real>(
        &self,
        problem: &CallProblem<'_>,
        inputs: &Loaded,
        b: usize,
        t: usize,
        n: usize,
    ) -> Option<A> {
        let sinks = inputs
            .sinks
            .as_ref()
            .filter(|_| t < problem.query_len(b) && !self.flaw.ignores(Feature::Sinks))?;
        Some(read(sinks, &[n]))
    }
}

/// A number that is part of a logit.
fn in_precision_of_logits(problem: &Problem, x: f64) -> f64 {
    if problem.dtype().accumulator() == DType::F64 { x } else { f64::from(x as f32) }
}
