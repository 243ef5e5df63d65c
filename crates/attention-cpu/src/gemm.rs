//! Matrix products from the crates `gemm-f32` and `gemm-f64` behind checked matrices. Besides
//! [`prefetch`](crate::prefetch), this crate's only `unsafe`.
//!
//! Those two hold what the crate `gemm` dispatches to for real numbers. `gemm` itself also compiles kernels
//! for complex ones, which take as long to build as all of the real ones, and nothing here uses them.
//!
//! An element of a product over at most [`MAX_DEPTH`] terms is one chain of additions in order, whatever the
//! number of rows and columns, as long as both are at least 2 and the right-hand side is row-major (read off
//! gemm 0.19: its vector and dot-product special cases sum in another order). Longer sums are cut by the
//! callers.

#![allow(unsafe_code)]

use attention_core::Scalar;
use gemm_common::Parallelism;

/// `dst = alpha * dst + beta * lhs * rhs` for `m`, `n` and `k`: each matrix as a pointer with the strides of
/// its columns and rows in elements, `dst` with whether it is read, behind the factors three flags for
/// conjugates.
type Product<C> = unsafe fn(
    usize,
    usize,
    usize,
    *mut C,
    isize,
    isize,
    bool,
    *const C,
    isize,
    isize,
    *const C,
    isize,
    isize,
    C,
    C,
    bool,
    bool,
    bool,
    Parallelism,
);

/// A float that there is a matrix product for.
pub(crate) trait Multiply: Scalar {
    /// The product for the instruction set of this processor.
    fn product() -> Product<Self>;
}

impl Multiply for f32 {
    fn product() -> Product<Self> {
        gemm_f32::gemm::f32::get_gemm_fn()
    }
}

impl Multiply for f64 {
    fn product() -> Product<Self> {
        gemm_f64::gemm::f64::get_gemm_fn()
    }
}

/// The most terms of one product: above it `gemm` cuts the sum where its cache model says, which depends on
/// the other dimensions.
pub(crate) const MAX_DEPTH: usize = 512;

/// Tells whether the buffer that the `gemm` crate keeps for this thread can still be had: in the destructors
/// of thread-locals it may be gone, and `gemm` panics then. Made before that buffer, so destroyed after it.
struct Alive;

impl Drop for Alive {
    fn drop(&mut self) {}
}

thread_local! {
    static ALIVE: Alive = const { Alive };
}

/// Runs `work`, which multiplies matrices, on this thread, or on another one where this thread is past that.
///
/// # Errors
/// Where another thread is needed and cannot be made.
pub(crate) fn where_products_run(work: impl FnOnce() + Send) -> std::io::Result<()> {
    if ALIVE.try_with(|_| ()).is_ok() {
        work();
        return Ok(());
    }
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(())
    })
}

/// A matrix in a slice, with strides in elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mat<'a, C> {
    data: &'a [C],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

/// A row-major matrix that is written.
#[derive(Debug)]
pub(crate) struct MatMut<'a, C> {
    data: &'a mut [C],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

/// How many elements a matrix reaches over.
fn extent(rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> usize {
    if rows == 0 || columns == 0 { 0 } else { (rows - 1) * row_stride + (columns - 1) * column_stride + 1 }
}

impl<'a, C> Mat<'a, C> {
    /// A row-major matrix whose rows are `row_stride` apart.
    pub(crate) fn new(data: &'a [C], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(extent(rows, columns, row_stride, 1) <= data.len(), "the matrix reaches over its slice");
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose.
    pub(crate) fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

impl<'a, C> MatMut<'a, C> {
    /// A row-major matrix whose rows are `row_stride` apart.
    pub(crate) fn new(data: &'a mut [C], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(extent(rows, columns, row_stride, 1) <= data.len(), "the matrix reaches over its slice");
        assert!(row_stride >= columns || rows <= 1, "the rows overlap");
        Self { data, rows, columns, row_stride }
    }
}

/// What happens to the destination's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    /// They are replaced; they may be NaN.
    Overwrite,
    /// The product is added to them.
    Accumulate,
}

/// `dst = factor * lhs * rhs`, or `dst += factor * lhs * rhs`.
///
/// # Panics
/// Where the dimensions do not fit.
pub(crate) fn gemm<C: Multiply>(
    dst: MatMut<'_, C>,
    mode: Destination,
    factor: C,
    lhs: Mat<'_, C>,
    rhs: Mat<'_, C>,
) {
    let (m, n, k) = (dst.rows, dst.columns, lhs.columns);
    assert!(lhs.rows == m && rhs.columns == n && rhs.rows == k, "dimensions of a product");
    assert!(k <= MAX_DEPTH, "a product over {k} terms would not be summed in order");
    if m == 0 || n == 0 {
        return;
    }
    let accumulate = mode == Destination::Accumulate;
    let product = C::product();
    // The kernels prefer a destination whose columns are contiguous. A row-major one is the transpose of such
    // a matrix, and its product that of the factors' transposes in the other order.
    let (m, n, to, lhs, rhs) = if dst.row_stride > 1 {
        (n, m, (dst.row_stride, 1), rhs.transposed(), lhs.transposed())
    } else {
        (m, n, (1, dst.row_stride), lhs, rhs)
    };
    // SAFETY: each matrix's extent was checked against its slice when it was made, and `m`, `n`, `k` are the
    // dimensions of all three, so every access is inside a slice; transposing swaps dimensions and strides of
    // all three together. `dst` is an exclusive slice whose rows do not overlap and cannot alias the shared
    // slices; all strides fit isize since the extents are lengths of slices. Without reading `dst` its
    // contents do not matter.
    unsafe {
        product(
            m,
            n,
            k,
            dst.data.as_mut_ptr(),
            to.0 as isize,
            to.1 as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.column_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.column_stride as isize,
            rhs.row_stride as isize,
            C::from_f32(if accumulate { 1.0 } else { 0.0 }),
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// The promise of batch invariance stands on this: an element does not depend on the size of the product.
    #[test]
    fn elements_do_not_depend_on_the_dimensions() {
        for depth in [1, 2, 3, 7, 64, 65, 128, 512] {
            let (lhs, rhs) = (numbers(70 * depth, 1), numbers(depth * 80, 2));
            let product = |rows: usize, columns: usize| {
                let mut dst = vec![f32::NAN; rows * columns];
                gemm(
                    MatMut::new(&mut dst, rows, columns, columns),
                    Destination::Overwrite,
                    0.5,
                    Mat::new(&lhs, rows, depth, depth),
                    Mat::new(&rhs, depth, columns, 80),
                );
                dst
            };
            let whole = product(70, 80);
            for (rows, columns) in [(2, 64), (2, 2), (3, 5), (16, 64), (33, 64), (48, 80), (70, 64), (69, 7)]
            {
                let part = product(rows, columns);
                for row in 0..rows {
                    for column in 0..columns {
                        let (got, want) = (part[row * columns + column], whole[row * 80 + column]);
                        assert_eq!(
                            got.to_bits(),
                            want.to_bits(),
                            "{rows}x{columns}x{depth} at {row}, {column}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn an_overwritten_destination_may_hold_nan() {
        let mut dst = [f64::NAN; 4];
        let (lhs, rhs) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]);
        gemm(
            MatMut::new(&mut dst, 2, 2, 2),
            Destination::Overwrite,
            1.0,
            Mat::new(&lhs, 2, 2, 2),
            Mat::new(&rhs, 2, 2, 2).transposed(),
        );
        assert_eq!(dst, [17.0, 23.0, 39.0, 53.0]);
    }
}
