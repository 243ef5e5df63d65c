//! Shapes, strides, and the description of a tensor without its memory.

use crate::DType;

/// The largest rank of any tensor in a call.
pub const MAX_RANK: usize = 4;

/// One number for each axis, for up to [`MAX_RANK`] axes. Dereferences to a slice.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Vec<T>", into = "Vec<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound = "T: Copy + Default + serde::Serialize + serde::de::DeserializeOwned")
)]
pub struct Axes<T> {
    rank: u8,
    // Entries at and after `rank` hold the default, so that the derived comparisons and hashes are right.
    values: [T; MAX_RANK],
}

/// A shape: the number of elements along each axis.
pub type Dims = Axes<usize>;

/// The distance between neighbours along each axis, in elements. Negative and zero strides are legal for
/// inputs.
pub type Strides = Axes<isize>;

impl<T: Copy + Default> Axes<T> {
    /// The axes of a slice, or `None` where there are more than [`MAX_RANK`].
    pub fn from_slice(values: &[T]) -> Option<Self> {
        let mut axes = Self { rank: u8::try_from(values.len()).ok()?, values: [T::default(); MAX_RANK] };
        axes.values.get_mut(..values.len())?.copy_from_slice(values);
        Some(axes)
    }

    /// The number of axes.
    pub fn rank(&self) -> usize {
        usize::from(self.rank)
    }

    /// A copy without `axis`.
    pub(crate) fn without(&self, axis: usize) -> Self {
        let mut axes = Self { rank: 0, values: [T::default(); MAX_RANK] };
        for (_, &value) in self.iter().enumerate().filter(|&(index, _)| index != axis) {
            axes.values[axes.rank()] = value;
            axes.rank += 1;
        }
        axes
    }
}

impl<T> std::ops::Deref for Axes<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[..usize::from(self.rank)]
    }
}

impl<T> std::ops::DerefMut for Axes<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[..usize::from(self.rank)]
    }
}

macro_rules! axes_from_arrays {
    ($($rank:literal),*) => {$(
        impl<T: Copy + Default> From<[T; $rank]> for Axes<T> {
            fn from(values: [T; $rank]) -> Self {
                let mut all = [T::default(); MAX_RANK];
                all[..$rank].copy_from_slice(&values);
                Self { rank: $rank, values: all }
            }
        }
    )*};
}
axes_from_arrays!(0, 1, 2, 3, 4);

impl<T: Copy + Default> TryFrom<Vec<T>> for Axes<T> {
    type Error = String;

    fn try_from(values: Vec<T>) -> Result<Self, String> {
        Self::from_slice(&values).ok_or_else(|| format!("rank {} is above {MAX_RANK}", values.len()))
    }
}

impl<T: Copy> From<Axes<T>> for Vec<T> {
    fn from(axes: Axes<T>) -> Self {
        axes.to_vec()
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for Axes<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<T: std::fmt::Debug> std::fmt::Display for Axes<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&format!("{:?}", &**self))
    }
}

/// The element count of a shape, or `None` on overflow of `isize`.
pub(crate) fn element_count(shape: &[usize]) -> Option<usize> {
    // A zero anywhere makes the tensor empty, whatever the other axes say.
    if shape.contains(&0) {
        return Some(0);
    }
    let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size))?;
    isize::try_from(count).ok().map(|_| count)
}

/// A tensor without its memory: dtype, shape and strides.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorDesc {
    dtype: DType,
    // Shape and strides have one rank, which is kept once: a call holds some twenty of these.
    rank: u8,
    // As in `Axes`, entries at and after `rank` hold 0.
    sizes: [usize; MAX_RANK],
    steps: [isize; MAX_RANK],
}

impl TensorDesc {
    /// A row-major tensor without gaps.
    ///
    /// ```
    /// use attention_core::{DType, TensorDesc}; // or of `attention`, which are the same
    ///
    /// let query = TensorDesc::contiguous(DType::F32, [2, 128, 8, 64]);
    /// assert_eq!(&query.strides()[..], [65536, 512, 64, 1]);
    /// ```
    pub fn contiguous(dtype: DType, shape: impl Into<Dims>) -> Self {
        let shape = shape.into();
        let mut strides = Strides { rank: shape.rank, values: [0; MAX_RANK] };
        let mut step = 1isize;
        for axis in (0..shape.rank()).rev() {
            strides[axis] = step;
            // Saturates instead of overflowing: `span` refuses such a tensor with the shape in the message.
            step = step.saturating_mul(isize::try_from(shape[axis].max(1)).unwrap_or(isize::MAX));
        }
        Self::of(dtype, shape, strides)
    }

