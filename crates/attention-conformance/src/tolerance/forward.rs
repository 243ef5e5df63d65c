//! Bounds on the output and the logsumexp. `docs/numerics.md`, "Forward".

use super::constants::{ADDED, ARGUMENT, CAP, EXPONENTIAL, NEAR, PRODUCT, STORED};
use super::{Precision, probability_error};
use crate::oracle::{Entry, Oracle, Row};

/// The relative error of a denominator above which the first order is not enough.
const WIDE: f64 = 0.1;

/// Bounds on the results of a forward call, element by element.
#[derive(Clone, Debug)]
pub struct ForwardBounds {
    /// For `[B, T, N, Hv]`.
    pub out: Vec<f64>,
    /// For `[B, T, N]`.
    pub lse: Vec<f64>,
}

impl Precision {
    /// What a product that underflows loses, multiplied by the scale.
    pub(crate) fn scaled_underflow(&self, oracle: &Oracle) -> f64 {
        self.underflow * oracle.scale.abs()
    }

    /// How far a computed logit may be from the oracle's.
    pub(super) fn logit_error(&self, oracle: &Oracle, entry: &Entry) -> f64 {
        if entry.exact && self.logit == 0.0 {
            // Its factors are their own only parts, so they are not rounded either.
            return 0.0;
        }
        let terms = oracle.problem.dims().head_dim as f64;
        let product = ((terms + PRODUCT) * self.accumulator + 2.0 * self.factor) * entry.product_magnitude
            + terms * self.scaled_underflow(oracle);
        let capped = match oracle.softcap {
            None => product,
            Some(cap) => {
                // The slope falls away from 0, so between the product and where its error may have put it, it
                // is largest at the end nearer to 0.
                let nearest = (entry.product.abs() - product).max(0.0);
                let slope = (nearest / cap).cosh().powi(-2);
                // Wherever the product is, the capped logit is between the caps.
                (product * slope).min(2.0 * cap) + CAP * self.accumulator * cap
            }
        };
        let size = entry.capped.abs() + entry.added_magnitude;
        capped + ADDED * self.accumulator * size + self.logit * entry.logit.abs()
    }

    /// The relative error of `exp(logit - reference)`, but for that of the reference.
    pub(super) fn exponent_error(&self, oracle: &Oracle, entry: &Entry, reference: f64) -> f64 {
        self.logit_error(oracle, entry) + self.exponential(entry.logit, reference)
    }

    /// As `exponent_error`, of the sink, which the oracle has as it is in the precision of the logits.
    pub(super) fn sink_error(&self, sink: f64, reference: f64) -> f64 {
        self.exponential(sink, reference)
    }

    /// A difference is rounded in units of its own, and its operands before it, by a change to base two, as
    /// long as they are small. So a row of one logit has equal probabilities however large the logit is.
    fn exponential(&self, argument: f64, reference: f64) -> f64 {
        let operands = (argument.abs() + reference.abs()).min(NEAR);
        self.accumulator * (ARGUMENT * ((argument - reference).abs() + operands) + EXPONENTIAL)
    }

    /// How far the logsumexp that a backward pass makes probabilities with may be from the oracle's, where
    /// that of its forward pass is off by `stored`: it may use either that one or the sum of the keys at
    /// hand. Where rounding alone has taken more than some digits off the stored one, only the latter is
    /// right.
    pub(super) fn logsumexp_error(&self, oracle: &Oracle, row: &Row, stored: f64) -> f64 {
        let denominator = self.denominator_error(oracle, row);
        let own = match denominator > WIDE {
            false => denominator,
            true => {
                let (below, above) = self.logsumexp_range(oracle, row);
                denominator.min(1.0) + below.max(above)
            }
        };
        let half = oracle.problem.dtype().size() < 4;
        let may_use_stored = row.lse.abs() <= if half { STORED.1 } else { STORED.0 };
        // A logit that is rounded is off by as much as a logsumexp of its size.
        let exact = row.entries.iter().all(|entry| entry.exact || entry.probability == 0.0);
        if may_use_stored || !exact { own.max(stored) } else { own }
    }

    /// The relative error of the denominator of a row's softmax.
    fn denominator_error(&self, oracle: &Oracle, row: &Row) -> f64 {
        let terms: f64 = (row.entries.iter())
            .map(|entry| {
                let error = self.exponent_error(oracle, entry, row.max);
                probability_error(entry.logit - row.lse, entry.probability, error)
            })
            .sum();
        let sink = row.sink.filter(|&sink| sink != f64::NEG_INFINITY).map_or(0.0, |sink| {
            probability_error(sink - row.lse, row.sink_probability(), self.sink_error(sink, row.max))
        });
        terms + sink + self.sum(row.entries.len())
    }

    /// How far below and above its own a row's logsumexp may come out, with errors of its logits that are too
    /// large for sums of relative errors: the logarithms of `sum p_j exp(-eta_j)` and of `sum p_j
    /// exp(eta_j)`.
    fn logsumexp_range(&self, oracle: &Oracle, row: &Row) -> (f64, f64) {
        let sink = row.sink.filter(|&sink| sink != f64::NEG_INFINITY);
        let terms: Vec<(f64, f64)> = (row.entries.iter())
            .map(|entry| (entry.logit - row.lse, self.exponent_error(oracle, entry, row.max)))
            .chain(sink.map(|sink| (sink - row.lse, self.sink_error(sink, row.max))))
            .collect();
        let sum = |sign: f64| {
            let exponents = || terms.iter().map(|(log_p, error)| log_p + sign * error);
            let most = exponents().fold(f64::NEG_INFINITY, f64::max);
            most + exponents().map(|x| (x - most).exp()).sum::<f64>().ln()
        };
        (-sum(-1.0), sum(1.0))
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
            let range = (denominator > WIDE).then(|| self.logsumexp_range(oracle, row));
            bounds.lse.push(if row.lse == f64::NEG_INFINITY || row.entries.is_empty() {
                // Nothing is computed for an empty row: -inf, or the sink itself, rounded.
                super::unit_roundoff(dtype.accumulator())
                    * if row.entries.is_empty() && row.sink.is_some() { row.lse.abs() } else { 0.0 }
            } else {
                let error =
                    range.map_or(denominator, |(below, above)| denominator.min(1.0) + below.max(above));
                error + 4.0 * self.accumulator * lse_size
            });
            let weights: Vec<f64> = (row.entries.iter())
                .map(|entry| {
                    let p = entry.probability;
                    let error = self.exponent_error(oracle, entry, row.max);
                    let log_p = entry.logit - row.lse;
                    let computed = match range {
                        None => probability_error(log_p, p, error) + p * denominator,
                        Some((below, _)) => probability_error(log_p, p, 1.0 + error + below),
                    };
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
