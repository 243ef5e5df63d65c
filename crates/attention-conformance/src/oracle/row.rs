//! A row of probabilities.

/// One allowed key of a row.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The key.
    pub key: usize,
    /// `scale * <q, k>`.
    pub product: f64,
    /// `|scale| * sum |q| |k|`: what rounding errors of the product are measured by.
    pub product_magnitude: f64,
    /// The product after softcap.
    pub capped: f64,
    /// The derivative of the softcap at the product; 1 without softcap.
    pub cap_slope: f64,
    /// `|slope| * |pos - j| + |bias|`: what is added after softcap, without cancellation.
    pub added_magnitude: f64,
    /// The logit.
    pub logit: f64,
    /// Whether an accumulator of the operands' dtype computes the logit without any rounding, in whichever
    /// order.
    pub exact: bool,
    /// `exp(logit - lse)`, computed as `exp(logit - max) / sum`.
    pub probability: f64,
    /// What dropout multiplies the probability by: 0 where dropped, 1 without dropout.
    pub keep: f64,
}

/// One row of the matrix of probabilities.
#[derive(Clone, Debug)]
pub struct Row {
    /// The allowed keys.
    pub entries: Vec<Entry>,
    /// The sink's logit; `None` without sinks and for padded rows.
    pub sink: Option<f64>,
    /// The largest of logits and sink.
    pub max: f64,
    /// The sum of `exp(x - max)` over logits and sink.
    pub sum: f64,
    /// The logsumexp.
    pub lse: f64,
}

impl Row {
    /// The probability that the sink takes; 0 without one.
    pub fn sink_probability(&self) -> f64 {
        let terms = self.lse != f64::NEG_INFINITY;
        self.sink.filter(|_| terms).map_or(0.0, |sink| (sink - self.max).exp() / self.sum)
    }
}
