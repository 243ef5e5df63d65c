//! Typed access to views of host memory.

use std::marker::PhantomData;
use std::ops::Range;

use super::{View, ViewMut};
use crate::{DType, Device, Dims, Element, Scalar, Strides};

/// A view of host memory with a known element type: indexed, bounds-checked, safe.
#[derive(Clone, Copy, Debug)]
pub struct HostView<'a, T> {
    /// The memory from the lowest to the highest element.
    span: &'a [T],
    /// Where in `span` the element at index 0 is.
    origin: usize,
    shape: Dims,
    strides: Strides,
}

/// The elements along the last axis of a [`HostView`].
#[derive(Clone, Copy, Debug)]
pub struct Row<'a, T> {
    span: &'a [T],
    origin: usize,
    stride: isize,
    len: usize,
}

/// The tokens of one head: a [`HostView`] of four axes at an index of the third. A copy of what inner loops
/// need, so that they may keep it in registers.
#[derive(Clone, Copy, Debug)]
pub struct HeadView<'a, T> {
    span: &'a [T],
    origin: usize,
    /// Of the first two axes.
    sizes: [usize; 2],
    strides: [isize; 2],
    stride: isize,
    len: usize,
}

/// Some rows of a [`HeadView`] at equal distances: neighbours along the second axis.
#[derive(Clone, Copy, Debug)]
pub struct RowStretch<'a, T> {
    span: &'a [T],
    origin: usize,
    /// The distance between rows.
    row_stride: isize,
    rows: usize,
    stride: isize,
    len: usize,
}

/// Rows of a [`HostView`], the same distance apart.
#[derive(Clone, Debug)]
pub struct RowRun<'a, T> {
    row: Row<'a, T>,
    /// From a row to the next, in elements.
    step: isize,
    left: usize,
}

impl<'a> View<'a> {
    /// The view with elements of type `T`, or `None` where it has another dtype or is not in host memory.
    pub fn host<T: Element + bytemuck::Pod>(&self) -> Option<HostView<'a, T>> {
        (self.raw.desc.dtype() == T::DTYPE).then(|| self.host_as())?
    }

    /// A boolean view as bytes, zero for `false`; `None` where it has another dtype or is not in host memory.
    pub fn host_mask(&self) -> Option<HostView<'a, u8>> {
        (self.raw.desc.dtype() == DType::Bool).then(|| self.host_as())?
    }

    /// The bytes of a view of [`DType::EIGHT_BIT`]; `None` where it has another dtype or is not in host
    /// memory.
    pub fn host_bytes(&self) -> Option<HostView<'a, u8>> {
        self.raw.desc.dtype().is_eight_bit().then(|| self.host_as())?
    }

    /// `T` must have the size and alignment of the view's dtype and accept every bit pattern.
    fn host_as<T: bytemuck::Pod>(&self) -> Option<HostView<'a, T>> {
        if self.raw.device != Device::Cpu {
            return None;
        }
        let (shape, strides) = (self.raw.desc.shape(), self.raw.desc.strides());
        // Checked when the view was made.
        let (low, high) = self.raw.desc.known_span();
        if self.raw.desc.is_empty() {
            return Some(HostView { span: &[], origin: 0, shape, strides });
        }
        let first = self.raw.at(low).as_ptr().cast::<T>();
        // SAFETY: by the invariant of View, the span from `low` to `high` elements around the pointer is
        // allocated host memory, initialised and not written during 'a; the pointer is aligned for the dtype,
        // `T` is plain data of the same size, and the length in bytes fits isize (`span` checks it).
        let span = unsafe { std::slice::from_raw_parts(first, high.abs_diff(low) + 1) };
        Some(HostView { span, origin: low.unsigned_abs(), shape, strides })
    }
}

impl<'a, T: Copy> HostView<'a, T> {
    /// Rows of `width` elements one behind the other, as tokens of one head: of shape `[1, rows, 1, width]`.
    /// Cheap enough for a few rows at a time; elements behind the last whole row are left out.
    ///
    /// # Panics
    /// Where `width` is 0 or does not fit isize.
    pub fn of_rows(elements: &'a [T], width: usize) -> Self {
        assert!(width > 0, "rows without elements");
        let stride = isize::try_from(width).expect("a width that fits isize");
        let (shape, strides) = ([1, elements.len() / width, 1, width].into(), [0, stride, 0, 1].into());
        Self { span: elements, origin: 0, shape, strides }
    }

    /// The shape.
    pub fn shape(&self) -> Dims {
        self.shape
    }

    /// The strides, in elements.
    pub fn strides(&self) -> Strides {
        self.strides
    }

