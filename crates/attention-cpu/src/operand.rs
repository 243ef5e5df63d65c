//! Operand dtypes: how rows of them become the floats that are computed in, and back.

use attention_core::{HostView, Row, RowMut, Scalar};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::elementary::Compute;

/// A dtype of queries, keys and values.
pub(crate) trait Operand: Scalar {
    /// What it is computed in.
    type Compute: Compute;

    /// Neighbours as they are computed in, where that is the same type.
    fn as_compute(from: &[Self]) -> Option<&[Self::Compute]>;
    /// Converts neighbours; exact.
    fn widen(from: &[Self], to: &mut [Self::Compute]);
    /// Converts neighbours, rounding to nearest even.
    fn narrow(from: &[Self::Compute], to: &mut [Self]);
    /// One number.
    fn widen_one(self) -> Self::Compute;
    /// One number, rounded.
    fn narrow_one(value: Self::Compute) -> Self;
}

macro_rules! same {
    ($type:ty) => {
        impl Operand for $type {
            type Compute = $type;

            #[inline(always)]
            fn as_compute(from: &[Self]) -> Option<&[Self]> {
                Some(from)
            }
            #[inline(always)]
            fn widen(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from);
            }
            fn narrow(from: &[Self], to: &mut [Self]) {
                to.copy_from_slice(from);
            }
            fn widen_one(self) -> Self {
                self
            }
            fn narrow_one(value: Self) -> Self {
                value
            }
        }
    };
}
same!(f64);
same!(f32);

impl Operand for f16 {
    type Compute = f32;

    #[inline(always)]
    fn as_compute(_: &[Self]) -> Option<&[f32]> {
        None
    }
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
    #[inline(always)]
    fn widen_one(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow_one(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Operand for bf16 {
    type Compute = f32;

    #[inline(always)]
    fn as_compute(_: &[Self]) -> Option<&[f32]> {
        None
    }
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        // A shift vectorises where the conversion of `half`, which quiets NaNs, does not.
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.widen_one();
        }
    }
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
    #[inline(always)]
    fn widen_one(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn narrow_one(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Copies a row of any stride.
#[inline(always)]
pub(crate) fn read_row<E: Operand>(row: Row<'_, E>, to: &mut [E::Compute]) {
    match row.contiguous() {
        Some(from) => E::widen(from, to),
        None => {
            for (to, from) in to.iter_mut().zip(row.iter()) {
                *to = from.widen_one();
            }
        }
    }
}

/// Writes a row of any stride.
pub(crate) fn write_row<E: Operand>(mut row: RowMut<'_, E>, from: &[E::Compute]) {
    match row.contiguous_mut() {
        Some(to) => E::narrow(from, to),
        None => row.fill_with(|index| E::narrow_one(from[index])),
    }
}

/// The rows of one head of a tensor `[B, length, heads, D]`: a matrix `[length, D]`.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a, E> {
    rows: HostView<'a, E>,
}

impl<'a, E: Operand> Head<'a, E> {
    pub(crate) fn new(view: &HostView<'a, E>, batch: usize, head: usize) -> Self {
        Self { rows: view.index_axis(2, head).index_axis(0, batch) }
    }

    /// The length of a row.
    pub(crate) fn width(&self) -> usize {
        self.rows.shape()[1]
    }

    /// One row as it is computed in: itself where it lies side by side in that type, else a copy in `room`.
    #[inline(always)]
    pub(crate) fn borrow<'s>(&self, position: usize, room: &'s mut [E::Compute]) -> &'s [E::Compute]
    where
        'a: 's,
    {
        let row = self.rows.matrix_row(position);
        if let Some(same) = row.contiguous().and_then(E::as_compute) {
            return same;
        }
        read_row(row, room);
        room
    }

    /// Copies one row.
    #[inline(always)]
    pub(crate) fn read(&self, position: usize, to: &mut [E::Compute]) {
        read_row(self.rows.matrix_row(position), to);
    }
}
