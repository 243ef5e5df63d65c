//! The caller's tensors: rows of any float dtype and stride, read in groups and written one by one.

use std::marker::PhantomData;

use attention_core::{DType, Dims, HostView, Scalar, View, ViewMut};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::engine::{Engine, FloatRows, STAGE, Staged};
use crate::float::Float;
use crate::simd::{Kernel, Simd, prefetch};

/// A tensor of any float dtype in host memory.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F64(HostView<'a, f64>),
    F32(HostView<'a, f32>),
    F16(HostView<'a, f16>),
    Bf16(HostView<'a, bf16>),
}

/// How many positions ahead rows are asked for: those of neighbouring positions are as far apart as all heads
/// together, which no processor's own prefetching follows.
const AHEAD: usize = STAGE;

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

/// The dtypes of operands that a float computes: work on queries, keys and values is compiled for these alone.
pub(crate) trait Operands {
    /// Runs `work` on a query, key, value or gradient of the output.
    fn vectorize<F: Float, S: Simd<F>, K: ViewKernel>(of: &Floats<'_>, simd: S, work: K) -> K::Output;
}

macro_rules! operands {
    ($name:ident, $what:literal, $($variant:ident),*) => {
        #[doc = $what]
        pub(crate) enum $name {}

        impl Operands for $name {
            fn vectorize<F: Float, S: Simd<F>, K: ViewKernel>(of: &Floats<'_>, simd: S, work: K) -> K::Output {
                match of {
                    $(Floats::$variant(view) => simd.vectorize(OnView { view, work }),)*
                    _ => unreachable!("the engine of a problem takes operands of its dtype"),
                }
            }
        }
    };
}
operands!(OperandsOfF32, "f32, f16 and bf16 are computed in f32.", F32, F16, Bf16);
operands!(OperandsOfF64, "f64 is computed in f64, and f32 where batch rows are small.", F64, F32);

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
                // SAFETY: the caller's.
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

    /// The rows `index(0), .., index(count - 1)` of the last axis, each multiplied by `factor`, on their way to be
    /// packed; in the room, unless the engine takes them as they lie. Bit `r` of the result says that row `r` has an
    /// element that is not finite; with `clean` such a row becomes zero.
    pub(crate) fn stage<'r, E: Engine>(
        &'r self,
        engine: E,
        count: usize,
        index: &dyn Fn(usize) -> [usize; 3],
        factor: E::F,
        clean: bool,
        room: &'r mut [E::F],
    ) -> (Staged<'r, E::F>, u32) {
        if E::TAKES_BF16
            && factor == E::F::ONE
            && let Self::Bf16(view) = self
            && let Some(rows) = contiguous_rows(view, count, index)
        {
            let ahead = view.strides()[1].wrapping_mul(AHEAD as isize);
            let not_finite = engine.plain().vectorize(NotFinite { rows: &rows, ahead });
            if !clean || not_finite == 0 {
                return (Staged::Bf16(rows), not_finite);
            }
        }
        let not_finite = self.stage_floats(engine.plain(), count, index, factor, clean, room);
        let width = self.width();
        (Staged::Floats(FloatRows { data: room, stride: Self::stage_stride(width), width }), not_finite)
    }

    /// As [`stage`](Self::stage), always in the room: zero rows up to [`STAGE`], [`stage_stride`](Self::stage_stride)
    /// apart.
    pub(crate) fn stage_floats<F: Float, S: Simd<F>>(
        &self,
        simd: S,
        count: usize,
        index: &dyn Fn(usize) -> [usize; 3],
        factor: F,
        clean: bool,
        room: &mut [F],
    ) -> u32 {
        F::Operands::vectorize(self, simd, StageRows { simd, count, index, factor, clean, to: room })
    }

    /// Whether the elements of a row are not neighbours.
    pub(crate) fn is_strided(&self) -> bool {
        typed!(self, view => is_strided(view))
    }

    /// The size of the last of four axes.
    fn width(&self) -> usize {
        typed!(self, view => view.shape()[3])
    }

    /// The distance of staged rows of `width` elements.
    pub(crate) const fn stage_stride(width: usize) -> usize {
        // Rows a power of two apart would share the sets of the cache. No memory is that large where it saturates.
        match width.checked_next_multiple_of(16) {
            Some(width) => width.saturating_add(16),
            None => usize::MAX,
        }
    }

    /// Elements of the room that staging needs.
    pub(crate) const fn stage_len(width: usize) -> usize {
        STAGE.saturating_mul(Self::stage_stride(width))
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

/// Some rows of the last axis, where their elements are neighbours; empty behind the last.
fn contiguous_rows<'a, T: Copy>(
    view: &HostView<'a, T>,
    count: usize,
    index: &dyn Fn(usize) -> [usize; 3],
) -> Option<[&'a [T]; STAGE]> {
    let mut rows: [&[T]; STAGE] = [&[]; STAGE];
    for (row, to) in rows[..count].iter_mut().enumerate() {
        *to = view.row(&index(row)).contiguous()?;
    }
    Some(rows)
}

/// Which of some rows of bf16 have an element that is not finite.
struct NotFinite<'r, 'a> {
    rows: &'r [&'a [bf16]; STAGE],
    /// How far away the row is that will be wanted later.
    ahead: isize,
}

impl Kernel for NotFinite<'_, '_> {
    type Output = u32;

    #[inline(always)]
    fn run(self) -> u32 {
        const EXPONENT: u16 = 0x7f80;
        let mut not_finite = 0;
        for (index, row) in self.rows.iter().enumerate().filter(|(_, row)| !row.is_empty()) {
            prefetch(row.as_ptr().wrapping_offset(self.ahead).cast(), size_of_val(*row));
            let largest = row.iter().fold(0, |largest, x| (x.to_bits() & EXPONENT).max(largest));
            if largest == EXPONENT {
                not_finite |= 1 << index;
            }
        }
        not_finite
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

struct StageRows<'r, F, S> {
    simd: S,
    count: usize,
    index: &'r dyn Fn(usize) -> [usize; 3],
    factor: F,
    clean: bool,
    to: &'r mut [F],
}

impl<F: Float, S: Simd<F>> ViewKernel for StageRows<'_, F, S> {
    type Output = u32;

    #[inline(always)]
    fn run<T: Source>(self, view: &HostView<'_, T>) -> u32 {
        let Self { simd, count, index, factor, clean, to } = self;
        let width = view.shape()[3];
        let stride = Floats::stage_stride(width);
        let mut not_finite = 0;
        let ahead = view.strides()[1].wrapping_mul(AHEAD as isize);
        for (row, to) in to.chunks_exact_mut(stride).take(STAGE).enumerate() {
            let to = &mut to[..width];
            if row >= count {
                to.fill(F::ZERO);
                continue;
            }
            let from = view.row(&index(row));
            // Zero times a number that is not finite is NaN, which every sum keeps.
            let mut nothing = simd.splat(F::ZERO);
            let mut nothing_left = F::ZERO;
            let mut done = 0;
            if let Some(from) = from.contiguous() {
                prefetch(from.as_ptr().wrapping_offset(ahead).cast(), size_of_val(from));
                while done + S::LANES <= width {
                    // SAFETY: `done + LANES` elements are in both rows, which have `width`.
                    unsafe {
                        let x = T::load(simd, from.as_ptr().add(done));
                        nothing = simd.fma(x, simd.splat(F::ZERO), nothing);
                        simd.store(to.as_mut_ptr().add(done), simd.mul(x, simd.splat(factor)));
                    }
                    done += S::LANES;
                }
            }
            for (column, to) in to.iter_mut().enumerate().skip(done) {
                let x: F = from.at(column).widen();
                nothing_left += x * F::ZERO;
                *to = x * factor;
            }
            if simd.reduce_sum(nothing) + nothing_left != F::ZERO {
                not_finite |= 1 << row;
                if clean {
                    to.fill(F::ZERO);
                }
            }
        }
        not_finite
    }
}

/// An output that the tasks of a call share: each writes rows of its own.
pub(crate) struct SharedOutput<'a> {
    pointer: *mut u8,
    dtype: DType,
    shape: Dims,
    strides: [isize; 4],
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: an exclusive reference to plain data, whose rows are written through unsafe methods that ask their callers
// for different rows on different threads.
unsafe impl Sync for SharedOutput<'_> {}
// SAFETY: as above.
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

    /// Writes the row of the last of four axes at `index`, each number multiplied by `factor`. A negative zero counts as
    /// zero: which of the two a sum is may depend on terms that take no part in it.
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
        // SAFETY: the element is inside a ViewMut in host memory of this dtype, and so are the `width` elements at the
        // last axis's stride; the caller vouches that this thread has the row to itself.
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
    /// As [`write_row`](Self::write_row).
    pub(crate) unsafe fn zero_row(&self, index: [usize; 3]) {
        if self.shape[3] == 0 {
            return;
        }
        let first = self.element([index[0], index[1], index[2], 0]);
        let size = self.dtype.size();
        // SAFETY: as in `write_row`; zero is all bits zero in every dtype.
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
        // SAFETY: as in `write_row`.
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

/// Whether the elements along the last axis are not neighbours.
pub(crate) fn is_strided<T: Source>(view: &HostView<'_, T>) -> bool {
    let last = view.shape().rank() - 1;
    view.strides()[last] != 1 && view.shape()[last] > 1
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
        // SAFETY: with stride 1 the elements are neighbours.
        let to = unsafe { std::slice::from_raw_parts_mut(first, from.len()) };
        for (to, &from) in to.iter_mut().zip(from) {
            *to = convert(from * factor + F::ZERO);
        }
    } else {
        for (index, &from) in from.iter().enumerate() {
            // SAFETY: the caller's; the offset was checked to fit isize when the view was made.
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
