//! AVX-512: 512-bit vectors, mask registers, scaling by powers of two in one instruction.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::elementary::power_by_polynomial;
use super::x86::operations;
use super::{Base, Kernel, Simd};
use crate::Level;

/// The proof that the processor has AVX-512 F, BW, DQ and VL, AVX2, FMA and F16C; with `BF16` also AVX-512
/// BF16, which kernels are then compiled with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const BF16: bool = false>(());

impl<const BF16: bool> Avx512<BF16> {
    pub(crate) fn detect() -> Option<Self> {
        let has_bf16 = !BF16 || is_x86_feature_detected!("avx512bf16");
        (Level::Avx512.is_available() && has_bf16).then_some(Self(()))
    }

    /// The same without BF16.
    pub(crate) const fn without_bf16(self) -> Avx512<false> {
        Avx512(())
    }
}

/// The bits of `2^(i / 32)` less those that adding `i / 32` to an exponent adds: `i << 18`.
static POWERS: [u32; 32] = [
    0x3f80_0000,
    0x3f7e_cd87,
    0x3f7d_aac3,
    0x3f7c_980f,
    0x3f7b_95c2,
    0x3f7a_a43a,
    0x3f79_c3d3,
    0x3f78_f4f0,
    0x3f78_37f0,
    0x3f77_8d3a,
    0x3f76_f532,
    0x3f76_7043,
    0x3f75_fed7,
    0x3f75_a15b,
    0x3f75_583f,
    0x3f75_23f6,
    0x3f75_04f3,
    0x3f74_fbaf,
    0x3f75_08a4,
    0x3f75_2c4d,
    0x3f75_672a,
    0x3f75_b9be,
    0x3f76_248c,
    0x3f76_a81e,
    0x3f77_44fd,
    0x3f77_fbb8,
    0x3f78_ccdf,
    0x3f79_b907,
    0x3f7a_c0c7,
    0x3f7b_e4ba,
    0x3f7d_257d,
    0x3f7e_83b3,
];

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn vectorized_bf16<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn vectorized<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

