//! Products on the matrix unit of AMX: bf16 operands, f32 sums, 32 by 32 outputs at a time.
//!
//! Operands of other dtypes are sums of bf16 parts: an f16 is exactly two, an f32 exactly three (each part the
//! nearest bf16 of what the ones before left). The products of parts that matter are added in one chain of
//! accumulators; left out are those below the rounding of the numerics class (docs/numerics.md, "Split operands").
//!
//! Everything is packed in tiles of 1 KiB that are loaded as they lie, `[outer / 16][inner / 32][part]`, where the
//! inner axis is the one that is summed over: a left tile is 16 rows of 32 elements, a right one 16 rows of 16 pairs.
//!
//! The sums for keys are kept transposed, `[width][keys]`: then the weights, which are new for every block, are the
//! right operand, whose pairs are two neighbouring rows, and the terms, packed once, are the transposed left one.

use std::arch::asm;
use std::arch::x86_64::*;

use half::bf16;

use super::{Before, Engine, FloatRows, GradientPacks, STAGE, Staged, Weights};
use crate::scratch::{extent, round_up};
use crate::simd::{Kernel, Simd};

/// The vectors beside the tiles.
type Avx512 = crate::simd::Avx512<true>;

/// Elements of a tile.
const TILE: usize = 512;
/// Bytes between rows of a packed tile.
const ROW_BYTES: usize = 64;

/// The engine for operands of `PARTS` bf16 parts: 1 for bf16, 2 for f16, 3 for f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles<const PARTS: usize> {
    simd: Avx512,
}

impl<const PARTS: usize> Tiles<PARTS> {
    /// Where the machine has AMX and this process may use it.
    pub(crate) fn detect() -> Option<Self> {
        let simd = Avx512::detect()?;
        crate::Level::Amx.is_available().then_some(Self { simd })
    }

    /// Elements of a packed operand.
    const fn packed_len(outer: usize, inner: usize) -> usize {
        round_up(outer, 32).saturating_mul(round_up(inner, 32)).saturating_mul(PARTS)
    }

    /// Where part 0 of the tile of `outer` and `inner` begins, where the inner axis has `length` elements.
    #[inline(always)]
    const fn tile_at(outer: usize, inner: usize, length: usize) -> usize {
        (outer / 16 * length.div_ceil(32) + inner / 32) * PARTS * TILE
    }
}

/// A tile configuration in palette 1: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

static ALL_FULL: TileConfig = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        // Bytes a row in 16 bits, then rows in 8.
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    TileConfig(bytes)
};

/// The products of the parts that matter, `(left, right)`, as byte offsets of their tiles. Neighbours share the left
/// tiles, which are loaded once.
macro_rules! tile_product {
    ($a0:expr, $a1:expr, $b0:expr, $b1:expr, $count:expr, $step:expr, $c:expr, $c_stride:expr, $load:expr;
     $(($a:literal: $($b:literal)+))+) => {{
        // Four tiles of sums: zero or as they are in memory, then all steps, then back to memory.
        let (c0, c1) = ($c, $c.wrapping_add(16));
        let (c2, c3) = ($c.wrapping_byte_add(16 * $c_stride), $c.wrapping_byte_add(16 * $c_stride).wrapping_add(16));
        // SAFETY: the caller of `product` vouches for the tiles that the loop reads and for the 32 rows of 32 sums; the
        // configuration is that of `with_state`; all tile registers are named as clobbered.
        unsafe {
            asm!(
                "test {load}, {load}",
                "jz 3f",
                "tileloadd tmm0, [{c0} + {cs}*1]",
                "tileloadd tmm1, [{c1} + {cs}*1]",
                "tileloadd tmm2, [{c2} + {cs}*1]",
                "tileloadd tmm3, [{c3} + {cs}*1]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                $(
                    concat!("tileloadd tmm4, [{a0} + {s}*1 + ", $a, "]"),
                    concat!("tileloadd tmm5, [{a1} + {s}*1 + ", $a, "]"),
                    $(
                        concat!("tileloadd tmm6, [{b0} + {s}*1 + ", $b, "]"),
                        concat!("tileloadd tmm7, [{b1} + {s}*1 + ", $b, "]"),
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                    )+
                )+
                "add {a0}, {step}",
                "add {a1}, {step}",
                "add {b0}, {step}",
                "add {b1}, {step}",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c0} + {cs}*1], tmm0",
                "tilestored [{c1} + {cs}*1], tmm1",
                "tilestored [{c2} + {cs}*1], tmm2",
                "tilestored [{c3} + {cs}*1], tmm3",
                a0 = inout(reg) $a0 => _,
                a1 = inout(reg) $a1 => _,
                b0 = inout(reg) $b0 => _,
                b1 = inout(reg) $b1 => _,
                n = inout(reg) $count => _,
                step = const $step,
                s = in(reg) ROW_BYTES,
                c0 = in(reg) c0,
                c1 = in(reg) c1,
                c2 = in(reg) c2,
                c3 = in(reg) c3,
                cs = in(reg) $c_stride,
                load = in(reg) usize::from($load),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }};
}

