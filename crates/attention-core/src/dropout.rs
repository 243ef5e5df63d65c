//! The published dropout stream: a pure function from a seed and a position to a keep bit.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). The
//! bits do not depend on the backend, on chunk sizes, thread counts or layouts.

use crate::InvalidCall;

/// Dropout on the probabilities after the softmax, from the published stream.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(remote = "Self", deny_unknown_fields))]
pub struct Dropout {
    /// The fraction of probabilities to drop, in `[0, 1)`, applied in steps of 1/65536.
    pub rate: f64,
    /// The seed: one stream each.
    pub seed: u64,
    /// The position in the stream: calls of one model step (layers) or steps of one run take different
    /// offsets.
    pub offset: u32,
}

#[cfg(feature = "serde")]
crate::fields_by_name!(Dropout { rate, seed, offset });

// By bits, so that a problem can be the key of a cache.
impl PartialEq for Dropout {
    fn eq(&self, other: &Self) -> bool {
        self.rate.to_bits() == other.rate.to_bits() && (self.seed, self.offset) == (other.seed, other.offset)
    }
}

impl Eq for Dropout {}

impl std::hash::Hash for Dropout {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.rate.to_bits(), self.seed, self.offset).hash(state);
    }
}

impl Dropout {
    /// Dropout at offset 0.
    pub const fn new(rate: f64, seed: u64) -> Self {
        Self { rate, seed, offset: 0 }
    }

    /// The same at another offset.
    pub const fn with_offset(self, offset: u32) -> Self {
        Self { offset, ..self }
    }

    /// The stream of this dropout.
    ///
    /// # Errors
    /// [`InvalidCall::DropoutRate`] where the rate is outside `[0, 1)`, is NaN, or rounds to 65536/65536.
    pub fn stream(&self) -> Result<DropoutStream, InvalidCall> {
        let refused = InvalidCall::DropoutRate { rate: self.rate };
        if !(0.0..1.0).contains(&self.rate) {
            return Err(refused);
        }
        // At most 65536, so the cast is exact.
        let threshold = (self.rate * 65536.0).round() as u32;
        if threshold == 65536 {
            return Err(refused);
        }
        Ok(DropoutStream {
            threshold,
            key: [self.seed as u32, (self.seed >> 32) as u32],
            offset: self.offset,
        })
    }
}

/// A validated [`Dropout`]: gives the keep bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutStream {
    threshold: u32,
    key: [u32; 2],
    offset: u32,
}

impl DropoutStream {
    /// Keys that share one evaluation of Philox.
    pub const LANES: usize = 8;

    /// `round(rate * 65536)`: a lane below it is dropped.
    pub fn threshold(&self) -> u32 {
        self.threshold
    }

    /// What kept probabilities are multiplied by: `65536 / (65536 - threshold)`.
    pub fn keep_scale(&self) -> f64 {
        65536.0 / f64::from(65536 - self.threshold)
    }

    /// The key words and the last counter word, for a backend that computes the stream in its own kernel.
    pub fn words(&self) -> ([u32; 2], u32) {
        (self.key, self.offset)
    }

    /// The lanes of keys `8 * block .. 8 * block + 8` for query row `t` of batch row and head `b * N + n`.
    #[inline]
    pub fn lanes(&self, batch_head: u32, t: u32, block: u32) -> [u16; Self::LANES] {
        let words = philox4x32_10([block, t, batch_head, self.offset], self.key);
        std::array::from_fn(|lane| (words[lane / 2] >> (16 * (lane % 2))) as u16)
    }

    /// Whether the probability of key `s` is kept.
    pub fn keeps(&self, batch_head: u32, t: u32, s: u32) -> bool {
        u32::from(self.lanes(batch_head, t, s / 8)[s as usize % 8]) >= self.threshold
    }

    /// Calls `visit(s, keep)` for the keys `range` of a row, in order, with one evaluation of Philox for
    /// eight keys. Keys are numbered with 32 bits; a [`Problem`](crate::Problem) with more is refused.
    #[inline]
    pub fn for_each(
        &self,
        batch_head: u32,
        t: u32,
        range: std::ops::Range<usize>,
        mut visit: impl FnMut(usize, bool),
    ) {
        let mut s = range.start;
        while s < range.end {
            let lanes = self.lanes(batch_head, t, (s / 8) as u32);
            let end = range.end.min((s | 7).saturating_add(1));
            for key in s..end {
                visit(key, u32::from(lanes[key % 8]) >= self.threshold);
            }
            s = end;
        }
    }
}

/// Philox4x32 with 10 rounds (Salmon et al. 2011, section 3.3).
#[inline]
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    // The golden ratio and sqrt(3) - 1 as 32-bit fractions.
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let product0 = MULTIPLIERS[0] * u64::from(counter[0]);
        let product1 = MULTIPLIERS[1] * u64::from(counter[2]);
        counter = [
            (product1 >> 32) as u32 ^ counter[1] ^ key[0],
            product1 as u32,
            (product0 >> 32) as u32 ^ counter[3] ^ key[1],
            product0 as u32,
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors for philox4x32 with 10 rounds published with the paper's Random123 library.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn lanes_are_the_halves_of_the_words_low_first() {
        let stream = Dropout::new(0.5, 0xDEAD_BEEF_0BAD_CAFE).with_offset(9).stream().unwrap();
        let words = philox4x32_10([3, 2, 1, 9], [0x0BAD_CAFE, 0xDEAD_BEEF]);
        let lanes = stream.lanes(1, 2, 3);
        assert_eq!(lanes[0], words[0] as u16);
        assert_eq!(lanes[1], (words[0] >> 16) as u16);
        assert_eq!(lanes[7], (words[3] >> 16) as u16);
        for s in 24..32 {
            assert_eq!(stream.keeps(1, 2, s), lanes[s as usize - 24] >= 32768);
        }
    }

    #[test]
    fn ranges_agree_with_single_keys() {
        let stream = Dropout::new(0.3, 7).stream().unwrap();
        for range in [0..0, 0..3, 5..9, 7..25, 8..16] {
            let mut seen = Vec::new();
            stream.for_each(4, 11, range.clone(), |s, keep| seen.push((s, keep)));
            let want: Vec<_> = range.map(|s| (s, stream.keeps(4, 11, s as u32))).collect();
            assert_eq!(seen, want);
        }
    }

    #[test]
    fn the_rate_used_is_the_fraction_dropped() {
        let stream = Dropout::new(0.25, 42).stream().unwrap();
        let dropped = (0..65536u32).filter(|&s| !stream.keeps(0, 0, s)).count() as f64 / 65536.0;
        // Five standard deviations of a binomial with 65536 draws.
        assert!((dropped - 0.25).abs() < 5.0 * (0.25f64 * 0.75 / 65536.0).sqrt(), "{dropped}");
        assert_eq!(stream.keep_scale(), 65536.0 / 49152.0);
    }

    #[test]
    fn rates_that_cannot_be_honoured_are_refused() {
        for rate in [1.0, 1.5, -0.1, f64::NAN, f64::INFINITY, 1.0 - 2f64.powi(-18)] {
            let error = Dropout::new(rate, 0).stream().unwrap_err();
            assert!(error.to_string().contains("expected 0 <= rate"), "{error}");
        }
        assert_eq!(Dropout::new(0.0, 0).stream().unwrap().threshold(), 0);
        assert_eq!(Dropout::new(1.0 - 2f64.powi(-16), 0).stream().unwrap().threshold(), 65535);
    }
}
