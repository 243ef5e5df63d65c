//! The dropout stream, written from the paper and `docs/semantics.md`, apart from the one in the core.

use attention_core::Dropout;

/// Whether the probability at key `s` of query row `t` of batch row and head `b * N + n` is kept.
pub fn keep(dropout: &Dropout, batch_head: usize, t: usize, s: usize) -> bool {
    let counter = [(s / 8) as u32, t as u32, batch_head as u32, dropout.offset];
    let words = philox(counter, [(dropout.seed & 0xFFFF_FFFF) as u32, (dropout.seed >> 32) as u32]);
    // Eight lanes of 16 bits, the low half of each word first.
    let word = words[s % 8 / 2];
    let lane = if s.is_multiple_of(2) { word & 0xFFFF } else { word >> 16 };
    f64::from(lane) >= (dropout.rate * 65536.0).round()
}

/// The factor of kept probabilities.
pub(super) fn keep_factor(dropout: &Dropout) -> f64 {
    65536.0 / (65536.0 - (dropout.rate * 65536.0).round())
}

/// Philox4x32-10: ten times the round of figure 2 of Salmon et al. (SC 2011), the key advanced in between.
fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut l0, mut r0, mut l1, mut r1], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let a = 0xD251_1F53_u64 * l0 as u64;
        let b = 0xCD9E_8D57_u64 * l1 as u64;
        (l0, r0, l1, r1) = ((b >> 32) as u32 ^ r0 ^ k0, b as u32, (a >> 32) as u32 ^ r1 ^ k1, a as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [l0, r0, l1, r1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn the_core_has_the_same_stream() {
        let dropout = Dropout::new(0.4, 0x0123_4567_89AB_CDEF).with_offset(77);
        let stream = dropout.stream().unwrap();
        for (batch_head, t, s) in
            (0..3).flat_map(|bh| (0..5).flat_map(move |t| (0..40).map(move |s| (bh, t, s))))
        {
            assert_eq!(keep(&dropout, batch_head, t, s), stream.keeps(batch_head as u32, t as u32, s as u32));
        }
        assert_eq!(keep_factor(&dropout), stream.keep_scale());
    }
}