/// A packed operand: 32 of its outer axis from `outer` on, `steps` tiles of its inner axis from `inner` on.
#[derive(Clone, Copy)]
struct Operand<'a> {
    data: &'a [u16],
    /// Length of the inner axis.
    length: usize,
    outer: usize,
    inner: usize,
}

impl<const PARTS: usize> Tiles<PARTS> {
    /// `out[32][32] (+)= left * right` over `steps` tiles of 32 of the inner axis. With `exact`, every product of parts
    /// that the operands' dtype needs; without, those that weights rounded to it need.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "a matrix product has many dimensions")]
    fn product(
        self,
        left: Operand<'_>,
        right: Operand<'_>,
        steps: usize,
        out: &mut [f32],
        stride: usize,
        add: bool,
        exact: bool,
    ) {
        let tiles = |operand: Operand<'_>| {
            let first = Self::tile_at(operand.outer, operand.inner, operand.length);
            let second = Self::tile_at(operand.outer + 16, operand.inner, operand.length);
            assert!(operand.inner.is_multiple_of(32) && operand.outer.is_multiple_of(32));
            assert!((operand.inner / 32).saturating_add(steps) <= operand.length.div_ceil(32));
            assert!(second.saturating_add(steps.saturating_mul(PARTS * TILE)) <= operand.data.len());
            (operand.data[first..].as_ptr(), operand.data[second..].as_ptr())
        };
        assert!(extent(32, stride, 32) <= out.len());
        if steps == 0 {
            if !add {
                out.chunks_mut(stride).take(32).for_each(|row| row[..32].fill(0.0));
            }
            return;
        }
        let ((a0, a1), (b0, b1)) = (tiles(left), tiles(right));
        let (c, c_stride) = (out.as_mut_ptr(), stride * size_of::<f32>());
        match (PARTS, exact) {
            (1, _) => tile_product!(a0, a1, b0, b1, steps, 1024, c, c_stride, add; (0: 0)),
            (2, true) => {
                tile_product!(a0, a1, b0, b1, steps, 2048, c, c_stride, add; (1024: 0 1024) (0: 1024 0))
            }
            (2, false) => tile_product!(a0, a1, b0, b1, steps, 2048, c, c_stride, add; (1024: 0) (0: 1024 0)),
            _ => tile_product!(
                a0, a1, b0, b1, steps, 3072, c, c_stride, add; (2048: 0) (1024: 1024 0) (0: 2048 1024 0)
            ),
        }
    }
}

/// The bf16 parts of two neighbouring vectors, 32 numbers in order: calls `put(part, bits)` for each.
///
/// # Safety
/// As for [`nearest_bf16`].
#[inline(always)]
unsafe fn parts<const PARTS: usize>(mut low: __m512, mut high: __m512, mut put: impl FnMut(usize, __m512i)) {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        for part in 0..PARTS {
            let bits = nearest_bf16(low, high);
            put(part, bits);
            if part + 1 < PARTS {
                let widen = |half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)));
                low = _mm512_sub_ps(low, widen(_mm512_castsi512_si256(bits)));
                high = _mm512_sub_ps(high, widen(_mm512_extracti64x4_epi64::<1>(bits)));
            }
        }
    }
}

