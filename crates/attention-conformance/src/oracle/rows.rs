//! Logits and probabilities, row by row.

use attention_core::{CallProblem, Dropout, Inputs, Problem};

use super::dense::integers;
use super::exact::{Accumulator, Grid};
use super::padding::PaddedInputs;
use super::philox::{keep, keep_factor};
use super::structure::{Structure, full_rank, in_precision_of_logits};
use super::{Dense, Entry, Oracle, Row};

impl Oracle {
    /// Computes the probabilities of a call of either pass.
    ///
    /// # Panics
    /// Where the inputs are not those of the problem, or not in host memory.
    pub fn new(problem: &Problem, inputs: &Inputs<'_>) -> Self {
        match PaddedInputs::new(problem, inputs) {
            Some(padded) => Self::of_dense(&padded.problem, &padded.inputs(inputs)),
            None => Self::of_dense(problem, inputs),
        }
    }

    fn of_dense(problem: &Problem, inputs: &Inputs<'_>) -> Self {
        let call = CallProblem::new(problem, &inputs.data).expect("the inputs of the problem");
        let (scale, softcap, dropout) = (call.scale(), call.softcap(), dropout(inputs));
        let d = problem.dims();
        let structure = Structure::read(problem, inputs);
        let query = Dense::read(&inputs.query);
        let key = Dense::read(&inputs.key).scaled(inputs.data.key_scales.as_ref());
        let read = |view| in_precision_of_logits(Dense::read(&view), problem);
        let bias = inputs.bias.map(|view| full_rank(read(view)));
        let slopes = inputs.alibi_slopes.map(read);
        let sinks = inputs.sinks.map(read);
        let accumulator = Accumulator::new(&call);
        let grids =
            |tensor: &Dense| -> Vec<Grid> { tensor.data.chunks_exact(d.head_dim).map(Grid::of).collect() };
        let (query_grids, key_grids) = (grids(&query), grids(&key));

        let logits = |b: usize, t: usize, n: usize| -> Vec<Entry> {
            let slope = slopes.as_ref().map(|slopes| match slopes.shape.len() {
                1 => slopes.at(&[n]),
                _ => slopes.at(&[b, n]),
            });
            (0..d.key_length)
                .filter(|&j| structure.allows(b, n, t, j))
                .map(|j| {
                    let (mut product, mut magnitude) = (0.0, 0.0);
                    for (q, k) in query.row(&[b, t, n]).iter().zip(key.row(&[b, j, n / d.group_size()])) {
                        product += q * k;
                        magnitude += (q * k).abs();
                    }
                    let raw_magnitude = magnitude;
                    product *= scale;
                    let (capped, cap_slope) = match softcap {
                        None => (product, 1.0),
                        Some(cap) => {
                            let tanh = (product / cap).tanh();
                            // 1 - tanh^2 without the cancellation where tanh is close to 1.
                            (cap * tanh, (product / cap).cosh().powi(-2))
                        }
                    };
                    let distance = (structure.position(b, t) - j as i128).unsigned_abs() as f64;
                    let alibi = slope.map_or(0.0, |slope| slope * distance);
                    let bias = bias.as_ref().map_or(0.0, |bias| bias.data[bias.broadcast_flat([b, n, t, j])]);
                    let kept = match dropout {
                        None => 1.0,
                        Some(dropout) if keep(&dropout, b * d.query_heads + n, t, j) => keep_factor(&dropout),
                        Some(_) => 0.0,
                    };
                    let exact = accumulator.computes_exactly(
                        [
                            &query_grids[query.flat(&[b, t, n])],
                            &key_grids[key.flat(&[b, j, n / d.group_size()])],
                        ],
                        raw_magnitude,
                        product,
                        [alibi, bias],
                    );
                    Entry {
                        exact,
                        key: j,
                        product,
                        product_magnitude: magnitude * scale.abs(),
                        capped,
                        cap_slope,
                        added_magnitude: alibi.abs() + bias.abs(),
                        logit: capped - alibi + bias,
                        probability: 0.0,
                        keep: kept,
                    }
                })
                .filter(|entry| entry.logit != f64::NEG_INFINITY)
                .collect()
        };

        let mut rows = Vec::with_capacity(d.batch * d.query_length * d.query_heads);
        for b in 0..d.batch {
            for t in 0..d.query_length {
                for n in 0..d.query_heads {
                    let mut entries = logits(b, t, n);
                    let sink =
                        sinks.as_ref().filter(|_| !structure.is_padded(b, t)).map(|sinks| sinks.at(&[n]));
                    let terms = || entries.iter().map(|entry| entry.logit).chain(sink);
                    // `f64::max` ignores NaN, which the sum below then brings back.
                    let max = terms().fold(f64::NEG_INFINITY, f64::max);
                    let (sum, lse) = if terms().all(|x| x == f64::NEG_INFINITY) {
                        (0.0, f64::NEG_INFINITY)
                    } else {
                        let sum = terms().map(|x| (x - max).exp()).sum::<f64>();
                        (sum, max + sum.ln())
                    };
                    for entry in &mut entries {
                        // Not exp(logit - lse): rounding a large logsumexp would show in every probability.
                        entry.probability = (entry.logit - max).exp() / sum;
                    }
                    rows.push(Row { entries, sink, max, sum, lse });
                }
            }
        }
        let value = Dense::read(&inputs.value).scaled(inputs.data.value_scales.as_ref());
        let problem = problem.clone();
        Self { problem, scale, softcap, dropout, structure, query, key, value, bias, sinks, rows }
    }
}

/// The dropout of a call, whose seed and offset are in tensors or not.
fn dropout(inputs: &Inputs<'_>) -> Option<Dropout> {
    let data = &inputs.data;
    let Dropout { rate, seed, offset } = data.dropout?;
    let seed = data.dropout_seed.map_or(seed, |tensor| integers(&tensor)[0].cast_unsigned());
    // The lower half.
    let offset = data.dropout_offset.map_or(offset, |tensor| (integers(&tensor)[0] & 0xFFFF_FFFF) as u32);
    Some(Dropout { rate, seed, offset })
}
