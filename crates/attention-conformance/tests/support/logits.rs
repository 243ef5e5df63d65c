//! The logits of a row.

use attention_core::{DType, Feature, Problem};

use super::arithmetic::{Loaded, Real, clamp, read};
use super::{Flaw, NaivePlan};

/// A logit, and what its gradient is multiplied by on its way to the product.
#[derive(Clone, Copy)]
pub(crate) struct Logit<A> {
    pub(crate) value: A,
    pub(crate) slope: A,
}

impl NaivePlan {
    /// Which keys a row attends to, by structure and mask.
    pub(crate) fn keys(&self, problem: &Problem, inputs: &Loaded, [b, t, n]: [usize; 3]) -> Vec<usize> {
        let ignores = |feature| self.flaw.ignores(feature);
        let query_len =
            if ignores(Feature::QueryLengths) { problem.dims().query_length } else { problem.query_len(b) };
        let keys = problem.dims().key_length;
        let key_len = if ignores(Feature::KeyValueLengths) { keys } else { problem.key_value_len(b) };
        if t >= query_len {
            return Vec::new();
        }
        let mut position = i128::from(problem.offset(b)) + t as i128;
        if ignores(Feature::QueryOffset) || ignores(Feature::BottomRight) {
            position = t as i128;
        }
        if self.flaw == Flaw::OffsetOffByOne {
            position += 1;
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
        problem: &Problem,
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
        let scale = match self.flaw {
            Flaw::ScaleOff(factor) => problem.scale() * factor,
            _ => problem.scale(),
        };
        let product = product * A::from_f64(scale);
        let cap = problem.softcap().filter(|_| !self.flaw.ignores(Feature::Softcap)).map(A::from_f64);
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
    pub(crate) fn kept<A: Real>(&self, problem: &Problem, [b, t, n]: [usize; 3], j: usize) -> A {
        let dropout = problem.dropout().filter(|_| !self.flaw.ignores(Feature::Dropout));
        let Some(mut dropout) = dropout else { return A::from_f64(1.0) };
        if self.flaw == Flaw::DropoutOtherSeed {
            dropout.seed ^= 1;
        }
        let stream = dropout.stream().unwrap();
        let kept = stream.keeps((b * problem.dims().query_heads + n) as u32, t as u32, j as u32);
        let scale = if self.flaw == Flaw::DropoutUnscaled { 1.0 } else { stream.keep_scale() };
        A::from_f64(if kept { scale } else { 0.0 })
    }

    pub(crate) fn sink<A: Real>(
        &self,
        problem: &Problem,
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