/// The nearest bf16 of 32 numbers: those of `low` in the low half.
///
/// # Safety
/// The processor has AVX-512 BF16, and this is inlined where it is enabled.
#[inline(always)]
unsafe fn nearest_bf16(low: __m512, high: __m512) -> __m512i {
    // SAFETY: the caller vouches for the instruction; the two types are the same 64 bytes.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Interleaves the halves of 32 words: `[a0 b0 a1 b1 ..]` of `[a.. b..]`.
///
/// # Safety
/// AVX-512 BW.
#[inline(always)]
unsafe fn interleave(halves: __m512i) -> __m512i {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut index = 0;
        while index < 16 {
            order[2 * index] = index as u16;
            order[2 * index + 1] = index as u16 + 16;
            index += 1;
        }
        order
    };
    // SAFETY: 64 bytes of a constant; the caller vouches for the instructions.
    unsafe { _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), halves) }
}

/// Columns `column..column + 16` of a row of `width` elements, zeros behind it.
///
/// # Safety
/// AVX-512 F; `row` points to `width` elements.
#[inline(always)]
unsafe fn load_part(row: *const f32, column: usize, width: usize) -> __m512 {
    let count = width.saturating_sub(column).min(16);
    let mask = ((1u32 << count) - 1) as __mmask16;
    // SAFETY: lanes outside the mask are not read.
    unsafe { _mm512_maskz_loadu_ps(mask, row.wrapping_add(column)) }
}

/// Which layout staged rows are packed into.
#[derive(Clone, Copy)]
enum Form {
    /// Left operand, rows outside: `[row][width]`.
    Rows,
    /// Right operand, rows outside: pairs along the width.
    Columns,
    /// Right operand, rows inside: pairs of rows, columns outside.
    Pairs,
    /// Left operand, rows inside: columns outside.
    Transposed,
}

/// Packs [`STAGE`] staged rows.
struct Pack<'a, const PARTS: usize> {
    simd: Avx512,
    form: Form,
    staged: FloatRows<'a, f32>,
    /// The first row's place among `rows`.
    first: usize,
    rows: usize,
    to: &'a mut [u16],
}

