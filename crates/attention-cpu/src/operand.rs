//! Operand dtypes: how rows of them become the floats that are computed in, and back.

use attention_core::{Element, HostView, Row, RowMut, RowPlaces, RowRun, Scalar, Stretch, Stretches};
use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::elementary::Compute;
use crate::prefetch::{AHEAD, prefetch};
use crate::variants::{OperandRuns, Runs};

/// A way to read the rows of one dtype.
pub(crate) trait Read: 'static {
    /// The elements of the rows.
    type Element: Element + Pod;
    /// What is computed in.
    type Compute: Compute;

    /// Neighbours as they are computed in, where that is the same type.
    fn as_compute(from: &[Self::Element]) -> Option<&[Self::Compute]>;
    /// Converts neighbours; exact.
    fn widen(from: &[Self::Element], to: &mut [Self::Compute]);
    /// One number.
    fn widen_one(value: Self::Element) -> Self::Compute;
}

/// A way to compute on queries of one dtype, which is that of outputs and gradients too, and on keys and
/// values of the same dtype or of 8 bits.
pub(crate) trait Operand: Read<Element: Scalar> {
    /// The elements of logsumexps.
    type Statistics: Scalar;
    /// The way to compute on small batch rows ([`cut::is_small`](crate::cut::is_small)).
    type Small: Operand<Element = Self::Element, Statistics = Self::Statistics>;

    /// Whether [`Small`](Self::Small) is another way than this.
    const HAS_SMALL: bool = false;
    /// The distance from 1 to the next number of [`Statistics`](Self::Statistics).
    const STATISTICS_EPSILON: f64;

    /// The counters of the code that is compiled for this.
    fn runs(runs: &Runs) -> &OperandRuns;
    /// Converts neighbours, rounding to nearest even.
    fn narrow(from: &[Self::Compute], to: &mut [Self::Element]);
    /// One number, rounded.
    fn narrow_one(value: Self::Compute) -> Self::Element;
}

macro_rules! same {
    ($type:ident, $small:ty, $has_small:literal) => {
        impl Read for $type {
            type Element = $type;
            type Compute = $type;

            #[inline(always)]
            fn as_compute(from: &[$type]) -> Option<&[$type]> {
                Some(from)
            }
            #[inline(always)]
            fn widen(from: &[$type], to: &mut [$type]) {
                to.copy_from_slice(from);
            }
            #[inline(always)]
            fn widen_one(value: $type) -> $type {
                value
            }
        }

        impl Operand for $type {
            type Statistics = $type;
            type Small = $small;

            const HAS_SMALL: bool = $has_small;
            const STATISTICS_EPSILON: f64 = $type::EPSILON as f64;

            fn runs(runs: &Runs) -> &OperandRuns {
                &runs.$type
            }

            #[inline(always)]
            fn narrow(from: &[$type], to: &mut [$type]) {
                to.copy_from_slice(from);
            }
            #[inline(always)]
            fn narrow_one(value: $type) -> $type {
                value
            }
        }
    };
}
same!(f64, f64, false);
same!(f32, F32InF64, true);

/// f32 operands computed in f64. Small batch rows cost little, and errors of a small sum do not average out.
pub(crate) enum F32InF64 {}

macro_rules! converted {
    ($operand:ty, $runs:ident, $element:ty, $compute:ty, $widen:expr, $narrow:expr, $widen_all:expr, $narrow_all:expr) => {
        impl Read for $operand {
            type Element = $element;
            type Compute = $compute;

            #[inline(always)]
            fn as_compute(_: &[$element]) -> Option<&[$compute]> {
                None
            }
            #[inline(always)]
            fn widen(from: &[$element], to: &mut [$compute]) {
                $widen_all(from, to)
            }
            #[inline(always)]
            fn widen_one(value: $element) -> $compute {
                $widen(value)
            }
        }

        impl Operand for $operand {
            type Statistics = f32;
            type Small = $operand;

            const STATISTICS_EPSILON: f64 = f32::EPSILON as f64;

            fn runs(runs: &Runs) -> &OperandRuns {
                &runs.$runs
            }

            #[inline(always)]
            fn narrow(from: &[$compute], to: &mut [$element]) {
                $narrow_all(from, to)
            }
            #[inline(always)]
            fn narrow_one(value: $compute) -> $element {
                $narrow(value)
            }
        }
    };
}