    /// Where in the span an index is. Wraps on nonsense: the caller indexes a slice with it.
    #[inline]
    fn position(&self, index: &[usize]) -> usize {
        index.iter().zip(self.strides.iter()).fold(self.origin, |position, (&index, &stride)| {
            position.wrapping_add_signed((index as isize).wrapping_mul(stride))
        })
    }

    /// One element.
    ///
    /// # Panics
    /// Where the index has another rank or is outside the shape.
    #[inline]
    pub fn at(&self, index: &[usize]) -> T {
        assert!(
            index.len() == self.shape.rank() && index.iter().zip(self.shape.iter()).all(|(i, size)| i < size),
            "index {index:?} outside shape {}",
            self.shape
        );
        self.span[self.position(index)]
    }

    /// The elements along the last axis at these indices of the others.
    ///
    /// # Panics
    /// Where `leading` does not have one index less than the rank, or is outside the shape.
    #[inline]
    pub fn row(&self, leading: &[usize]) -> Row<'a, T> {
        let last = leading.len();
        assert!(
            last + 1 == self.shape.rank() && leading.iter().zip(self.shape.iter()).all(|(i, size)| i < size),
            "row {leading:?} outside shape {}",
            self.shape
        );
        let len = self.shape[last];
        let origin = if len == 0 { 0 } else { self.position(leading) };
        Row { span: self.span, origin, stride: self.strides[last], len }
    }

    /// The view at `index` of `axis`, without that axis.
    ///
    /// # Panics
    /// Where the view has no such axis or the axis no such index.
    pub fn index_axis(&self, axis: usize, index: usize) -> Self {
        assert!(
            self.shape.get(axis).is_some_and(|&size| index < size),
            "index {index} of axis {axis} outside shape {}",
            self.shape
        );
        let origin = if self.shape.contains(&0) {
            self.origin
        } else {
            self.origin.wrapping_add_signed((index as isize).wrapping_mul(self.strides[axis]))
        };
        let (shape, strides) = (self.shape.without(axis), self.strides.without(axis));
        Self { span: self.span, origin, shape, strides }
    }

    /// The part `range` of `axis`.
    ///
    /// # Panics
    /// Where the view has no such axis or the axis no such range.
    pub fn narrow(&self, axis: usize, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && self.shape.get(axis).is_some_and(|&size| range.end <= size),
            "range {range:?} of axis {axis} outside shape {}",
            self.shape
        );
        let mut shape = self.shape;
        shape[axis] = range.len();
        // An empty part has no element to point at.
        let origin = if shape.contains(&0) {
            self.origin
        } else {
            self.origin.wrapping_add_signed((range.start as isize).wrapping_mul(self.strides[axis]))
        };
        Self { span: self.span, origin, shape, strides: self.strides }
    }

    /// Row `index` of a view of two axes: [`row`](Self::row) without the loop over axes, for inner loops.
    ///
    /// # Panics
    /// Where the view has another rank or fewer rows.
    #[inline(always)]
    pub fn matrix_row(&self, index: usize) -> Row<'a, T> {
        let &[rows, len] = &self.shape[..] else {
            panic!("row {index} of a view of shape {}, which is no matrix", self.shape)
        };
        assert!(index < rows, "row {index} outside shape {}", self.shape);
        let offset = (index as isize).wrapping_mul(self.strides[0]);
        let origin = if len == 0 { 0 } else { self.origin.wrapping_add_signed(offset) };
        Row { span: self.span, origin, stride: self.strides[1], len }
    }

    /// `count` rows of a view of three axes, a stack of matrices: those of matrix `matrix` from `first` on.
    /// Checked once for all of them, for inner loops.
    ///
    /// # Panics
    /// Where the view has another rank, or no such rows.
    #[inline(always)]
    pub fn stack_rows(&self, [matrix, first]: [usize; 2], count: usize) -> RowRun<'a, T> {
        let &[matrices, rows, len] = &self.shape[..] else {
            panic!("rows of matrix {matrix} of a view of shape {}, which is no stack", self.shape)
        };
        assert!(
            matrix < matrices && first <= rows && count <= rows - first,
            "{count} rows from row {first} of matrix {matrix} outside shape {}",
            self.shape
        );
        let outer = (matrix as isize).wrapping_mul(self.strides[0]);
        let offset = outer.wrapping_add((first as isize).wrapping_mul(self.strides[1]));
        let origin = if len == 0 { 0 } else { self.origin.wrapping_add_signed(offset) };
        let row = Row { span: self.span, origin, stride: self.strides[2], len };
        RowRun { row, step: self.strides[1], left: count }
    }

    /// The tokens of a head, of a view of four axes whose third is that of heads.
    ///
    /// # Panics
    /// Where the view has another rank or no such head.
    #[inline]
    pub fn head(&self, head: usize) -> HeadView<'a, T> {
        let (&[outer, inner, heads, len], &[outer_stride, inner_stride, head_stride, stride]) =
            (&self.shape[..], &self.strides[..])
        else {
            panic!("head {head} of a view of shape {}, which has no four axes", self.shape)
        };
        assert!(head < heads, "head {head} outside shape {}", self.shape);
        let origin = self.origin.wrapping_add_signed((head as isize).wrapping_mul(head_stride));
        let (sizes, strides) = ([outer, inner], [outer_stride, inner_stride]);
        HeadView { span: self.span, origin, sizes, strides, stride, len }
    }

    /// The elements over two axes of a view, as a slice that starts at the first of them with the row and
    /// column strides, or `None` where a stride is negative or there are none. For matrix products that take
    /// strides.
    ///
    /// # Panics
    /// Where `fixed` is outside the shape or `row_axis` and `column_axis` are not two axes of the view.
    pub fn matrix(
        &self,
        fixed: &[usize],
        row_axis: usize,
        column_axis: usize,
    ) -> Option<(&'a [T], usize, usize)> {
        assert!(
            row_axis != column_axis && row_axis.max(column_axis) < self.shape.rank(),
            "axes {row_axis} and {column_axis} of shape {}",
            self.shape
        );
        assert!(
            fixed.len() == self.shape.rank() && fixed.iter().zip(self.shape.iter()).all(|(i, size)| i < size),
            "index {fixed:?} outside shape {}",
            self.shape
        );
        let row_stride = usize::try_from(self.strides[row_axis]).ok()?;
        let column_stride = usize::try_from(self.strides[column_axis]).ok()?;
        Some((self.span.get(self.position(fixed)..)?, row_stride, column_stride))
    }
}