impl<const PARTS: usize> Kernel for Pack<'_, PARTS> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { simd, form, staged, first, rows, to } = self;
        let (width, stride) = (staged.width, staged.stride);
        let data = staged.data;
        assert!(first.is_multiple_of(STAGE) && first < rows && extent(STAGE, stride, width) <= data.len());
        assert!(Tiles::<PARTS>::packed_len(rows, width) <= to.len());
        let rows = rows.next_multiple_of(32);
        let inner_width = width.next_multiple_of(32);
        let row = |row: usize| data[row * stride..].as_ptr();
        let to = to.as_mut_ptr();
        // SAFETY: every tile is that of a row below `rows` and a column below the padded width, so inside the packed
        // length that was checked; a tile has 16 rows of 32 words. Rows of the stage are below STAGE and have `width`
        // elements. AVX-512 is enabled where this is inlined, and AVX-512 BF16 is a part of the level.
        unsafe {
            match form {
                Form::Rows => {
                    for index in 0..STAGE {
                        for column in (0..inner_width).step_by(32) {
                            let tile = Tiles::<PARTS>::tile_at(first + index, column, inner_width);
                            let low = load_part(row(index), column, width);
                            let high = load_part(row(index), column + 16, width);
                            parts::<PARTS>(low, high, |part, bits| {
                                let at = to.add(tile + part * TILE + index % 16 * 32);
                                _mm512_storeu_si512(at.cast(), bits);
                            });
                        }
                    }
                }
                Form::Columns => {
                    // Pairs along the width are dwords of a packed row: transpose 16 rows of 16 of them.
                    let mut room = [[0f32; 256]; PARTS];
                    for group in (0..STAGE).step_by(16) {
                        for column in (0..inner_width).step_by(32) {
                            let tile = Tiles::<PARTS>::tile_at(first + group, column, inner_width);
                            for index in 0..16 {
                                let low = load_part(row(group + index), column, width);
                                let high = load_part(row(group + index), column + 16, width);
                                parts::<PARTS>(low, high, |part, bits| {
                                    let at = room[part].as_mut_ptr().add(16 * index);
                                    _mm512_storeu_si512(at.cast(), bits);
                                });
                            }
                            for (part, room) in room.iter().enumerate() {
                                simd.transpose(room.as_ptr(), 16, to.add(tile + part * TILE).cast(), 16);
                            }
                        }
                    }
                }
                Form::Pairs => {
                    for column in (0..inner_width).step_by(16) {
                        let tile = Tiles::<PARTS>::tile_at(column, first, rows);
                        for pair in 0..16 {
                            let even = load_part(row(2 * pair), column, width);
                            let odd = load_part(row(2 * pair + 1), column, width);
                            parts::<PARTS>(even, odd, |part, bits| {
                                let at = to.add(tile + part * TILE + pair * 32);
                                _mm512_storeu_si512(at.cast(), interleave(bits));
                            });
                        }
                    }
                }
                Form::Transposed => {
                    let mut from = [0f32; 32 * 16];
                    let mut room = [0f32; 16 * 32];
                    for column in (0..inner_width).step_by(16) {
                        let tile = Tiles::<PARTS>::tile_at(column, first, rows);
                        for index in 0..32 {
                            let values = load_part(row(index), column, width);
                            _mm512_storeu_ps(from.as_mut_ptr().add(16 * index), values);
                        }
                        simd.transpose(from.as_ptr(), 16, room.as_mut_ptr(), 32);
                        simd.transpose(from.as_ptr().add(256), 16, room.as_mut_ptr().add(16), 32);
                        for index in 0..16 {
                            let at = room.as_ptr().add(32 * index);
                            parts::<PARTS>(_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16)), |part, bits| {
                                let at = to.add(tile + part * TILE + index * 32);
                                _mm512_storeu_si512(at.cast(), bits);
                            });
                        }
                    }
                }
            }
        }
    }
}

/// Packs [`STAGE`] rows of bf16 as they lie.
struct PackBf16<'a> {
    simd: Avx512,
    form: Form,
    staged: &'a [&'a [bf16]; STAGE],
    first: usize,
    rows: usize,
    to: &'a mut [u16],
}

impl Kernel for PackBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { simd, form, staged, first, rows, to } = self;
        let width = staged.iter().map(|row| row.len()).max().unwrap_or(0);
        assert!(first.is_multiple_of(STAGE) && first < rows);
        assert!(Tiles::<1>::packed_len(rows, width) <= to.len());
        let rows = rows.next_multiple_of(32);
        let inner_width = width.next_multiple_of(32);
        let to = to.as_mut_ptr();
        let mut room = [0f32; 256];
        // SAFETY: as in `Pack`: every tile is that of a row below `rows` and a column below the padded width. AVX-512 is
        // enabled where this is inlined; the room has 16 vectors.
        unsafe {
            match form {
                Form::Rows => {
                    for (index, row) in staged.iter().enumerate() {
                        for column in (0..inner_width).step_by(32) {
                            let tile = Tiles::<1>::tile_at(first + index, column, inner_width);
                            let at = to.add(tile + index % 16 * 32);
                            _mm512_storeu_si512(at.cast(), load_words(row, column, 32));
                        }
                    }
                }
                Form::Columns => {
                    for group in (0..STAGE).step_by(16) {
                        for column in (0..inner_width).step_by(32) {
                            let tile = Tiles::<1>::tile_at(first + group, column, inner_width);
                            for index in 0..16 {
                                let at = room.as_mut_ptr().add(16 * index);
                                _mm512_storeu_si512(at.cast(), load_words(staged[group + index], column, 32));
                            }
                            simd.transpose(room.as_ptr(), 16, to.add(tile).cast(), 16);
                        }
                    }
                }
                Form::Pairs => {
                    for column in (0..inner_width).step_by(16) {
                        let tile = Tiles::<1>::tile_at(column, first, rows);
                        for index in 0..16 {
                            _mm512_storeu_si512(
                                to.add(tile + index * 32).cast(),
                                load_pair(staged, index, column),
                            );
                        }
                    }
                }
                Form::Transposed => {
                    for column in (0..inner_width).step_by(16) {
                        let tile = Tiles::<1>::tile_at(column, first, rows);
                        for index in 0..16 {
                            let at = room.as_mut_ptr().add(16 * index);
                            _mm512_storeu_si512(at.cast(), load_pair(staged, index, column));
                        }
                        simd.transpose(room.as_ptr(), 16, to.add(tile).cast(), 16);
                    }
                }
            }
        }
    }
}

