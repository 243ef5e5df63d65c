//! Outputs: rows of any float dtype and stride, written by many tasks.

use std::marker::PhantomData;

use attention_core::{DType, Dims, Scalar, ViewMut};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::float::Float;

/// An output that the tasks of a call share: each writes rows of its own.
pub(crate) struct SharedOutput<'a> {
    pointer: *mut u8,
    dtype: DType,
    shape: Dims,
    strides: [isize; 4],
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: the pointer is that of an exclusive view of plain data. Rows are written through unsafe methods
// only, whose callers guarantee that no other thread writes the same row at the same time.
unsafe impl Sync for SharedOutput<'_> {}
// SAFETY: an exclusive view of plain data may be used by another thread than the one that made it.
unsafe impl Send for SharedOutput<'_> {}

impl<'a> SharedOutput<'a> {
    /// Of a view in host memory, which a checked call guarantees.
    pub(crate) fn new(mut view: ViewMut<'a>) -> Self {
        let desc = view.desc();
        let mut strides = [0; 4];
        for (to, &from) in strides.iter_mut().zip(desc.strides().iter()) {
            *to = from;
        }
        Self {
            pointer: view.as_mut_ptr(),
            dtype: desc.dtype(),
            shape: desc.shape(),
            strides,
            memory: PhantomData,
        }
    }

    /// The address of an element: checks the index.
    fn element(&self, index: [usize; 4]) -> *mut u8 {
        assert!(
            index.iter().zip(self.shape.iter()).all(|(index, size)| index < size),
            "index {index:?} outside shape {}",
            self.shape
        );
        let offset: isize =
            index.iter().zip(self.strides).map(|(&index, stride)| index as isize * stride).sum();
        self.pointer.wrapping_offset(offset * self.dtype.size() as isize)
    }

    /// Writes the row of the last of four axes at `index`, each number multiplied by `factor`. A negative
    /// zero counts as zero: which of the two a sum is may depend on terms that take no part in it.
    ///
    /// # Safety
    /// No other thread writes this row at the same time.
    #[inline(always)]
    pub(crate) unsafe fn write_row<F: Float>(&self, index: [usize; 3], from: &[F], factor: F) {
        let [a, b, c] = index;
        let width = self.shape[3];
        if width == 0 {
            return;
        }
        let first = self.element([a, b, c, 0]);
        let from = &from[..width];
        // SAFETY: the element is inside a ViewMut in host memory of this dtype, and so are the `width`
        // elements at the last axis's stride; the caller guarantees that no other thread writes the row.
        unsafe {
            match self.dtype {
                DType::F64 => put(first.cast::<f64>(), self.strides[3], from, factor, |x| x.to_f64()),
                DType::F32 => put(first.cast::<f32>(), self.strides[3], from, factor, |x| x.to_f32()),
                DType::Bf16 => {
                    put(first.cast::<u16>(), self.strides[3], from, factor, |x| bf16_bits(x.to_f32()))
                }
                _ if self.strides[3] == 1 => {
                    let to = std::slice::from_raw_parts_mut(first.cast::<f16>(), width);
                    let mut room = [0f32; 64];
                    for (to, from) in to.chunks_mut(64).zip(from.chunks(64)) {
                        for (room, &from) in room.iter_mut().zip(from) {
                            *room = (from * factor + F::ZERO).to_f32();
                        }
                        to.convert_from_f32_slice(&room[..from.len()]);
                    }
                }
                _ => put(first.cast::<f16>(), self.strides[3], from, factor, |x| {
                    <f16 as Scalar>::from_f64(x.to_f64())
                }),
            }
        }
    }

    /// Fills the row at `index` with zeros.
    ///
    /// # Safety
    /// No other thread writes this row at the same time.
    pub(crate) unsafe fn zero_row(&self, index: [usize; 3]) {
        if self.shape[3] == 0 {
            return;
        }
        let first = self.element([index[0], index[1], index[2], 0]);
        let size = self.dtype.size();
        // SAFETY: the element is inside a ViewMut in host memory of this dtype, and so are all elements of
        // the row at the last axis's stride; the caller guarantees that no other thread writes the row. Zero
        // is all bits zero in every dtype.
        unsafe {
            if self.strides[3] == 1 {
                first.write_bytes(0, self.shape[3] * size);
            } else {
                for column in 0..self.shape[3] {
                    first.offset(column as isize * self.strides[3] * size as isize).write_bytes(0, size);
                }
            }
        }
    }

    /// Writes one element; axes that the tensor does not have are 0.
    ///
    /// # Safety
    /// No other thread writes this element at the same time.
    pub(crate) unsafe fn write<F: Float>(&self, index: [usize; 4], x: F) {
        let to = self.element(index);
        // SAFETY: `element` checked that the index is inside a ViewMut in host memory of this dtype; the
        // caller guarantees that no other thread writes the element.
        unsafe {
            match self.dtype {
                DType::F64 => to.cast::<f64>().write(x.to_f64()),
                DType::F32 => to.cast::<f32>().write(f32::from_f64(x.to_f64())),
                DType::Bf16 => to.cast::<bf16>().write(Scalar::from_f64(x.to_f64())),
                _ => to.cast::<f16>().write(Scalar::from_f64(x.to_f64())),
            }
        }
    }
}

/// # Safety
/// `from.len()` elements, `stride` apart, can be written from `first` on.
#[inline(always)]
unsafe fn put<F: Float, T: Copy>(
    first: *mut T,
    stride: isize,
    from: &[F],
    factor: F,
    convert: impl Fn(F) -> T,
) {
    if stride == 1 {
        // SAFETY: the caller guarantees that `from.len()` elements from `first` on can be written; with
        // stride 1 they are neighbours. Nothing else refers to them here.
        let to = unsafe { std::slice::from_raw_parts_mut(first, from.len()) };
        for (to, &from) in to.iter_mut().zip(from) {
            *to = convert(from * factor + F::ZERO);
        }
    } else {
        for (index, &from) in from.iter().enumerate() {
            // SAFETY: the caller guarantees that the elements can be written; the offset was checked to fit
            // isize when the view was made.
            unsafe { first.offset(index as isize * stride).write(convert(from * factor + F::ZERO)) };
        }
    }
}

/// The nearest bf16, ties to even, without a branch; NaN stays NaN.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}
