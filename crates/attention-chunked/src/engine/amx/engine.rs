//! The engine: blocks as products of packed operands, and sums for keys that are kept transposed.

use std::arch::x86_64::__m512;
use std::ops::Range;

use super::pack::{Form, PackBlock, put, put_pair};
use super::tile::{Avx512, Operand, Tiles};
use crate::engine::{
    Accumulate, Engine, GradientPacks, KeySumsMut, PackedRows, STAGE, Staged, TileMut, Weights,
};
use crate::scratch::{extent, round_up};
use crate::simd::{Kernel, Simd};

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
                // SAFETY: the asserts above checked that `sums` has 16 elements of each of the rows `column`
                // to `column + 16` from `first + key` on, and `room` 16 elements of each of the rows `key` to
                // `key + 16` from `column` on.
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

/// The distance between the rows of transposed sums of `keys` keys: a line more than they need, since the 16
/// rows of a tile would share a set of the cache if they were pages apart.
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
        self.vectors()
    }

    fn plain(self) -> crate::simd::Avx512<false> {
        self.vectors().without_bf16()
    }

    fn with_state<R>(self, work: impl FnOnce() -> R) -> R {
        self.with_tiles(work)
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
        queries: PackedRows<'_, u16>,
        rows: Range<usize>,
        keys: PackedRows<'_, u16>,
        range: Range<usize>,
        width: usize,
        out: TileMut<'_, f32>,
    ) {
        let inner = width.next_multiple_of(32);
        let (begin, stride) = (range.start, out.stride);
        for key in range.step_by(32) {
            let right = Operand { data: keys.data, length: inner, outer: key, inner: 0 };
            for row in (0..rows.len()).step_by(32) {
                let left = Operand { data: queries.data, length: inner, outer: rows.start + row, inner: 0 };
                let out = TileMut { data: &mut out.data[row * stride + key - begin..], stride };
                self.product(left, right, inner / 32, out, false, true);
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
        // SAFETY: the caller guarantees a block at `packed` that has the row and the columns, and a column
        // that is a multiple of two vectors, 32. The argument of type `Avx512` proves that the processor has
        // AVX-512 BF16, which is enabled where this is inlined, inside `vectorize`.
        unsafe { put::<PARTS>(packed, keys, row, column, weights) };
    }

    fn weighted_sums(
        self,
        weights: Weights<'_, f32, u16>,
        values: PackedRows<'_, u16>,
        keys: Range<usize>,
        width: usize,
        accumulate: Accumulate<'_, f32>,
        out: TileMut<'_, f32>,
    ) {
        let (rows, stride) = (weights.rows, out.stride);
        if let Accumulate::ScaleAdd(factors) = accumulate {
            Simd::<f32>::vectorize(
                self.vectors(),
                Scale { simd: self.vectors(), factors, rows, width, sums: &mut *out.data, stride },
            );
        }
        let add = !matches!(accumulate, Accumulate::Overwrite);
        let steps = keys.len().div_ceil(32);
        for column in (0..width).step_by(32) {
            let right = Operand { data: values.data, length: values.len, outer: column, inner: keys.start };
            for row in (0..rows).step_by(32) {
                let left = Operand { data: weights.packed, length: Self::BLOCK_KEYS, outer: row, inner: 0 };
                let out = TileMut { data: &mut out.data[row * stride + column..], stride };
                self.product(left, right, steps, out, add, false);
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
            self.vectors(),
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
        // SAFETY: the caller guarantees that each buffer is null or of a block, which has both rows and the
        // columns. The argument of type `Avx512` proves that the processor has AVX-512 BF16, which is enabled
        // where this is inlined, inside `vectorize`.
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
                // SAFETY: the buffer is not null, so the caller guarantees that it is of a block, which has
                // both rows and the columns; the argument of type `Avx512` proves the instructions.
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
            self.vectors(),
            TransposeSums {
                simd: self.vectors(),
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
        terms: PackedRows<'_, u16>,
        first: usize,
        keys: Range<usize>,
        width: usize,
        sums: KeySumsMut<'_, f32>,
    ) {
        let steps = weights.rows.div_ceil(32);
        let stride = key_sum_stride(sums.keys);
        for key in (0..keys.len()).step_by(32) {
            let right = Operand { data: weights.packed, length: Self::BLOCK_ROWS, outer: key, inner: 0 };
            for column in (0..width).step_by(32) {
                let left = Operand { data: terms.data, length: terms.len, outer: column, inner: first };
                let sums = TileMut { data: &mut sums.data[column * stride + keys.start + key..], stride };
                self.product(left, right, steps, sums, true, false);
            }
        }
    }

    fn key_sum_at(keys: usize, _: usize, key: usize, column: usize) -> usize {
        column * key_sum_stride(keys) + key
    }
}