/// Converts neighbours one by one, in a loop that vectorises.
#[inline(always)]
fn convert<A: Copy, B>(from: &[A], to: &mut [B], one: impl Fn(A) -> B) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = one(from);
    }
}

/// A shift, which vectorises where the conversion of `half`, which quiets NaNs, does not.
#[inline(always)]
fn widen_bf16(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

converted!(
    F32InF64,
    f32_in_f64,
    f32,
    f64,
    f64::from,
    |value| value as f32,
    |from, to| convert(from, to, f64::from),
    |from, to| convert(from, to, |value| value as f32)
);
converted!(
    f16,
    f16,
    f16,
    f32,
    f16::to_f32,
    f16::from_f32,
    |from: &[f16], to| from.convert_to_f32_slice(to),
    |from, to: &mut [f16]| to.convert_from_f32_slice(from)
);
converted!(
    bf16,
    bf16,
    bf16,
    f32,
    widen_bf16,
    bf16::from_f32,
    |from, to| convert(from, to, widen_bf16),
    |from, to: &mut [bf16]| to.convert_from_f32_slice(from)
);

/// Copies a row of any stride.
#[inline(always)]
pub(crate) fn read_row<E: Read>(row: Row<'_, E::Element>, to: &mut [E::Compute]) {
    match row.contiguous() {
        Some(from) => E::widen(from, to),
        None => {
            for (to, from) in to.iter_mut().zip(row.iter()) {
                *to = E::widen_one(from);
            }
        }
    }
}

/// Writes a row of any stride.
pub(crate) fn write_row<E: Operand>(mut row: RowMut<'_, E::Element>, from: &[E::Compute]) {
    match row.contiguous_mut() {
        Some(to) => E::narrow(from, to),
        None => row.fill_with(|index| E::narrow_one(from[index])),
    }
}

/// The rows of one head of one sequence: a matrix `[rows, D]`, wherever its rows are.
pub(crate) enum Head<'a, E: Read> {
    /// `[rows, D]`: dense or packed rows, or those of a single page.
    Neighbours(HostView<'a, E::Element>),
    /// `[pages, page size, D]`, and which of these rows are the sequence's.
    Pages(HostView<'a, E::Element>, RowPlaces<'a>),
}

impl<'a, E: Read> Head<'a, E> {
    /// Of a tensor of tokens, whose rows of the sequence are at `places`.
    pub(crate) fn new(view: &HostView<'a, E::Element>, places: RowPlaces<'a>, head: usize) -> Self {
        let rows = view.index_axis(2, head);
        let Some(Stretch { rows: all, first: [outer, first] }) = places.neighbours() else {
            return Self::Pages(rows, places);
        };
        let rows = rows.index_axis(0, outer);
        // Of dense rows, a sequence has all.
        let is_all = rows.shape()[0] == all.len();
        Self::Neighbours(if is_all { rows } else { rows.narrow(0, first..first + all.len()) })
    }

    /// The length of a row.
    pub(crate) fn width(&self) -> usize {
        let (Self::Neighbours(rows) | Self::Pages(rows, _)) = self;
        rows.shape()[rows.shape().rank() - 1]
    }

    /// Counts a task that reads these rows.
    pub(crate) fn count(&self, runs: &OperandRuns) {
        if let Self::Pages(_, places) = self
            && places.rows() > 0
        {
            runs.pages.count();
        }
    }

    /// Counts a task that [borrows](borrow_row) these rows.
    pub(crate) fn count_borrowed(&self, runs: &OperandRuns) {
        let (Self::Neighbours(rows) | Self::Pages(rows, _)) = self;
        if rows.shape().contains(&0) {
            return;
        }
        let row = rows.row(&[0, 0][..rows.shape().rank() - 1]);
        let in_place = row.contiguous().and_then(E::as_compute).is_some();
        if in_place { &runs.read_in_place } else { &runs.read_copied }.count();
    }

    /// Calls `reader` with the rows from `first` on, in order.
    #[inline(always)]
    pub(crate) fn read<R: Reader<'a, E::Element>>(&self, first: usize, reader: R) {
        // Twice the code, so that rows that are neighbours are read without a branch for pages.
        match self {
            Self::Neighbours(rows) => reader.read(Neighbours { rows, next: first }),
            Self::Pages(rows, places) => {
                // Without rows there is nothing to read.
                if let Some(pages) = Pages::new(rows, places, first) {
                    reader.read(pages);
                }
            }
        }
    }
}

