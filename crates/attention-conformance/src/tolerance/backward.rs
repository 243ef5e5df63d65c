//! Bounds on the gradients. `docs/numerics.md`, "Backward".

use attention_core::DType;

use super::{Precision, probability_error, unit_roundoff};
use crate::oracle::{Dense, Oracle, product};

/// Bounds on the results of a backward call, element by element.
#[derive(Clone, Debug)]
pub struct BackwardBounds {
    /// For `[B, T, N, H]`.
    pub dq: Vec<f64>,
    /// For `[B, S, K, H]`.
    pub dk: Vec<f64>,
    /// For `[B, S, K, Hv]`.
    pub dv: Vec<f64>,
    /// For the bias with four axes; empty without a bias.
    pub dbias: Vec<f64>,
    /// For `[N]`; empty without sinks.
    pub dsinks: Vec<f64>,
}

/// How far the output and logsumexp that a backward call is given are from the oracle's.
#[derive(Clone, Debug)]
pub struct SavedErrors {
    /// For `[B, T, N, Hv]`.
    pub out: Vec<f64>,
    /// For `[B, T, N]`.
    pub lse: Vec<f64>,
}

impl SavedErrors {
    /// Measured: what the call is given against what the oracle has. Positions where either is not finite
    /// count as exact: only rows without gradients have them.
    pub fn between(given_out: &[f64], given_lse: &[f64], oracle: &Oracle) -> Self {
        let differences = |given: &[f64], want: Vec<f64>| -> Vec<f64> {
            (given.iter().zip(want))
                .map(|(given, want)| {
                    Some((given - want).abs()).filter(|error| error.is_finite()).unwrap_or(0.0)
                })
                .collect()
        };
        let mut lse = differences(given_lse, oracle.lse());
        // The oracle's logsumexp is itself rounded to f64, unlike its probabilities.
        for (error, lse) in lse.iter_mut().zip(oracle.lse()) {
            *error += if lse.is_finite() { unit_roundoff(DType::F64) * lse.abs() } else { 0.0 };
        }
        Self { out: differences(given_out, oracle.out()), lse }
    }
}

/// What a key contributes to the gradients of a row.
#[derive(Clone, Copy)]
struct Term {
    /// The error of its probability.
    p_error: f64,
    /// The gradient of its probability.
    dp: f64,
    /// The error of that.
    dp_error: f64,
}

/// A bound in the making: sums of absolute values, and how many terms they have.
struct Sum {
    /// The errors of the terms.
    errors: Vec<f64>,
    /// The absolute values of the terms.
    sizes: Vec<f64>,
    counts: Vec<usize>,
}

impl Sum {
    fn new(len: usize) -> Self {
        Self { errors: vec![0.0; len], sizes: vec![0.0; len], counts: vec![0; len] }
    }

    fn add(&mut self, at: usize, error: f64, size: f64) {
        self.errors[at] += error;
        self.sizes[at] += size;
        self.counts[at] += 1;
    }

    /// Adds the error of the summation and of rounding the result. Nothing is computed where there are no
    /// terms.
    fn finish(self, precision: &Precision, values: &[f64], dtype: attention_core::DType) -> Vec<f64> {
        (0..values.len())
            .map(|at| match self.counts[at] {
                0 => 0.0,
                terms => {
                    let error = self.errors[at] + precision.sum(terms) * self.sizes[at];
                    // What is rounded is off by the error already.
                    error * (1.0 + unit_roundoff(dtype)) + precision.rounding(dtype, values[at])
                }
            })
            .collect()
    }
}