impl<const BF16: bool> Simd<f32> for Avx512<BF16> {
    operations! {
        types: { float: f32, vector: __m512, mask: __mmask16 },
        // 24 accumulators, 4 vectors of the panel and a broadcast: 29 of 32 registers, and 10 loads to 24
        // products.
        tile: { rows: 6, vectors: 4 },
        side_by_side: 4,
        splat: _mm512_set1_ps,
        loads: { load: _mm512_loadu_ps, load_f32: _mm512_loadu_ps },
        store: _mm512_storeu_ps,
        binary: {
            add: _mm512_add_ps,
            sub: _mm512_sub_ps,
            mul: _mm512_mul_ps,
            div: _mm512_div_ps,
            max: _mm512_max_ps,
            min: _mm512_min_ps,
            times_power_of_two: _mm512_scalef_ps,
        },
        ternary: { fma: _mm512_fmadd_ps, fms: _mm512_fmsub_ps },
        bits: { and: _mm512_and_ps, andnot: _mm512_andnot_ps, or: _mm512_or_ps },
        compare: _mm512_cmp_ps_mask,
        reductions: { reduce_sum: _mm512_reduce_add_ps, reduce_max: _mm512_reduce_max_ps },
    }

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the processor has the features, AVX-512 BF16 among them with `BF16`.
        unsafe { if BF16 { vectorized_bf16(kernel) } else { vectorized(kernel) } }
    }
    #[inline(always)]
    fn select(self, mask: __mmask16, yes: __m512, no: __m512) -> __m512 {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { _mm512_mask_blend_ps(mask, no, yes) }
    }
    #[inline(always)]
    fn any(self, mask: __mmask16) -> bool {
        mask != 0
    }

    /// `2^y = 2^k 2^(i / 32) 2^r` with `|r| <= 1/64`: the middle factor from a table in two registers, the
    /// last from a polynomial of degree 2 (minimax in the relative error, 5.3e-8), and the first added to the
    /// exponent.
    #[inline(always)]
    fn power<const COUNT: usize>(self, base: Base<f32>, x: [__m512; COUNT]) -> [__m512; COUNT] {
        let one = Simd::<f32>::splat(self, 1.0);
        Simd::<f32>::scaled_power(self, base, x, [one; COUNT])
    }

    /// The factor goes into the coefficients: where it is the same for many vectors, it costs nothing.
    #[inline(always)]
    fn scaled_power<const COUNT: usize>(
        self,
        base: Base<f32>,
        x: [__m512; COUNT],
        factors: [__m512; COUNT],
    ) -> [__m512; COUNT] {
        // SAFETY: `self` proves that the processor has the instructions; the table is two vectors long.
        unsafe {
            // Adding it leaves k and i, the integer and the 32nds of the nearest multiple of 1/32, in the low
            // bits.
            let shift = _mm512_set1_ps(1.5 * (1 << 18) as f32);
            let log2 = _mm512_set1_ps(base.log2);
            let low = _mm512_loadu_si512(POWERS.as_ptr().cast());
            let high = _mm512_loadu_si512(POWERS.as_ptr().add(16).cast());
            let mut shifted = x;
            for shifted in &mut shifted {
                *shifted = _mm512_fmadd_ps(*shifted, log2, shift);
            }
            let mut r = x;
            for (r, &shifted) in r.iter_mut().zip(&shifted) {
                *r = _mm512_fmsub_ps(*r, log2, _mm512_sub_ps(shifted, shift));
            }
            let mut p = r;
            for ((p, &r), &factor) in p.iter_mut().zip(&r).zip(&factors) {
                let c = [0.693_157_3, 0.240_226_5].map(|c| _mm512_mul_ps(factor, _mm512_set1_ps(c)));
                *p = _mm512_fmadd_ps(_mm512_fmadd_ps(c[1], r, c[0]), r, factor);
            }
            for ((p, &shifted), &x) in p.iter_mut().zip(&shifted).zip(&x) {
                let bits = _mm512_castps_si512(shifted);
                let power = _mm512_permutex2var_epi32(low, bits, high);
                let power = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32::<18>(bits), power));
                // Not below the smallest normal number; a NaN is not, and stays NaN.
                let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(base.least));
                *p = _mm512_maskz_mul_ps(normal, *p, power);
            }
            p
        }
    }

    #[inline(always)]
    unsafe fn load_f64(self, from: *const f64) -> __m512 {
        // SAFETY: the caller guarantees that 16 elements can be read; `self` proves that the processor has
        // the instructions.
        unsafe {
            let low = _mm512_cvtpd_ps(_mm512_loadu_pd(from));
            let high = _mm512_cvtpd_ps(_mm512_loadu_pd(from.add(8)));
            _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        // SAFETY: the caller guarantees that 16 elements can be read; `self` proves that the processor has
        // the instructions.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        // SAFETY: the caller guarantees that 16 elements can be read; `self` proves that the processor has
        // the instructions.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn load_mask(self, from: *const u8) -> __mmask16 {
        // SAFETY: the caller guarantees that 16 bytes can be read; `self` proves that the processor has the
        // instructions.
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            _mm_test_epi8_mask(bytes, bytes)
        }
    }

    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
        // SAFETY: the caller guarantees that 16 rows of 16 elements can be read and written; every index is
        // below 16. `self` proves that the processor has the instructions.
        unsafe {
            // In three steps: pairs of rows, groups of four, and then the quarters of the registers.
            let mut a = [_mm512_setzero_ps(); 16];
            for (row, a) in a.iter_mut().enumerate() {
                *a = _mm512_loadu_ps(from.add(row * from_row));
            }
            let mut b = a;
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            let pair = |x| _mm512_castps_pd(x);
            for i in 0..4 {
                let (p, q) = (4 * i, 4 * i + 2);
                a[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(b[p]), pair(b[q])));
                a[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(b[p]), pair(b[q])));
                a[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(b[p + 1]), pair(b[q + 1])));
                a[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(b[p + 1]), pair(b[q + 1])));
            }
            // a[4 i + c] holds, in its quarter k, column 4 k + c of rows 4 i to 4 i + 3.
            for c in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x44>(a[c], a[4 + c]);
                let high = _mm512_shuffle_f32x4::<0xee>(a[c], a[4 + c]);
                let low_2 = _mm512_shuffle_f32x4::<0x44>(a[8 + c], a[12 + c]);
                let high_2 = _mm512_shuffle_f32x4::<0xee>(a[8 + c], a[12 + c]);
                _mm512_storeu_ps(to.add(c * to_row), _mm512_shuffle_f32x4::<0x88>(low, low_2));
                _mm512_storeu_ps(to.add((4 + c) * to_row), _mm512_shuffle_f32x4::<0xdd>(low, low_2));
                _mm512_storeu_ps(to.add((8 + c) * to_row), _mm512_shuffle_f32x4::<0x88>(high, high_2));
                _mm512_storeu_ps(to.add((12 + c) * to_row), _mm512_shuffle_f32x4::<0xdd>(high, high_2));
            }
        }
    }
}

