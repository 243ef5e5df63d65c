//! Packing of tiles: rows as bf16 parts, in each of the layouts that a product takes.

use std::arch::x86_64::*;

use half::bf16;

use super::tile::{Avx512, TILE, Tiles};
use crate::engine::{Engine, FloatRows, STAGE, Staged};
use crate::scratch::extent;
use crate::simd::{Kernel, Simd};

/// The bf16 parts of two neighbouring vectors, 32 numbers in order: calls `put(part, bits)` for each.
///
/// # Safety
/// The processor has AVX-512 with BF16, and this is inlined where it is enabled.
#[inline(always)]
unsafe fn parts<const PARTS: usize>(mut low: __m512, mut high: __m512, mut put: impl FnMut(usize, __m512i)) {
    // SAFETY: the caller guarantees that the processor has AVX-512 with BF16.
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
    // SAFETY: the caller guarantees that the processor has AVX-512 BF16; the two types are the same 64 bytes.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Interleaves the halves of 32 words: `[a0 b0 a1 b1 ..]` of `[a.. b..]`.
///
/// # Safety
/// The processor has AVX-512 BW, and this is inlined where it is enabled.
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
    // SAFETY: the load reads the 64 bytes of the constant; the caller guarantees that the processor has
    // AVX-512 BW.
    unsafe { _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER.as_ptr().cast()), halves) }
}

/// Columns `column..column + 16` of a row of `width` elements, zeros behind it.
///
/// # Safety
/// The processor has AVX-512 F, and this is inlined where it is enabled. `row` points to `width` elements
/// that can be read.
#[inline(always)]
unsafe fn load_part(row: *const f32, column: usize, width: usize) -> __m512 {
    let count = width.saturating_sub(column).min(16);
    let mask = ((1u32 << count) - 1) as __mmask16;
    // SAFETY: the caller guarantees AVX-512 F and `width` elements; the mask has the lanes that are below
    // `width`, and no other lane is read.
    unsafe { _mm512_maskz_loadu_ps(mask, row.wrapping_add(column)) }
}

/// Which layout staged rows are packed into.
#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
    /// Left operand, rows outside: `[row][width]`.
    Rows,
    /// Right operand, rows outside: pairs along the width.
    Columns,
    /// Right operand, rows inside: pairs of rows, columns outside.
    Pairs,
    /// Left operand, rows inside: columns outside.
    Transposed,
}

