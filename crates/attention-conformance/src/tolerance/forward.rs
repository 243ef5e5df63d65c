//! Bounds on the output and the logsumexp. `docs/numerics.md`, "Forward".

use super::constants::{ADDED, ARGUMENT, CAP, EXPONENTIAL, PRODUCT};
use super::{Precision, probability_error};
use crate::oracle::{Entry, Oracle, Row};

/// Bounds on the results of a forward call, element by element.
#[derive(Clone, Debug)]
pub struct ForwardBounds {
    /// For `[B, T, N, Hv]`.
    pub out: Vec<f64>,
    /// For `[B, T, N]`.
    pub lse: Vec<f64>,
}

impl Precision {
    /// How far a computed logit may be from the oracle's.
    pub(super) fn logit_error(&self, oracle: &Oracle, entry: &Entry) -> f64 {
        let terms = oracle.problem.dims().head_dim as f64;
        let product = ((terms + PRODUCT) * self.accumulator + 2.0 * self.factor) * entry.product_magnitude;
        let capped = match oracle.problem.softcap() {
            None => product,
            Some(cap) => {
                // The slope falls away from 0, so between the product and where its error may have put it, it is
                // largest at the end nearer to 0.
                let nearest = (entry.product.abs() - product).max(0.0);
                product * (nearest / cap).cosh().powi(-2) + CAP * self.accumulator * cap
            }
        };
        let size = entry.capped.abs() + entry.added_magnitude;
        capped + ADDED * self.accumulator * size + self.logit * entry.logit.abs()
    }

    /// The relative error of `exp(logit - reference)`, but for that of the reference.
    pub(super) fn exponent_error(&self, oracle: &Oracle, entry: &Entry, reference: f64) -> f64 {
        self.logit_error(oracle, entry) + self.exponential(entry.logit, reference)
    }

    /// As `exponent_error`, of the sink.
    pub(super) fn sink_error(&self, sink: f64, reference: f64) -> f64 {
        self.accumulator * sink.abs() + self.exponential(sink, reference)
    }

    fn exponential(&self, argument: f64, reference: f64) -> f64 {
        self.accumulator * (ARGUMENT * (argument.abs() + reference.abs()) + EXPONENTIAL)
    }

    /// The relative error of the denominator of a row's softmax.
    fn denominator_error(&self, oracle: &Oracle, row: &Row) -> f64 {
        let terms: f64 = (row.entries.iter())
            .map(|entry| {
                let error = self.exponent_error(oracle, entry, row.max);
                probability_error(entry.logit - row.lse, entry.probability, error)
            })
            .sum();
        let sink = row.sink.map_or(0.0, |sink| {
            probability_error(sink - row.lse, row.sink_probability(), self.sink_error(sink, row.max))
        });
        terms + sink + self.sum(row.entries.len())
    }

    /// The bounds of a forward call.
    pub fn forward(&self, oracle: &Oracle) -> ForwardBounds {
        let d = oracle.problem.dims();
        let dtype = oracle.problem.dtype();
        let mut bounds = ForwardBounds { out: Vec::new(), lse: Vec::new() };
        let out = oracle.out();
        oracle.for_each_row(|[b, _, n], row| {
            let kv = n / d.group_size();
            let denominator = self.denominator_error(oracle, row);
            // ln(Z (1 + error)) is off by `error`; the result is a sum of the maximum and that logarithm.
            let lse_size = row.max.abs() + (row.lse - row.max).abs();
            bounds.lse.push(if row.lse == f64::NEG_INFINITY || row.entries.is_empty() {
                // Nothing is computed for an empty row: -inf, or the sink itself, rounded.
                super::unit_roundoff(dtype.accumulator())
                    * if row.entries.is_empty() && row.sink.is_some() { row.lse.abs() } else { 0.0 }
            } else {
                denominator + 4.0 * self.accumulator * lse_size
            });
            let weights: Vec<f64> = (row.entries.iter())
                .map(|entry| {
                    let p = entry.probability;
                    let error = self.exponent_error(oracle, entry, row.max);
                    let computed = probability_error(entry.logit - row.lse, p, error) + p * denominator;
                    entry.keep
                        * (computed + p * (self.sum(row.entries.len()) + self.weight) + self.weight_underflow)
                })
                .collect();
            let mut errors = vec![0.0; d.value_head_dim];
            for (entry, weight) in row.entries.iter().zip(&weights).filter(|(entry, _)| entry.keep > 0.0) {
                for (error, v) in errors.iter_mut().zip(oracle.value.row(&[b, entry.key, kv])) {
                    *error += weight * v.abs();
                }
            }
            // Nothing is computed where no key is kept.
            let empty = row.entries.iter().all(|entry| entry.keep == 0.0);
            for error in errors {
                let value = out[bounds.out.len()];
                bounds.out.push(if empty { 0.0 } else { error + self.rounding(dtype, value) });
            }
        });
        bounds
    }
}
