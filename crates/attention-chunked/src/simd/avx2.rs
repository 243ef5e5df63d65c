//! AVX2 with FMA and F16C: 256-bit vectors.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::elementary::power_by_polynomial;
use super::x86::operations;
use super::{Base, Kernel, Simd};
use crate::Level;

/// The proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        Level::Avx2.is_available().then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn vectorized<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

impl Simd<f32> for Avx2 {
    operations! {
        types: { float: f32, vector: __m256, mask: __m256 },
        // 12 accumulators, 2 vectors of the panel and a broadcast: 15 of 16 registers.
        tile: { rows: 6, vectors: 2 },
        side_by_side: 2,
        splat: _mm256_set1_ps,
        loads: { load: _mm256_loadu_ps, load_f32: _mm256_loadu_ps },
        store: _mm256_storeu_ps,
        binary: {
            add: _mm256_add_ps,
            sub: _mm256_sub_ps,
            mul: _mm256_mul_ps,
            div: _mm256_div_ps,
            max: _mm256_max_ps,
            min: _mm256_min_ps,
        },
        ternary: { fma: _mm256_fmadd_ps, fms: _mm256_fmsub_ps },
        bits: { and: _mm256_and_ps, andnot: _mm256_andnot_ps, or: _mm256_or_ps },
        compare: _mm256_cmp_ps,
    }

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { vectorized(kernel) }
    }
    #[inline(always)]
    fn select(self, mask: __m256, yes: __m256, no: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { _mm256_blendv_ps(no, yes, mask) }
    }
    #[inline(always)]
    fn any(self, mask: __m256) -> bool {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { _mm256_movemask_ps(mask) != 0 }
    }
    #[inline(always)]
    fn power<const COUNT: usize>(self, base: Base<f32>, x: [__m256; COUNT]) -> [__m256; COUNT] {
        power_by_polynomial(self, base, x)
    }

    #[inline(always)]
    fn times_power_of_two(self, a: __m256, k: __m256) -> __m256 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            // In two factors, so that neither overflows. An exponent below the range gives some number, which
            // the caller does not use.
            let k = _mm256_cvtps_epi32(k);
            let half = _mm256_srai_epi32::<1>(k);
            let power = |k| {
                let biased = _mm256_add_epi32(k, _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            };
            _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_epi32(k, half)))
        }
    }
    #[inline(always)]
    unsafe fn load_f64(self, from: *const f64) -> __m256 {
        // SAFETY: the caller guarantees that 8 elements can be read; `self` proves that the processor has the
        // instructions.
        unsafe {
            let low = _mm256_cvtpd_ps(_mm256_loadu_pd(from));
            _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(from.add(4))), low)
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m256 {
        // SAFETY: the caller guarantees that 8 elements can be read; `self` proves that the processor has the
        // instructions.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m256 {
        // SAFETY: the caller guarantees that 8 elements can be read; `self` proves that the processor has the
        // instructions.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_mask(self, from: *const u8) -> __m256 {
        // SAFETY: the caller guarantees that 8 bytes can be read; `self` proves that the processor has the
        // instructions.
        unsafe {
            let wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))
        }
    }
    #[inline(always)]
    fn reduce_sum(self, a: __m256) -> f32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m256) -> f32 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
        // SAFETY: the caller guarantees that 8 rows of 8 elements can be read and written; every index is
        // below 8. `self` proves that the processor has the instructions.
        unsafe {
            // Halves of rows 4 apart side by side, then a transpose of 4 by 4 in each half.
            let half = |row: usize, column: usize| {
                let low = _mm_loadu_ps(from.add(row * from_row + column));
                _mm256_set_m128(_mm_loadu_ps(from.add((row + 4) * from_row + column)), low)
            };
            for column in [0, 4] {
                let [a, b, c, d] = [half(0, column), half(1, column), half(2, column), half(3, column)];
                let pair = |x| _mm256_castps_pd(x);
                let (ab, cd) = (pair(_mm256_unpacklo_ps(a, b)), pair(_mm256_unpacklo_ps(c, d)));
                let (ab_2, cd_2) = (pair(_mm256_unpackhi_ps(a, b)), pair(_mm256_unpackhi_ps(c, d)));
                let columns = [
                    _mm256_unpacklo_pd(ab, cd),
                    _mm256_unpackhi_pd(ab, cd),
                    _mm256_unpacklo_pd(ab_2, cd_2),
                    _mm256_unpackhi_pd(ab_2, cd_2),
                ];
                for (index, values) in columns.into_iter().enumerate() {
                    _mm256_storeu_ps(to.add((column + index) * to_row), _mm256_castpd_ps(values));
                }
            }
        }
    }
}