/// Elements `column..column + count` of a row, at most 32, zeros behind its end.
///
/// # Safety
/// AVX-512 BW.
#[inline(always)]
unsafe fn load_words(row: &[bf16], column: usize, count: usize) -> __m512i {
    let count = row.len().saturating_sub(column).min(count);
    let mask = ((1u64 << count) - 1) as __mmask32;
    // SAFETY: lanes outside the mask are not read.
    unsafe { _mm512_maskz_loadu_epi16(mask, row.as_ptr().wrapping_add(column).cast()) }
}

/// Elements `column..column + 16` of the rows of a pair, interleaved: a vector of 16 pairs.
///
/// # Safety
/// AVX-512 BW.
#[inline(always)]
unsafe fn load_pair(rows: &[&[bf16]; STAGE], pair: usize, column: usize) -> __m512i {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        let even = load_words(rows[2 * pair], column, 16);
        let odd = _mm512_castsi512_si256(load_words(rows[2 * pair + 1], column, 16));
        interleave(_mm512_inserti64x4::<1>(even, odd))
    }
}

/// Packs a block of weights that lies in a tile of rows.
struct PackBlock<'a, const PARTS: usize> {
    tile: &'a [f32],
    stride: usize,
    /// Real rows; those behind them, up to a multiple of 32, become zero.
    rows: usize,
    columns: usize,
    as_weights: Option<&'a mut [u16]>,
    for_keys: Option<&'a mut [u16]>,
}

impl<const PARTS: usize> Kernel for PackBlock<'_, PARTS> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { tile, stride, rows, columns, as_weights, for_keys } = self;
        let (padded_rows, columns) = (rows.next_multiple_of(32), columns.next_multiple_of(32));
        assert!(extent(rows, stride, columns) <= tile.len());
        let all = Tiles::<PARTS>::BLOCK_ROWS;
        assert!(padded_rows <= all && columns <= Tiles::<PARTS>::BLOCK_KEYS);
        let zero = [0f32; 16];
        let row = |row: usize, column: usize| {
            if row < rows { tile[row * stride + column..].as_ptr() } else { zero.as_ptr() }
        };
        // SAFETY: rows below `rows` have `columns` elements in the tile, the others are 16 zeros; packed tiles are those
        // of a block, whose length is checked. AVX-512 is enabled where this is inlined, and AVX-512 BF16 is a part of the
        // level.
        unsafe {
            if let Some(to) = as_weights {
                assert!(to.len() >= Tiles::<PARTS>::packed_len(all, Tiles::<PARTS>::BLOCK_KEYS));
                for index in 0..rows {
                    for column in (0..columns).step_by(32) {
                        let values =
                            [row(index, column), row(index, column + 16)].map(|at| _mm512_loadu_ps(at));
                        put::<PARTS>(to.as_mut_ptr(), Tiles::<PARTS>::BLOCK_KEYS, index, column, values);
                    }
                }
            }
            if let Some(to) = for_keys {
                assert!(to.len() >= Tiles::<PARTS>::packed_len(Tiles::<PARTS>::BLOCK_KEYS, all));
                for column in (0..columns).step_by(16) {
                    for pair in 0..padded_rows / 2 {
                        let tile = Tiles::<PARTS>::tile_at(column, 2 * pair, all);
                        let even = _mm512_loadu_ps(row(2 * pair, column));
                        let odd = _mm512_loadu_ps(row(2 * pair + 1, column));
                        parts::<PARTS>(even, odd, |part, bits| {
                            let at = to.as_mut_ptr().add(tile + part * TILE + pair % 16 * 32);
                            _mm512_storeu_si512(at.cast(), interleave(bits));
                        });
                    }
                }
            }
        }
    }
}

