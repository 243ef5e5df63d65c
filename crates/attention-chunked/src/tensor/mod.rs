//! The caller's tensors: rows of any float dtype and stride, read in groups and written one by one.

mod eight_bit;
mod output;
mod stage;

use attention_core::{DType, HostView, Scalar, View};
use half::{bf16, f16};

use crate::float::Float;
use crate::simd::{Kernel, Simd};

pub(crate) use eight_bit::{Cached, EightBit, RowAhead};
pub(crate) use output::SharedOutput;

/// A tensor of any float dtype in host memory.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F64(HostView<'a, f64>),
    F32(HostView<'a, f32>),
    F16(HostView<'a, f16>),
    Bf16(HostView<'a, bf16>),
}

/// Runs `$body` with `$view` bound to the typed view.
macro_rules! typed {
    ($floats:expr, $view:ident => $body:expr) => {
        match $floats {
            Floats::F64($view) => $body,
            Floats::F32($view) => $body,
            Floats::F16($view) => $body,
            Floats::Bf16($view) => $body,
        }
    };
}
pub(crate) use typed;

/// Work at a level on a view whose element type is not known where the work is described.
pub(crate) trait ViewKernel {
    /// What it returns.
    type Output;

    /// Must be `#[inline(always)]`, as for a [`Kernel`].
    fn run<T: Source>(self, view: &HostView<'_, T>) -> Self::Output;
}

/// Work with its view.
pub(crate) struct OnView<'v, 'r, T, K> {
    pub(crate) view: &'r HostView<'v, T>,
    pub(crate) work: K,
}

impl<T: Source, K: ViewKernel> Kernel for OnView<'_, '_, T, K> {
    type Output = K::Output;

    #[inline(always)]
    fn run(self) -> K::Output {
        self.work.run(self.view)
    }
}

/// A float with the dtypes of operands that are computed in it: work on queries, keys and values is compiled
/// for these alone.
pub(crate) trait Operands: Float + Source {
    /// One of these dtypes: what keys and values of 8 bits become where they are read once.
    type Tile: Source + bytemuck::Pod + Default;

    /// Runs `work` on a query, key, value or gradient of the output.
    fn vectorize<S: Simd<Self>, K: ViewKernel>(of: &Floats<'_>, simd: S, work: K) -> K::Output;

    /// Rows of 8 bits, at most [`STAGE`](crate::engine::STAGE), one behind the other, divided by
    /// [`unit_of_tile`](Self::unit_of_tile).
    ///
    /// # Panics
    /// Where `to` has fewer rows.
    fn tile<'a, S: Simd<Self>>(
        simd: S,
        of: &EightBit<'a>,
        rows: impl Iterator<Item = RowAhead<'a>>,
        to: &mut [Self::Tile],
    );

    /// A power of two.
    fn unit_of_tile(of: &EightBit<'_>) -> f64;
}

macro_rules! vectorize {
    ($($variant:ident),*) => {
        fn vectorize<S: Simd<Self>, K: ViewKernel>(of: &Floats<'_>, simd: S, work: K) -> K::Output {
            match of {
                $(Floats::$variant(view) => simd.vectorize(OnView { view, work }),)*
                _ => unreachable!("the engine of a problem takes operands of its dtype"),
            }
        }
    };
}

impl Operands for f32 {
    type Tile = f16;

    vectorize!(F32, F16, Bf16);

    fn tile<'a, S: Simd<Self>>(
        simd: S,
        of: &EightBit<'a>,
        rows: impl Iterator<Item = RowAhead<'a>>,
        to: &mut [f16],
    ) {
        of.halve(simd, rows, to);
    }

    fn unit_of_tile(of: &EightBit<'_>) -> f64 {
        of.unit_of_halves()
    }
}

/// f32 is computed in f64 where batch rows are small.
impl Operands for f64 {
    type Tile = f64;

    vectorize!(F64, F32);

    fn tile<'a, S: Simd<Self>>(
        simd: S,
        of: &EightBit<'a>,
        rows: impl Iterator<Item = RowAhead<'a>>,
        to: &mut [f64],
    ) {
        of.widen(simd, rows, of.width(), to);
    }

    fn unit_of_tile(_: &EightBit<'_>) -> f64 {
        1.0
    }
}

/// An element type, with its widening load.
pub(crate) trait Source: Scalar {
    /// `LANES` elements, converted.
    ///
    /// # Safety
    /// They can be read.
    unsafe fn load<F: Float, S: Simd<F>>(simd: S, from: *const Self) -> S::V;

    /// One element, converted.
    fn widen<F: Float>(self) -> F;

    /// The elements as they are, where that is what they would be converted to.
    fn floats<F: Float>(of: &[Self]) -> Option<&[F]>;
}

macro_rules! source {
    ($type:ty, $load:ident, $widen:expr) => {
        impl Source for $type {
            #[inline(always)]
            unsafe fn load<F: Float, S: Simd<F>>(simd: S, from: *const Self) -> S::V {
                // SAFETY: the caller guarantees that `LANES` elements at `from` can be read.
                unsafe { simd.$load(from) }
            }
            #[inline(always)]
            fn widen<F: Float>(self) -> F {
                $widen(self)
            }
            #[inline(always)]
            fn floats<F: Float>(of: &[Self]) -> Option<&[F]> {
                let same = std::any::TypeId::of::<Self>() == std::any::TypeId::of::<F>();
                same.then(|| bytemuck::cast_slice(of))
            }
        }
    };
}
source!(f64, load_f64, F::from_f64);
source!(f32, load_f32, F::from_f32);
source!(f16, load_f16, |x: f16| F::from_f32(x.to_f32()));
source!(bf16, load_bf16, |x: bf16| F::from_f32(f32::from_bits(u32::from(x.to_bits()) << 16)));

impl<'a> Floats<'a> {
    /// Of a view in host memory with a float dtype, which a checked call guarantees.
    pub(crate) fn new(view: View<'a>) -> Self {
        let typed = match view.desc().dtype() {
            DType::F64 => view.host().map(Self::F64),
            DType::F32 => view.host().map(Self::F32),
            DType::F16 => view.host().map(Self::F16),
            DType::Bf16 => view.host().map(Self::Bf16),
            _ => None,
        };
        typed.unwrap_or_else(|| {
            unreachable!("a checked call has float tensors in host memory, got {}", view.desc())
        })
    }

    /// One number.
    pub(crate) fn at<F: Float>(&self, index: &[usize]) -> F {
        typed!(self, view => view.at(index).widen())
    }

    /// Whether the elements of a row are not neighbours.
    pub(crate) fn is_strided(&self) -> bool {
        typed!(self, view => is_strided(view))
    }

    /// The size of the last of four axes.
    fn width(&self) -> usize {
        typed!(self, view => view.shape()[3])
    }

    /// One row, unstaged.
    pub(crate) fn read_row<F: Float>(&self, index: [usize; 3], to: &mut [F]) {
        typed!(self, view => {
            let row = view.row(&index);
            for (to, from) in to.iter_mut().zip(row.iter()) {
                *to = from.widen();
            }
        });
    }

    /// The sum of the products of two rows, in f64.
    pub(crate) fn dot(&self, other: &Self, index: [usize; 3]) -> f64 {
        typed!(self, a => typed!(other, b => {
            let (a, b) = (a.row(&index), b.row(&index));
            match (a.contiguous(), b.contiguous()) {
                (Some(a), Some(b)) => dot(a.iter().copied(), b.iter().copied()),
                _ => dot(a.iter(), b.iter()),
            }
        }))
    }
}

/// With four sums, so that additions overlap.
#[inline(always)]
fn dot<A: Source, B: Source>(
    a: impl ExactSizeIterator<Item = A>,
    b: impl ExactSizeIterator<Item = B>,
) -> f64 {
    let mut sums = [0.0; 4];
    for (index, (a, b)) in a.zip(b).enumerate() {
        sums[index % 4] += a.widen::<f64>() * b.widen::<f64>();
    }
    (sums[0] + sums[2]) + (sums[1] + sums[3])
}

/// Whether the elements along the last axis are not neighbours.
pub(crate) fn is_strided<T: Copy>(view: &HostView<'_, T>) -> bool {
    let last = view.shape().rank() - 1;
    view.strides()[last] != 1 && view.shape()[last] > 1
}
