//! The exact derivatives of the formula.

use super::{Dense, Oracle};

/// Every gradient, row-major in the shape of its tensor.
#[derive(Clone, Debug)]
pub struct OracleGradients {
    /// `[B, T, N, H]`.
    pub dq: Vec<f64>,
    /// `[B, S, K, H]`.
    pub dk: Vec<f64>,
    /// `[B, S, K, Hv]`.
    pub dv: Vec<f64>,
    /// In the shape of the bias with four axes; empty without a bias.
    pub dbias: Vec<f64>,
    /// `[N]`; empty without sinks.
    pub dsinks: Vec<f64>,
}

/// The product of three numbers, which overflows only where it is too large itself: the largest and the
/// smallest are multiplied first, so that what is above 1 meets what is below.
pub(crate) fn product(mut factors: [f64; 3]) -> f64 {
    factors.sort_unstable_by(|a, b| a.abs().total_cmp(&b.abs()));
    let [least, middle, most] = factors;
    most * least * middle
}

impl Oracle {
    /// The gradients for these incoming ones: `d_out` of `[B, T, N, Hv]`, `d_lse` of `[B, T, N]`.
    pub fn gradients(&self, d_out: &Dense, d_lse: Option<&Dense>) -> OracleGradients {
        let d = self.problem.dims();
        let scale = self.scale;
        let out = Dense::new(&d_out.shape, self.out());
        let mut gradients = OracleGradients {
            dq: vec![0.0; self.query.data.len()],
            dk: vec![0.0; self.key.data.len()],
            dv: vec![0.0; self.value.data.len()],
            dbias: self.bias.as_ref().map_or(Vec::new(), |bias| vec![0.0; bias.data.len()]),
            dsinks: self.sinks.as_ref().map_or(Vec::new(), |sinks| vec![0.0; sinks.data.len()]),
        };
        self.for_each_row(|[b, t, n], row| {
            // A row without any term has no derivatives, whatever comes in for it.
            if row.entries.is_empty() && row.sink.is_none() {
                return;
            }
            let kv = n / d.group_size();
            let incoming = d_out.row(&[b, t, n]);
            let d_lse = d_lse.map_or(0.0, |d_lse| d_lse.at(&[b, t, n]));
            // With y = sum_j p'_j v_j: dL/dp_j = keep_j <d_out, v_j>, and through the softmax
            // dL/dx_j = p_j (dL/dp_j - sum_i p_i dL/dp_i) + p_j dL/dlse, whose sum over i is <d_out, y>.
            let delta: f64 = incoming.iter().zip(out.row(&[b, t, n])).map(|(g, y)| g * y).sum();
            for entry in &row.entries {
                let j = entry.key;
                let mut d_probability = 0.0;
                if entry.keep > 0.0 {
                    let start = self.value.flat(&[b, j, kv]) * d.value_head_dim;
                    for (dim, g) in incoming.iter().enumerate() {
                        d_probability += entry.keep * g * self.value.data[start + dim];
                        gradients.dv[start + dim] += entry.keep * entry.probability * g;
                    }
                }
                let d_logit = entry.probability * (d_probability - delta + d_lse);
                if let Some(bias) = &self.bias {
                    gradients.dbias[bias.broadcast_flat([b, n, t, j])] += d_logit;
                }
                let d_product = d_logit * entry.cap_slope;
                let at_query = self.query.flat(&[b, t, n]) * d.head_dim;
                let at_key = self.key.flat(&[b, j, kv]) * d.head_dim;
                for h in 0..d.head_dim {
                    gradients.dq[at_query + h] += product([scale, d_product, self.key.data[at_key + h]]);
                    gradients.dk[at_key + h] += product([scale, d_product, self.query.data[at_query + h]]);
                }
            }
            // A sink of -inf is no sink: nothing goes through it, NaN included.
            if row.sink.is_some_and(|sink| sink != f64::NEG_INFINITY) {
                gradients.dsinks[n] += row.sink_probability() * (d_lse - delta);
            }
        });
        gradients
    }
}

#[cfg(test)]
mod tests {
    use super::product;

    #[test]
    fn a_product_overflows_only_where_it_is_too_large() {
        for factors in [[1.5e308, 1.8, 0.09], [1.8, 0.09, 1.5e308], [0.09, 1.5e308, -1.8]] {
            let want = factors.iter().product::<f64>().signum() * 2.43e307;
            assert!((product(factors) / want - 1.0).abs() < 1e-15, "{factors:?}");
        }
        assert_eq!(product([1e308, 0.0, 1e308]), 0.0);
        assert_eq!(product([-1e308, 2.0, 1e3]), f64::NEG_INFINITY);
        assert!(product([f64::NAN, 0.0, 1.0]).is_nan());
    }
}