impl<'a, T: Copy> HeadView<'a, T> {
    /// The size of the last axis.
    #[inline]
    pub fn width(&self) -> usize {
        self.len
    }

    /// The strides of the first two axes, in elements.
    #[inline]
    pub fn strides(&self) -> [isize; 2] {
        self.strides
    }

    /// The rows at `[outer, inner]`, `[outer, inner + 1]` and so on. Cheap enough for single rows.
    ///
    /// # Panics
    /// Where the view lacks one of the rows.
    #[inline(always)]
    pub fn stretch(&self, [outer, inner]: [usize; 2], rows: usize) -> RowStretch<'a, T> {
        let [outers, inners] = self.sizes;
        assert!(
            outer < outers && inner <= inners && rows <= inners - inner,
            "{rows} rows from [{outer}, {inner}] on outside of {:?}",
            self.sizes
        );
        let offset = (outer as isize).wrapping_mul(self.strides[0]);
        let offset = offset.wrapping_add((inner as isize).wrapping_mul(self.strides[1]));
        let origin = self.origin.wrapping_add_signed(offset);
        let [_, row_stride] = self.strides;
        RowStretch { span: self.span, origin, row_stride, rows, stride: self.stride, len: self.len }
    }
}

impl<'a, T: Copy> RowStretch<'a, T> {
    /// How many rows there are.
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Row `index`.
    ///
    /// # Panics
    /// Where `index` is not below [`rows`](Self::rows).
    #[inline(always)]
    pub fn row(&self, index: usize) -> Row<'a, T> {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        let offset = (index as isize).wrapping_mul(self.row_stride);
        let origin = if self.len == 0 { 0 } else { self.origin.wrapping_add_signed(offset) };
        Row { span: self.span, origin, stride: self.stride, len: self.len }
    }
}

impl<'a, T: Copy> Iterator for RowRun<'a, T> {
    type Item = Row<'a, T>;

    #[inline(always)]
    fn next(&mut self) -> Option<Row<'a, T>> {
        self.left = self.left.checked_sub(1)?;
        let row = self.row;
        // Behind the last row, or of rows without elements, this is no place in the span, and is not used as
        // one.
        self.row.origin = row.origin.wrapping_add_signed(self.step);
        Some(row)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<T: Copy> ExactSizeIterator for RowRun<'_, T> {}

impl<'a, T: Copy> Row<'a, T> {
    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as a slice, where they lie side by side.
    #[inline]
    pub fn contiguous(&self) -> Option<&'a [T]> {
        (self.stride == 1 || self.len <= 1).then(|| &self.span[self.origin..self.origin + self.len])
    }

    /// One element.
    ///
    /// # Panics
    /// Where `index` is not below [`len`](Self::len).
    #[inline]
    pub fn at(&self, index: usize) -> T {
        assert!(index < self.len, "index {index} of a row of {}", self.len);
        self.span[self.origin.wrapping_add_signed((index as isize).wrapping_mul(self.stride))]
    }

    /// The elements in order.
    #[inline]
    pub fn iter(self) -> impl ExactSizeIterator<Item = T> {
        (0..self.len).map(move |index| self.at(index))
    }
}