/// Puts 32 weights of a row in their place in a left operand with `keys` columns.
///
/// # Safety
/// AVX-512 with BF16; row and columns are inside the block at `to`.
#[inline(always)]
unsafe fn put<const PARTS: usize>(to: *mut u16, keys: usize, row: usize, column: usize, values: [__m512; 2]) {
    let tile = Tiles::<PARTS>::tile_at(row, column, keys);
    // SAFETY: the caller's.
    unsafe {
        parts::<PARTS>(values[0], values[1], |part, bits| {
            _mm512_storeu_si512(to.add(tile + part * TILE + row % 16 * 32).cast(), bits);
        });
    }
}

/// Puts two neighbouring rows, the first even, at two vectors of columns in their place in a right operand of `rows`
/// rows: `[row][vector]`.
///
/// # Safety
/// AVX-512 with BF16; rows and columns are inside the block at `to`.
#[inline(always)]
unsafe fn put_pair<const PARTS: usize>(
    to: *mut u16,
    rows: usize,
    row: usize,
    column: usize,
    [even, odd]: [[__m512; 2]; 2],
) {
    for vector in 0..2 {
        let tile = Tiles::<PARTS>::tile_at(column + 16 * vector, row, rows);
        // SAFETY: the caller's.
        unsafe {
            parts::<PARTS>(even[vector], odd[vector], |part, bits| {
                let at = to.add(tile + part * TILE + row / 2 % 16 * 32);
                _mm512_storeu_si512(at.cast(), interleave(bits));
            });
        }
    }
}

/// Multiplies rows of sums with factors.
struct Scale<'a> {
    simd: Avx512,
    factors: &'a [f32],
    rows: usize,
    width: usize,
    sums: &'a mut [f32],
    stride: usize,
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let _ = self.simd;
        for (row, &factor) in self.sums.chunks_mut(self.stride).zip(&self.factors[..self.rows]) {
            if factor != 1.0 {
                for sum in &mut row[..self.width] {
                    *sum *= factor;
                }
            }
        }
    }
}

impl<const PARTS: usize> Tiles<PARTS> {
    fn pack(self, form: Form, staged: Staged<'_, f32>, first: usize, rows: usize, to: &mut [u16]) {
        let simd = self.simd;
        match staged {
            Staged::Floats(staged) => {
                Simd::<f32>::vectorize(simd, Pack::<PARTS> { simd, form, staged, first, rows, to });
            }
            Staged::Bf16(staged) => {
                assert_eq!(PARTS, 1, "a row of bf16 is one part");
                Simd::<f32>::vectorize(simd, PackBf16 { simd, form, staged: &staged, first, rows, to });
            }
        }
    }
}

/// Turns transposed sums of [`STAGE`] keys into rows.
struct TransposeSums<'a> {
    simd: Avx512,
    sums: &'a [f32],
    stride: usize,
    first: usize,
    width: usize,
    room: &'a mut [f32],
    room_stride: usize,
}

impl Kernel for TransposeSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { simd, sums, stride, first, width, room, room_stride } = self;
        let padded = width.next_multiple_of(16);
        assert!(padded <= room_stride && STAGE.saturating_mul(room_stride) <= room.len());
        assert!(extent(padded, stride, first.saturating_add(STAGE)) <= sums.len());
        for key in (0..STAGE).step_by(16) {
            for column in (0..padded).step_by(16) {
                // SAFETY: 16 rows of 16 elements from column `column` on are in both, as checked above.
                unsafe {
                    let from = sums.as_ptr().add(column * stride + first + key);
                    simd.transpose(
                        from,
                        stride,
                        room.as_mut_ptr().add(key * room_stride + column),
                        room_stride,
                    );
                }
            }
        }
    }
}