    /// Of equal ranks.
    #[inline]
    fn of(dtype: DType, shape: Dims, strides: Strides) -> Self {
        Self { dtype, rank: shape.rank, sizes: shape.values, steps: strides.values }
    }

    #[inline]
    fn sizes(&self) -> &[usize] {
        &self.sizes[..usize::from(self.rank)]
    }

    #[inline]
    fn steps(&self) -> &[isize] {
        &self.steps[..usize::from(self.rank)]
    }

    /// A tensor with strides of its own, counted in elements; `None` if the ranks differ.
    pub fn strided(dtype: DType, shape: impl Into<Dims>, strides: impl Into<Strides>) -> Option<Self> {
        let (shape, strides) = (shape.into(), strides.into());
        (shape.rank == strides.rank).then(|| Self::of(dtype, shape, strides))
    }

    /// The same dtype with other axes; the ranks must be equal.
    pub(crate) fn reshaped(&self, shape: Dims, strides: Strides) -> Self {
        debug_assert_eq!(shape.rank(), strides.rank());
        Self::of(self.dtype, shape, strides)
    }

    /// The same tensor with an axis of size 1 and stride 0 in front; `None` where it has all axes already.
    pub(crate) fn with_leading_axis(&self) -> Option<Self> {
        let shape = Dims::from_slice(&[&[1], self.sizes()].concat())?;
        let strides = Strides::from_slice(&[&[0], self.steps()].concat())?;
        Some(self.reshaped(shape, strides))
    }

    /// The same tensor without `axis`.
    pub(crate) fn without_axis(&self, axis: usize) -> Self {
        Self::of(self.dtype, self.shape().without(axis), self.strides().without(axis))
    }

    /// The element type.
    #[inline]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape.
    #[inline]
    pub fn shape(&self) -> Dims {
        Dims { rank: self.rank, values: self.sizes }
    }

    /// The strides, in elements.
    #[inline]
    pub fn strides(&self) -> Strides {
        Strides { rank: self.rank, values: self.steps }
    }

    /// The number of axes.
    #[inline]
    pub fn rank(&self) -> usize {
        usize::from(self.rank)
    }

    /// Whether the tensor has no elements.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.sizes().contains(&0)
    }

    /// The number of elements, or `None` on overflow.
    pub fn element_count(&self) -> Option<usize> {
        element_count(self.sizes())
    }

    /// The lowest and highest element offset from the first element, or `None` where the tensor does not fit
    /// in an address space. An empty tensor spans `(0, -1)`.
    pub fn span(&self) -> Option<(isize, isize)> {
        // In one pass, whose overflows are looked at in the end: every call asks for some ten spans.
        let (mut count, mut low, mut high) = (1usize, 0isize, 0isize);
        let (mut empty, mut overflows) = (false, false);
        for (&size, &stride) in self.sizes().iter().zip(self.steps()) {
            empty |= size == 0;
            let (product, too_many) = count.overflowing_mul(size);
            // A size above `isize::MAX` is refused for its count.
            let (reach, too_far) = (size.wrapping_sub(1) as isize).overflowing_mul(stride);
            let (lower, too_low) = low.overflowing_add(reach.min(0));
            let (higher, too_high) = high.overflowing_add(reach.max(0));
            (count, low, high) = (product, lower, higher);
            overflows |= too_many | too_far | too_low | too_high;
        }
        if empty {
            return Some((0, -1));
        }
        let size = self.dtype.size();
        let (bytes, too_many) = count.overflowing_mul(size);
        let reach = high.checked_sub(low)?.checked_add(1)?.checked_mul(size as isize)?;
        let fits = !(overflows || too_many) && isize::try_from(bytes).is_ok() && reach > 0;
        fits.then_some((low, high))
    }

    /// [`span`](Self::span) of a tensor that was found to have one.
    #[inline]
    pub(crate) fn known_span(&self) -> (isize, isize) {
        if self.is_empty() {
            return (0, -1);
        }
        self.sizes().iter().zip(self.steps()).fold((0, 0), |(low, high), (&size, &stride)| {
            let reach = (size as isize - 1) * stride;
            (low + reach.min(0), high + reach.max(0))
        })
    }

    /// Whether the elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.is_empty() || {
            let dense = Self::contiguous(self.dtype, self.shape());
            (0..self.rank()).all(|axis| self.sizes[axis] == 1 || self.steps[axis] == dense.steps[axis])
        }
    }

    /// Whether two indices of the tensor can reach the same element. Sufficient, not exact: with the axes
    /// sorted by stride, every stride must be larger than the reach of all smaller ones. Layouts that
    /// interleave in another way count as overlapping.
    pub fn may_overlap_itself(&self) -> bool {
        if self.is_empty() {
            return false;
        }
        let mut axes: [(usize, usize); MAX_RANK] =
            std::array::from_fn(|axis| (self.steps[axis].unsigned_abs(), self.sizes[axis]));
        axes.sort_unstable();
        let mut reach = 0usize;
        // An axis with one element is never stepped along, and neither is one that there is not.
        axes.into_iter().filter(|&(_, size)| size > 1).any(|(stride, size)| {
            let overlaps = stride <= reach;
            reach = reach.saturating_add((size - 1).saturating_mul(stride));
            overlaps
        })
    }
}