impl Precision {
    /// The bounds of a backward call: `gradients` are the oracle's for these incoming gradients.
    pub fn backward(
        &self,
        oracle: &Oracle,
        d_out: &Dense,
        d_lse: Option<&Dense>,
        saved: &SavedErrors,
    ) -> BackwardBounds {
        let problem = &oracle.problem;
        let d = problem.dims();
        let u = self.accumulator;
        let scale = oracle.scale.abs();
        let underflow = self.scaled_underflow(oracle);
        let gradients = oracle.gradients(d_out, d_lse);
        let out = oracle.out();
        let mut dq = Sum::new(gradients.dq.len());
        let mut dk = Sum::new(gradients.dk.len());
        let mut dv = Sum::new(gradients.dv.len());
        let mut dbias = Sum::new(gradients.dbias.len());
        let mut dsinks = Sum::new(gradients.dsinks.len());
        let mut row_index = 0;
        oracle.for_each_row(|[b, t, n], row| {
            let index = row_index;
            row_index += 1;
            if row.entries.is_empty() && row.sink.is_none() {
                return;
            }
            let kv = n / d.group_size();
            let incoming = d_out.row(&[b, t, n]);
            let d_lse = d_lse.map_or(0.0, |d_lse| d_lse.at(&[b, t, n]));
            // delta = <d_out, out> - d_lse.
            let (mut delta, mut delta_size, mut delta_error) = (-d_lse, d_lse.abs(), 0.0);
            for (dim, g) in incoming.iter().enumerate() {
                let at = index * d.value_head_dim + dim;
                delta += g * out[at];
                delta_size += (g * out[at]).abs();
                delta_error += g.abs() * saved.out[at];
            }
            // Each of these products may underflow.
            let lost = d.value_head_dim as f64 * self.underflow;
            delta_error += self.sum(d.value_head_dim) * delta_size + lost;
            let lse_error = self.logsumexp_error(oracle, row, saved.lse[index]);
            // With dropout's factor in it: what comes in for each probability, and by how much either may be
            // off.
            let terms: Vec<Term> = (row.entries.iter())
                .map(|entry| {
                    let exponent = self.exponent_error(oracle, entry, row.lse) + lse_error;
                    let p_error = probability_error(entry.logit - row.lse, entry.probability, exponent)
                        + self.underflow;
                    let (mut dp, mut size) = (0.0, 0.0);
                    if entry.keep > 0.0 {
                        let value = oracle.value.row(&[b, entry.key, kv]);
                        for (g, v) in incoming.iter().zip(value) {
                            let term = entry.keep * g * v;
                            dp += term;
                            size += term.abs();
                        }
                    }
                    Term { p_error, dp, dp_error: self.sum(d.value_head_dim) * size + entry.keep * lost }
                })
                .collect();
            // The product may also be the sum of p dp over the keys at hand, which is the same by the
            // definition of the output.
            let (mut own_error, mut own_size) = (2.0 * u * d_lse.abs(), 0.0);
            for (entry, term) in row.entries.iter().zip(&terms) {
                let p = entry.probability;
                own_error += term.p_error * (term.dp.abs() + term.dp_error) + p * term.dp_error;
                own_size += p * term.dp.abs();
            }
            delta_error = delta_error.max(own_error + self.sum(row.entries.len()) * own_size);
            for (entry, &Term { p_error, dp, dp_error }) in row.entries.iter().zip(&terms) {
                let (j, p) = (entry.key, entry.probability);
                if entry.keep > 0.0 {
                    let weight = entry.keep * (p_error + p * (self.weight + 2.0 * u) + self.weight_underflow);
                    let start = oracle.value.flat(&[b, j, kv]) * d.value_head_dim;
                    for (dim, g) in incoming.iter().enumerate() {
                        dv.add(start + dim, weight * g.abs() + self.underflow, entry.keep * p * g.abs());
                    }
                }
                // d_logit = p (dp - delta).
                let difference_error = dp_error + delta_error;
                let d_logit = (p * (dp - delta)).abs();
                let mut error = p_error * ((dp - delta).abs() + difference_error)
                    + p * difference_error
                    + 3.0 * u * p * (dp.abs() + delta.abs())
                    + self.underflow;
                if let Some(bias) = &oracle.bias {
                    dbias.add(bias.broadcast_flat([b, n, t, j]), error, d_logit);
                }
                let mut d_product = d_logit;
                if let Some(cap) = oracle.softcap {
                    // The slope is 1 - tanh^2, and the tangent is off by what the capped logit is off by.
                    let slope_error = (2.0 * self.logit_error(oracle, entry) / cap).min(1.0) + 8.0 * u;
                    error = error * (entry.cap_slope + slope_error) + d_logit * slope_error;
                    d_product *= entry.cap_slope;
                }
                // Rounded before the products, with or without the scale in it.
                error += self.weight * (d_product + error);
                let least = self.weight_underflow;
                let at_query = oracle.query.flat(&[b, t, n]) * d.head_dim;
                let at_key = oracle.key.flat(&[b, j, kv]) * d.head_dim;
                for h in 0..d.head_dim {
                    let query = oracle.query.data[at_query + h].abs();
                    let key = oracle.key.data[at_key + h].abs();
                    for (sum, at, factor) in [(&mut dq, at_query, key), (&mut dk, at_key, query)] {
                        // The scale comes last: before, it may overflow where the gradient does not.
                        let error =
                            product([scale, error, factor]) + product([scale.max(1.0), least, factor]);
                        sum.add(at + h, error + underflow, product([scale, d_product, factor]));
                    }
                }
            }
            if let Some(sink) = row.sink.filter(|&sink| sink != f64::NEG_INFINITY) {
                let p = row.sink_probability();
                let exponent = self.sink_error(sink, row.lse) + lse_error;
                let p_error = probability_error(sink - row.lse, p, exponent) + self.underflow;
                let error = p_error * (delta.abs() + delta_error) + p * delta_error + self.underflow;
                dsinks.add(n, error, p * delta.abs());
            }
        });
        let operand = problem.dtype();
        let dtype_of = |role| problem.tensor(role).map_or(operand, |desc| desc.dtype());
        BackwardBounds {
            dq: dq.finish(self, &gradients.dq, operand),
            dk: dk.finish(self, &gradients.dk, operand),
            dv: dv.finish(self, &gradients.dv, operand),
            dbias: dbias.finish(self, &gradients.dbias, dtype_of(attention_core::Role::Bias)),
            dsinks: dsinks.finish(self, &gradients.dsinks, dtype_of(attention_core::Role::Sinks)),
        }
    }
}