/// The distance between the rows of transposed sums of `keys` keys: a line more than they need, since the 16 rows of a
/// tile would share a set of the cache if they were pages apart.
fn key_sum_stride(keys: usize) -> usize {
    round_up(keys, 32).saturating_add(16)
}

impl<const PARTS: usize> Engine for Tiles<PARTS> {
    type F = f32;
    type S = Avx512;
    type Plain = crate::simd::Avx512<false>;
    type Packed = u16;

    const TAKES_BF16: bool = PARTS == 1;
    const BLOCK_ROWS: usize = 128;
    const BLOCK_KEYS: usize = 256;
    const KEY_STEP: usize = 32;
    const WEIGHTS_IN_TILE: bool = false;
    const WEIGHT_STEP: usize = 32;

    fn sum_stride(width: usize) -> usize {
        round_up(width, 32)
    }

    fn simd(self) -> Avx512 {
        self.simd
    }

    fn plain(self) -> crate::simd::Avx512<false> {
        self.simd.without_bf16()
    }

    fn with_state<R>(self, work: impl FnOnce() -> R) -> R {
        /// Gives the tiles back, also where `work` panics.
        struct Release;
        impl Drop for Release {
            fn drop(&mut self) {
                // SAFETY: the level has AMX; no code after this uses tiles before they are configured again.
                unsafe {
                    asm!("tilerelease", out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
                         out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack));
                }
            }
        }
        // SAFETY: `self` proves that the processor has AMX and the process may use it; 64 bytes of a valid configuration.
        unsafe {
            asm!("ldtilecfg [{config}]", config = in(reg) &raw const ALL_FULL, out("tmm0") _,
                 out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                 out("tmm7") _, options(nostack, readonly));
        }
        let _release = Release;
        work()
    }

    fn queries_len(rows: usize, width: usize) -> usize {
        Self::packed_len(rows, width)
    }

    fn pack_queries(self, staged: Staged<'_, f32>, first: usize, rows: usize, to: &mut [u16]) {
        self.pack(Form::Rows, staged, first, rows, to);
    }

    fn keys_len(keys: usize, width: usize) -> usize {
        Self::packed_len(keys, width)
    }

    fn pack_keys(self, staged: Staged<'_, f32>, first: usize, keys: usize, to: &mut [u16]) {
        self.pack(Form::Columns, staged, first, keys, to);
    }

    fn values_len(keys: usize, width: usize) -> usize {
        Self::packed_len(width, keys)
    }

    fn pack_values(self, staged: Staged<'_, f32>, first: usize, keys: usize, to: &mut [u16]) {
        self.pack(Form::Pairs, staged, first, keys, to);
    }

    fn products(
        self,
        (queries, _): (&[u16], usize),
        (first, rows): (usize, usize),
        (keys, _): (&[u16], usize),
        (begin, end): (usize, usize),
        width: usize,
        out: &mut [f32],
        stride: usize,
    ) {
        let inner = width.next_multiple_of(32);
        for key in (begin..end).step_by(32) {
            let right = Operand { data: keys, length: inner, outer: key, inner: 0 };
            for row in (0..rows).step_by(32) {
                let left = Operand { data: queries, length: inner, outer: first + row, inner: 0 };
                let out = &mut out[row * stride + key - begin..];
                self.product(left, right, inner / 32, out, stride, false, true);
            }
        }
    }

    fn weights_len(rows: usize, keys: usize) -> usize {
        Self::packed_len(rows, keys)
    }

    #[inline(always)]
    unsafe fn put_weights(
        _: Avx512,
        packed: *mut u16,
        keys: usize,
        row: usize,
        column: usize,
        _: *mut f32,
        weights: [__m512; 2],
    ) {
        // SAFETY: the caller's; a column is a multiple of two vectors, 32.
        unsafe { put::<PARTS>(packed, keys, row, column, weights) };
    }

    fn weighted_sums(
        self,
        weights: Weights<'_, f32, u16>,
        rows: usize,
        (values, keys): (&[u16], usize),
        begin: usize,
        count: usize,
        width: usize,
        before: Before<'_, f32>,
        out: &mut [f32],
        stride: usize,
    ) {
        if let Before::Scaled(factors) = before {
            Simd::<f32>::vectorize(
                self.simd,
                Scale { simd: self.simd, factors, rows, width, sums: out, stride },
            );
        }
        let add = !matches!(before, Before::Forgotten);
        let steps = count.div_ceil(32);
        for column in (0..width).step_by(32) {
            let right = Operand { data: values, length: keys, outer: column, inner: begin };
            for row in (0..rows).step_by(32) {
                let left = Operand { data: weights.packed, length: Self::BLOCK_KEYS, outer: row, inner: 0 };
                self.product(left, right, steps, &mut out[row * stride + column..], stride, add, false);
            }
        }
    }

    fn terms_len(rows: usize, width: usize) -> usize {
        Self::packed_len(width, rows)
    }

    fn pack_terms(self, staged: Staged<'_, f32>, first: usize, rows: usize, to: &mut [u16]) {
        self.pack(Form::Transposed, staged, first, rows, to);
    }

    fn gradients_len(rows: usize, keys: usize) -> usize {
        Self::packed_len(keys, rows)
    }

    fn pack_gradients(
        self,
        tile: &[f32],
        stride: usize,
        count: usize,
        keys: usize,
        as_weights: Option<&mut [u16]>,
        for_keys: Option<&mut [u16]>,
    ) {
        let (rows, columns) = (count, keys);
        Simd::<f32>::vectorize(
            self.simd,
            PackBlock::<PARTS> { tile, stride, rows, columns, as_weights, for_keys },
        );
    }

    const PACKS_GRADIENTS: bool = true;

    #[inline(always)]
    unsafe fn put_gradients(
        _: Avx512,
        packs: &GradientPacks<u16>,
        row: usize,
        column: usize,
        probabilities: [[__m512; 2]; 2],
        gradients: [[__m512; 2]; 2],
    ) {
        // SAFETY: the caller's, here and below.
        unsafe {
            if !packs.for_values.is_null() {
                put_pair::<PARTS>(packs.for_values, Self::BLOCK_ROWS, row, column, probabilities);
            }
            if !packs.for_keys.is_null() {
                put_pair::<PARTS>(packs.for_keys, Self::BLOCK_ROWS, row, column, gradients);
            }
        }
        if !packs.as_weights.is_null() {
            for (offset, values) in gradients.into_iter().enumerate() {
                // SAFETY: as above.
                unsafe { put::<PARTS>(packs.as_weights, Self::BLOCK_KEYS, row + offset, column, values) };
            }
        }
    }

    fn key_sum_rows<'r>(
        self,
        sums: &'r [f32],
        keys: usize,
        width: usize,
        first: usize,
        room: &'r mut [f32],
    ) -> (&'r [f32], usize) {
        let room_stride = width.next_multiple_of(16);
        Simd::<f32>::vectorize(
            self.simd,
            TransposeSums {
                simd: self.simd,
                sums,
                stride: key_sum_stride(keys),
                first,
                width,
                room,
                room_stride,
            },
        );
        (room, room_stride)
    }

    fn key_sums_len(keys: usize, width: usize) -> usize {
        key_sum_stride(keys).saturating_mul(round_up(width, 32))
    }

    fn add_key_sums(
        self,
        weights: Weights<'_, f32, u16>,
        (first, rows): (usize, usize),
        (terms, length): (&[u16], usize),
        begin: usize,
        count: usize,
        width: usize,
        (sums, keys): (&mut [f32], usize),
    ) {
        let steps = rows.div_ceil(32);
        for key in (0..count).step_by(32) {
            let right = Operand { data: weights.packed, length: Self::BLOCK_ROWS, outer: key, inner: 0 };
            for column in (0..width).step_by(32) {
                let left = Operand { data: terms, length, outer: column, inner: first };
                let stride = key_sum_stride(keys);
                let sums = &mut sums[column * stride + begin + key..];
                self.product(left, right, steps, sums, stride, true, false);
            }
        }
    }

    fn key_sum_at(keys: usize, _: usize, key: usize, column: usize) -> usize {
        column * key_sum_stride(keys) + key
    }
}
