//! The cases of the suite.

use attention_core::{DType, Dimensions};
use serde::{Deserialize, Serialize};

/// What is added to the logits or multiplies the probabilities. The column `terms` of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::bench) enum CallOption {
    Plain,
    /// `[1, N, T, S]`, of the operands' dtype.
    Bias,
    /// `[B, 1, T, S]`.
    Mask,
    /// At a rate of 1/8.
    Dropout,
}

/// A shape of the suite.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Case {
    pub(super) b: usize,
    pub(super) t: usize,
    pub(super) s: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) h: usize,
    pub(super) dtype: DType,
    pub(super) causal: bool,
    pub(super) backward: bool,
    pub(super) terms: CallOption,
    /// Calls that are timed together.
    pub(super) calls: usize,
}

impl Case {
    pub(super) fn plain([b, t, s, n, k, h]: [usize; 6], dtype: DType, calls: usize) -> Self {
        let (causal, backward, terms) = (false, false, CallOption::Plain);
        Self { b, t, s, n, k, h, dtype, causal, backward, terms, calls }
    }

    pub(super) fn shape(&self) -> Dimensions {
        Dimensions {
            batch: self.b,
            query_length: self.t,
            key_length: self.s,
            query_heads: self.n,
            key_heads: self.k,
            head_dim: self.h,
            value_head_dim: self.h,
        }
    }
}

/// The shapes of docs/performance/results.md: 16384 tokens in all; one so small that the time on the host is
/// what is measured; options; decoding; f32.
pub(super) fn cases() -> Vec<Case> {
    let both = |case: Case| [case, Case { backward: true, ..case }];
    let mut all = Vec::new();
    for (b, t, n, k, h, calls) in [
        (1, 256, 4, 4, 64, 200),
        (32, 512, 16, 16, 128, 50),
        (16, 1024, 16, 16, 128, 30),
        (4, 4096, 16, 16, 128, 10),
        (1, 16384, 16, 16, 128, 4),
        (4, 4096, 32, 32, 64, 10),
        (4, 4096, 8, 8, 256, 10),
        (4, 4096, 32, 8, 128, 6),
    ] {
        for causal in [false, true] {
            let case = Case::plain([b, t, t, n, k, h], DType::Bf16, calls);
            all.extend(both(Case { causal, ..case }));
        }
    }
    for terms in [CallOption::Bias, CallOption::Mask, CallOption::Dropout] {
        let case = Case::plain([4, 4096, 4096, 16, 16, 128], DType::Bf16, 5);
        all.extend(both(Case { terms, ..case }));
    }
    for (b, s) in [(32, 8192), (1, 8192), (64, 2048)] {
        all.push(Case::plain([b, 1, s, 32, 8, 128], DType::Bf16, 20));
    }
    for h in [64, 128] {
        all.extend(both(Case::plain([4, 4096, 4096, 16, 16, h], DType::F32, 2)));
    }
    all
}