impl std::fmt::Display for TensorDesc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.dtype, self.shape())?;
        if self.is_contiguous() { Ok(()) } else { write!(f, " strides {}", self.strides()) }
    }
}

impl std::fmt::Debug for TensorDesc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TensorDesc")
            .field("dtype", &self.dtype)
            .field("shape", &self.shape())
            .field("strides", &self.strides())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn span_covers_negative_strides() {
        let desc = TensorDesc::strided(DType::F32, [3, 4], [-4, 1]).unwrap();
        assert_eq!(desc.span(), Some((-8, 3)));
    }

    #[test]
    fn overflow_is_none_not_a_panic() {
        let desc = TensorDesc::contiguous(DType::F32, [usize::MAX, usize::MAX, 2, 2]);
        assert_eq!(desc.element_count(), None);
        assert_eq!(desc.span(), None);
        let desc = TensorDesc::contiguous(DType::F64, [isize::MAX as usize / 4]);
        assert_eq!(desc.span(), None);
        let desc = TensorDesc::strided(DType::F32, [2, 2], [isize::MAX, isize::MIN]).unwrap();
        assert_eq!(desc.span(), None);
    }

    #[test]
    fn broadcast_outputs_overlap() {
        assert!(TensorDesc::strided(DType::F32, [2, 3], [0, 1]).unwrap().may_overlap_itself());
        assert!(!TensorDesc::strided(DType::F32, [1, 3], [0, 1]).unwrap().may_overlap_itself());
        assert!(!TensorDesc::contiguous(DType::F32, [2, 3, 4, 5]).may_overlap_itself());
    }

    /// The span as its definition says it, in integers that nothing of it overflows.
    fn wide_span(desc: &TensorDesc) -> Option<(isize, isize)> {
        if desc.is_empty() {
            return Some((0, -1));
        }
        let most = isize::MAX as i128;
        let bytes = desc.dtype().size() as i128;
        let mut count = 1i128;
        let (mut low, mut high) = (0i128, 0i128);
        for (&size, &stride) in desc.shape().iter().zip(desc.strides().iter()) {
            let reach = (size as i128 - 1) * stride as i128;
            count *= size as i128;
            (low, high) = (low + reach.min(0), high + reach.max(0));
            if size as i128 > most || count > most || reach.abs() > most || low < -most - 1 || high > most {
                return None;
            }
        }
        ((count * bytes).max((high - low + 1) * bytes) <= most).then_some((low as isize, high as isize))
    }

    proptest! {
        /// Sizes and strides about the bounds of integers included.
        #[test]
        fn spans_are_those_of_wide_integers(
            axes in proptest::array::uniform4((
                proptest::sample::select(vec![0, 1, 1, 2, 3, 1 << 20, 1 << 32, isize::MAX as usize, usize::MAX]),
                proptest::sample::select(vec![0, 1, -1, 7, 1 << 31, -(1 << 31), isize::MAX, isize::MIN]),
            )),
        ) {
            let desc = TensorDesc::strided(DType::F32, axes.map(|axis| axis.0), axes.map(|axis| axis.1)).unwrap();
            prop_assert_eq!(desc.span(), wide_span(&desc));
            if let Some(span) = desc.span() {
                prop_assert_eq!(desc.known_span(), span);
            }
        }

        /// Whatever the rule calls free of overlap has as many distinct offsets as elements.
        #[test]
        fn no_overlap_means_distinct_offsets(
            shape in proptest::array::uniform3(1usize..4),
            strides in proptest::array::uniform3(-12isize..12),
        ) {
            let desc = TensorDesc::strided(DType::F32, shape, strides).unwrap();
            let mut offsets = std::collections::HashSet::new();
            let mut distinct = true;
            for i in 0..shape[0] {
                for j in 0..shape[1] {
                    for k in 0..shape[2] {
                        let offset = i as isize * strides[0] + j as isize * strides[1] + k as isize * strides[2];
                        distinct &= offsets.insert(offset);
                    }
                }
            }
            prop_assert!(desc.may_overlap_itself() || distinct);
        }
    }
}