/// A view of host memory that is written, with a known element type.
#[derive(Debug)]
pub struct HostViewMut<'a, T> {
    pointer: *mut T,
    shape: Dims,
    strides: Strides,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: the elements are exclusive during 'a (the invariant of the ViewMut it was made of), and moving an
// exclusive reference to another thread moves the right to write them.
unsafe impl<T: Send> Send for HostViewMut<'_, T> {}

/// The elements along the last axis of a [`HostViewMut`].
#[derive(Debug)]
pub struct RowMut<'a, T> {
    pointer: *mut T,
    stride: isize,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<'a> ViewMut<'a> {
    /// The view with elements of type `T`, or `None` where it has another dtype or is not in host memory.
    pub fn host_mut<T: Scalar>(self) -> Option<HostViewMut<'a, T>> {
        if self.raw.desc.dtype() != T::DTYPE || self.raw.device != Device::Cpu {
            return None;
        }
        let (shape, strides) = (self.raw.desc.shape(), self.raw.desc.strides());
        Some(HostViewMut {
            pointer: self.raw.pointer.as_mut_ptr().cast(),
            shape,
            strides,
            memory: PhantomData,
        })
    }
}

impl<T: Copy> HostViewMut<'_, T> {
    /// The shape.
    pub fn shape(&self) -> Dims {
        self.shape
    }

    /// The strides, in elements.
    pub fn strides(&self) -> Strides {
        self.strides
    }

    /// The pointer to the first element of a row, with the row's stride and length.
    fn row_parts(&self, leading: &[usize]) -> (*mut T, isize, usize) {
        let last = leading.len();
        assert!(
            last + 1 == self.shape.rank() && leading.iter().zip(self.shape.iter()).all(|(i, size)| i < size),
            "row {leading:?} outside shape {}",
            self.shape
        );
        (self.element(leading), self.strides[last], self.shape[last])
    }

    /// The pointer to the element at these indices of the first axes and 0 on the others.
    fn element(&self, indices: &[usize]) -> *mut T {
        let offset = (indices.iter().zip(self.strides.iter()))
            .map(|(&index, &stride)| (index as isize).wrapping_mul(stride))
            .fold(0, isize::wrapping_add);
        self.pointer.wrapping_offset(offset)
    }

    /// The elements along the last axis at these indices of the others.
    ///
    /// # Panics
    /// Where `leading` does not have one index less than the rank, or is outside the shape.
    #[inline]
    pub fn row_mut(&mut self, leading: &[usize]) -> RowMut<'_, T> {
        let (pointer, stride, len) = self.row_parts(leading);
        RowMut { pointer, stride, len, memory: PhantomData }
    }

    /// Writes one element.
    ///
    /// # Panics
    /// Where the index has another rank or is outside the shape.
    #[inline]
    pub fn set(&mut self, index: &[usize], value: T) {
        assert!(
            index.len() == self.shape.rank() && index.iter().zip(self.shape.iter()).all(|(i, size)| i < size),
            "index {index:?} outside shape {}",
            self.shape
        );
        // SAFETY: the index is inside the shape of a ViewMut, so the element is allocated, aligned host
        // memory that this view has to itself.
        unsafe { self.element(index).write(value) }
    }
}

impl<T: Copy> RowMut<'_, T> {
    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as a slice, where they lie side by side.
    #[inline]
    pub fn contiguous_mut(&mut self) -> Option<&mut [T]> {
        if self.len == 0 {
            return Some(&mut []);
        }
        // SAFETY: the row was taken at indices inside the shape of a ViewMut, so its elements are allocated,
        // initialised, aligned host memory; with stride 1 (or one element) they are `len` neighbours, and the
        // view has them to itself while this row borrows it.
        (self.stride == 1 || self.len == 1)
            .then(|| unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) })
    }

    /// Writes one element.
    ///
    /// # Panics
    /// Where `index` is not below [`len`](Self::len).
    #[inline]
    pub fn set(&mut self, index: usize, value: T) {
        assert!(index < self.len, "index {index} of a row of {}", self.len);
        // SAFETY: `index` is inside the row, whose elements are allocated host memory that this row borrows
        // exclusively; the offset was checked to fit isize when the view was made.
        unsafe { self.pointer.offset(index as isize * self.stride).write(value) }
    }

    /// Writes every element, in order, by its index.
    #[inline]
    pub fn fill_with(&mut self, mut value: impl FnMut(usize) -> T) {
        if let Some(elements) = self.contiguous_mut() {
            for (index, element) in elements.iter_mut().enumerate() {
                *element = value(index);
            }
        } else {
            for index in 0..self.len {
                self.set(index, value(index));
            }
        }
    }
}