impl<const PARTS: usize> Tiles<PARTS> {
    /// Packs staged rows `first..first + STAGE` of `rows`.
    pub(super) fn pack(self, form: Form, staged: Staged<'_, f32>, first: usize, rows: usize, to: &mut [u16]) {
        let simd = self.vectors();
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
        // SAFETY: every tile is that of a row below `rows` and a column below the padded width, so inside the
        // packed length that was checked; a tile has 16 rows of 32 words. Rows of the stage are below STAGE
        // and have `width` elements, as checked. `simd` proves that the processor has AVX-512 with BF16,
        // which is enabled where this is inlined, inside `vectorize`.
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
        // SAFETY: every tile is that of a row below `rows` and a column below the padded width, so inside the
        // packed length that was checked; a tile has 16 rows of 32 words. `room` has 16 vectors. `simd`
        // proves that the processor has AVX-512 with BF16, which is enabled where this is inlined, inside
        // `vectorize`.
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
/// The processor has AVX-512 BW, and this is inlined where it is enabled.
#[inline(always)]
unsafe fn load_words(row: &[bf16], column: usize, count: usize) -> __m512i {
    let count = row.len().saturating_sub(column).min(count);
    let mask = ((1u64 << count) - 1) as __mmask32;
    // SAFETY: the mask has the lanes that are inside the row, and no other lane is read; the caller
    // guarantees that the processor has AVX-512 BW.
    unsafe { _mm512_maskz_loadu_epi16(mask, row.as_ptr().wrapping_add(column).cast()) }
}

/// Elements `column..column + 16` of the rows of a pair, interleaved: a vector of 16 pairs.
///
/// # Safety
/// The processor has AVX-512 BW, and this is inlined where it is enabled.
#[inline(always)]
unsafe fn load_pair(rows: &[&[bf16]; STAGE], pair: usize, column: usize) -> __m512i {
    // SAFETY: the caller guarantees that the processor has AVX-512 BW.
    unsafe {
        let even = load_words(rows[2 * pair], column, 16);
        let odd = _mm512_castsi512_si256(load_words(rows[2 * pair + 1], column, 16));
        interleave(_mm512_inserti64x4::<1>(even, odd))
    }
}

/// Packs a block of weights that lies in a tile of rows.
pub(super) struct PackBlock<'a, const PARTS: usize> {
    pub(super) tile: &'a [f32],
    pub(super) stride: usize,
    /// Real rows; those behind them, up to a multiple of 32, become zero.
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) as_weights: Option<&'a mut [u16]>,
    pub(super) for_keys: Option<&'a mut [u16]>,
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
        // SAFETY: rows below `rows` have `columns` elements in the tile, the others are 16 zeros; packed
        // tiles are those of a block, whose length is checked. `Tiles::pack_gradients`, which makes this
        // kernel, runs it in `vectorize` of a level that has AVX-512 with BF16, so both are there and
        // enabled.
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
/// The processor has AVX-512 with BF16, and this is inlined where it is enabled. The row and the columns are
/// inside the block at `to`.
#[inline(always)]
pub(super) unsafe fn put<const PARTS: usize>(
    to: *mut u16,
    keys: usize,
    row: usize,
    column: usize,
    values: [__m512; 2],
) {
    let tile = Tiles::<PARTS>::tile_at(row, column, keys);
    // SAFETY: the caller guarantees AVX-512 with BF16, and that the row and the columns are inside the block.
    unsafe {
        parts::<PARTS>(values[0], values[1], |part, bits| {
            _mm512_storeu_si512(to.add(tile + part * TILE + row % 16 * 32).cast(), bits);
        });
    }
}

/// Puts two neighbouring rows, the first even, at two vectors of columns in their place in a right operand of
/// `rows` rows: `[row][vector]`.
///
/// # Safety
/// The processor has AVX-512 with BF16, and this is inlined where it is enabled. Both rows and the columns
/// are inside the block at `to`.
#[inline(always)]
pub(super) unsafe fn put_pair<const PARTS: usize>(
    to: *mut u16,
    rows: usize,
    row: usize,
    column: usize,
    [even, odd]: [[__m512; 2]; 2],
) {
    for vector in 0..2 {
        let tile = Tiles::<PARTS>::tile_at(column + 16 * vector, row, rows);
        // SAFETY: the caller guarantees AVX-512 with BF16, and that both rows and the columns are inside the
        // block.
        unsafe {
            parts::<PARTS>(even[vector], odd[vector], |part, bits| {
                let at = to.add(tile + part * TILE + row / 2 % 16 * 32);
                _mm512_storeu_si512(at.cast(), interleave(bits));
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where an element is in a packed operand, by the definition of the layouts.
    fn place<const PARTS: usize>(form: Form, row: usize, column: usize, [rows, width]: [usize; 2]) -> usize {
        let (outer, inner, length) = match form {
            Form::Rows | Form::Columns => (row, column, width),
            Form::Pairs | Form::Transposed => (column, row, rows),
        };
        let tile = (outer / 16 * length.div_ceil(32) + inner / 32) * PARTS * TILE;
        match form {
            Form::Rows | Form::Transposed => tile + outer % 16 * 32 + inner % 32,
            Form::Columns | Form::Pairs => tile + inner / 2 % 16 * 32 + outer % 16 * 2 + inner % 2,
        }
    }

    /// That `pack` puts elements `at(row, column)` of [`STAGE`] rows of `width` where every layout says.
    fn assert_packed<const PARTS: usize>(
        [first, rows, width]: [usize; 3],
        at: impl Fn(usize, usize) -> f32,
        pack: impl Fn(Form, &mut [u16]),
    ) {
        for form in [Form::Rows, Form::Columns, Form::Pairs, Form::Transposed] {
            let mut to = vec![0xffff; Tiles::<PARTS>::packed_len(rows, width)];
            pack(form, &mut to);
            for row in 0..STAGE {
                for column in 0..width.next_multiple_of(16) {
                    let mut rest = if column < width { at(row, column) } else { 0.0 };
                    for part in 0..PARTS {
                        let want = bf16::from_f32(rest);
                        let place = place::<PARTS>(form, first + row, column, [rows, width]) + part * TILE;
                        assert_eq!(to[place], want.to_bits(), "{form:?}, {width}: {row}, {column}, {part}");
                        rest -= want.to_f32();
                    }
                }
            }
        }
    }

    /// The same for floats as `PARTS` parts.
    fn assert_floats_packed<const PARTS: usize>(
        simd: Avx512,
        staged: FloatRows<'_, f32>,
        [first, rows]: [usize; 2],
    ) {
        let at = |row: usize, column: usize| staged.data[row * staged.stride + column];
        assert_packed::<PARTS>([first, rows, staged.width], at, |form, to| {
            Simd::<f32>::vectorize(simd, Pack::<PARTS> { simd, form, staged, first, rows, to });
        });
    }

    /// Needs the vectors alone, not the matrix unit.
    #[test]
    fn packed_rows_are_where_the_layouts_say() {
        let Some(simd) = Avx512::detect() else {
            println!("skipped: the processor has no AVX-512 with BF16");
            return;
        };
        for width in [1, 15, 16, 33, 64, 80] {
            for (first, rows) in [(0, 32), (32, 64), (32, 40)] {
                let stride = width + 3;
                let data: Vec<f32> = (0..STAGE * stride).map(|index| 0.01 * index as f32 - 7.3).collect();
                let floats = FloatRows { data: &data, stride, width };
                assert_floats_packed::<1>(simd, floats, [first, rows]);
                assert_floats_packed::<2>(simd, floats, [first, rows]);
                assert_floats_packed::<3>(simd, floats, [first, rows]);
                let data: Vec<bf16> = data.iter().map(|&x| bf16::from_f32(x)).collect();
                // The last row is behind the real ones.
                let is_real = |row: usize| row + 1 < STAGE;
                let row = |row: usize| if is_real(row) { &data[row * stride..][..width] } else { &[] };
                let staged: &[&[bf16]; STAGE] = &std::array::from_fn(row);
                let at = |row: usize, column: usize| {
                    if is_real(row) { data[row * stride + column].to_f32() } else { 0.0 }
                };
                assert_packed::<1>([first, rows, width], at, |form, to| {
                    Simd::<f32>::vectorize(simd, PackBf16 { simd, form, staged, first, rows, to });
                });
            }
        }
    }
}