impl Simd<f64> for Avx2 {
    operations! {
        types: { float: f64, vector: __m256d, mask: __m256d },
        // As for f32.
        tile: { rows: 6, vectors: 2 },
        side_by_side: 2,
        splat: _mm256_set1_pd,
        loads: { load: _mm256_loadu_pd, load_f64: _mm256_loadu_pd },
        store: _mm256_storeu_pd,
        binary: {
            add: _mm256_add_pd,
            sub: _mm256_sub_pd,
            mul: _mm256_mul_pd,
            div: _mm256_div_pd,
            max: _mm256_max_pd,
            min: _mm256_min_pd,
        },
        ternary: { fma: _mm256_fmadd_pd, fms: _mm256_fmsub_pd },
        bits: { and: _mm256_and_pd, andnot: _mm256_andnot_pd, or: _mm256_or_pd },
        compare: _mm256_cmp_pd,
    }

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { vectorized(kernel) }
    }
    #[inline(always)]
    fn select(self, mask: __m256d, yes: __m256d, no: __m256d) -> __m256d {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { _mm256_blendv_pd(no, yes, mask) }
    }
    #[inline(always)]
    fn any(self, mask: __m256d) -> bool {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { _mm256_movemask_pd(mask) != 0 }
    }
    #[inline(always)]
    fn power<const COUNT: usize>(self, base: Base<f64>, x: [__m256d; COUNT]) -> [__m256d; COUNT] {
        power_by_polynomial(self, base, x)
    }

    #[inline(always)]
    fn times_power_of_two(self, a: __m256d, k: __m256d) -> __m256d {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            // As for f32; the exponents fit 32 bits.
            let k = _mm256_cvtpd_epi32(k);
            let half = _mm_srai_epi32::<1>(k);
            let power = |k| {
                let biased = _mm256_cvtepi32_epi64(_mm_add_epi32(k, _mm_set1_epi32(1023)));
                _mm256_castsi256_pd(_mm256_slli_epi64::<52>(biased))
            };
            _mm256_mul_pd(_mm256_mul_pd(a, power(half)), power(_mm_sub_epi32(k, half)))
        }
    }
    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> __m256d {
        // SAFETY: the caller guarantees that 4 elements can be read; `self` proves that the processor has the
        // instructions.
        unsafe { _mm256_cvtps_pd(_mm_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m256d {
        // SAFETY: the caller guarantees that 4 elements, 8 bytes, can be read; `self` proves that the
        // processor has the instructions.
        unsafe { _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m256d {
        // SAFETY: the caller guarantees that 4 elements, 8 bytes, can be read; `self` proves that the
        // processor has the instructions.
        unsafe {
            let bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(from.cast()));
            _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    unsafe fn load_mask(self, from: *const u8) -> __m256d {
        // SAFETY: the caller guarantees that 4 bytes can be read, which is done as an unaligned word; `self`
        // proves that the processor has the instructions.
        unsafe {
            let bytes = _mm_cvtsi32_si128(from.cast::<i32>().read_unaligned());
            let wide = _mm256_cvtepu8_epi64(bytes);
            _mm256_castsi256_pd(_mm256_cmpgt_epi64(wide, _mm256_setzero_si256()))
        }
    }
    #[inline(always)]
    fn reduce_sum(self, a: __m256d) -> f64 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let x = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd::<1>(a));
            _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m256d) -> f64 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe {
            let x = _mm_max_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd::<1>(a));
            _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)))
        }
    }
}