/// Rows one after the other.
pub(crate) trait InOrder<'a, T> {
    /// The next row.
    ///
    /// # Panics
    /// Behind the last.
    fn next(&mut self) -> Row<'a, T>;
}

/// A loop over the rows of a [`Head`].
pub(crate) trait Reader<'a, T> {
    /// `#[inline(always)]` inside of a [`Kernel`](crate::simd::Kernel).
    fn read(self, rows: impl InOrder<'a, T>);
}

struct Neighbours<'b, 'a, T> {
    rows: &'b HostView<'a, T>,
    next: usize,
}

impl<'a, T: Copy> InOrder<'a, T> for Neighbours<'_, 'a, T> {
    #[inline(always)]
    fn next(&mut self) -> Row<'a, T> {
        let row = self.rows.matrix_row(self.next);
        if self.rows.shape()[0] - self.next > AHEAD {
            prefetch(self.rows.matrix_row(self.next + AHEAD));
        }
        self.next += 1;
        row
    }
}

/// Rows in pages, and those [`AHEAD`] of them, which are prefetched.
struct Pages<'b, 'a, T> {
    now: PageRows<'b, 'a, T>,
    /// `None` where there are no such rows.
    ahead: Option<PageRows<'b, 'a, T>>,
}

impl<'b, 'a, T: Copy> Pages<'b, 'a, T> {
    #[inline(always)]
    fn new(rows: &'b HostView<'a, T>, places: &RowPlaces<'a>, first: usize) -> Option<Self> {
        let now = PageRows::new(rows, places, first)?;
        Some(Self { now, ahead: PageRows::new(rows, places, first.saturating_add(AHEAD)) })
    }
}

impl<'a, T: Copy> InOrder<'a, T> for Pages<'_, 'a, T> {
    #[inline(always)]
    fn next(&mut self) -> Row<'a, T> {
        if let Some(row) = self.ahead.as_mut().and_then(PageRows::next) {
            prefetch(row);
        }
        self.now.next().unwrap_or_else(|| unreachable!("read behind the last row"))
    }
}

struct PageRows<'b, 'a, T> {
    rows: &'b HostView<'a, T>,
    pages: Stretches<'a>,
    /// The rows of a page that are left.
    run: RowRun<'a, T>,
}

impl<'b, 'a, T: Copy> PageRows<'b, 'a, T> {
    /// `None` where there is no row `first`.
    #[inline(always)]
    fn new(rows: &'b HostView<'a, T>, places: &RowPlaces<'a>, first: usize) -> Option<Self> {
        let mut pages = places.stretches(first.min(places.rows())..places.rows());
        let page = pages.next()?;
        Some(Self { rows, pages, run: rows.stack_rows(page.first, page.rows.len()) })
    }

    #[inline(always)]
    fn next(&mut self) -> Option<Row<'a, T>> {
        loop {
            if let Some(row) = self.run.next() {
                return Some(row);
            }
            let page = self.pages.next()?;
            self.run = self.rows.stack_rows(page.first, page.rows.len());
        }
    }
}

/// One row as it is computed in: itself where it lies side by side in that type, else a copy in `room`.
#[inline(always)]
pub(crate) fn borrow_row<'s, 'a: 's, E: Read>(
    row: Row<'a, E::Element>,
    room: &'s mut [E::Compute],
) -> &'s [E::Compute] {
    if let Some(same) = row.contiguous().and_then(E::as_compute) {
        return same;
    }
    read_row::<E>(row, room);
    room
}