impl<const BF16: bool> Simd<f64> for Avx512<BF16> {
    operations! {
        types: { float: f64, vector: __m512d, mask: __mmask8 },
        // As for f32.
        tile: { rows: 6, vectors: 4 },
        side_by_side: 4,
        splat: _mm512_set1_pd,
        loads: { load: _mm512_loadu_pd, load_f64: _mm512_loadu_pd },
        store: _mm512_storeu_pd,
        binary: {
            add: _mm512_add_pd,
            sub: _mm512_sub_pd,
            mul: _mm512_mul_pd,
            div: _mm512_div_pd,
            max: _mm512_max_pd,
            min: _mm512_min_pd,
            times_power_of_two: _mm512_scalef_pd,
        },
        ternary: { fma: _mm512_fmadd_pd, fms: _mm512_fmsub_pd },
        bits: { and: _mm512_and_pd, andnot: _mm512_andnot_pd, or: _mm512_or_pd },
        compare: _mm512_cmp_pd_mask,
        reductions: { reduce_sum: _mm512_reduce_add_pd, reduce_max: _mm512_reduce_max_pd },
    }

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: `self` proves that the processor has the features, AVX-512 BF16 among them with `BF16`.
        unsafe { if BF16 { vectorized_bf16(kernel) } else { vectorized(kernel) } }
    }
    #[inline(always)]
    fn select(self, mask: __mmask8, yes: __m512d, no: __m512d) -> __m512d {
        // SAFETY: `self` proves that the processor has the instruction.
        unsafe { _mm512_mask_blend_pd(mask, no, yes) }
    }
    #[inline(always)]
    fn any(self, mask: __mmask8) -> bool {
        mask != 0
    }

    #[inline(always)]
    fn power<const COUNT: usize>(self, base: Base<f64>, x: [__m512d; COUNT]) -> [__m512d; COUNT] {
        power_by_polynomial(self, base, x)
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> __m512d {
        // SAFETY: the caller guarantees that 8 elements can be read; `self` proves that the processor has the
        // instructions.
        unsafe { _mm512_cvtps_pd(_mm256_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512d {
        // SAFETY: the caller guarantees that 8 elements can be read; `self` proves that the processor has the
        // instructions.
        unsafe { _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512d {
        // SAFETY: the caller guarantees that 8 elements can be read; `self` proves that the processor has the
        // instructions.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    unsafe fn load_mask(self, from: *const u8) -> __mmask8 {
        // SAFETY: the caller guarantees that 8 bytes can be read; `self` proves that the processor has the
        // instructions.
        unsafe {
            let bytes = _mm_loadl_epi64(from.cast());
            _mm_test_epi8_mask(bytes, bytes) as __mmask8
        }
    }
}
