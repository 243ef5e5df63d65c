//! Keys and values of one head, packed once for a task: the layouts that matrix products run at full speed
//! on.
//!
//! `gemm` wants the operand along which it vectorises to be contiguous. For logits that is the transposed
//! key, so keys are packed as panels `[panel][H][64 keys]`; for outputs it is the value as it lies, packed
//! densely since large row strides cost a third of the speed.

use std::ops::Range;

use attention_core::DType;

use crate::direct::add_scaled;
use crate::elementary::Compute;
use crate::gemm::{Destination, Mat, MatMut, gemm};
use crate::operand::{Head, InOrder, Read, Reader, read_row};
use crate::simd::{Kernel, dispatch};
use crate::variants::{ComputeRuns, Runs};

/// Keys in a panel. 64 columns a product reach full speed from 48 rows on (docs/performance/design.md).
pub(crate) const PANEL: usize = 64;

/// Terms of a product over keys: the chunk of values that stays in the first cache levels.
const KEY_CHUNK: usize = 256;

/// Terms of a product over a head dimension. The error of a sum grows with its length, so longer ones are
/// cut; at 64 the cut costs nothing that can be measured.
const DEPTH: usize = 64;

/// The fewest terms that a sum is cut into.
const MIN_DEPTH: usize = 8;

/// Elements of the panels of `keys` rows of `width`.
pub(crate) fn panel_elements(keys: usize, width: usize) -> Option<usize> {
    keys.checked_next_multiple_of(PANEL)?.checked_mul(width)
}

/// The rows `keys` of a head, transposed into panels.
pub(crate) struct Panels<'a, C> {
    data: &'a [C],
    width: usize,
    keys: Range<usize>,
    runs: &'a ComputeRuns,
}

/// Reads `count` rows into panels.
struct Transposed<'b, E: Read> {
    count: usize,
    /// Room for one.
    row: &'b mut [E::Compute],
    panels: &'b mut [E::Compute],
}

impl<'a, E: Read> Reader<'a, E::Element> for Transposed<'_, E> {
    #[inline(always)]
    fn read(self, mut rows: impl InOrder<'a, E::Element>) {
        let Self { count, row, panels } = self;
        let size = PANEL * row.len();
        for index in 0..count {
            read_row::<E>(rows.next(), row);
            let panel = &mut panels[index / PANEL * size..][..size];
            for (column, &value) in panel.chunks_exact_mut(PANEL).zip(&*row) {
                column[index % PANEL] = value;
            }
        }
    }
}

/// Which keys the columns of a block of logits stand for: from `start` on, in whole panels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Columns {
    /// The key of column 0.
    pub(crate) start: usize,
    /// How many columns there are, a multiple of [`PANEL`].
    pub(crate) count: usize,
}

impl<'a, C: Compute> Panels<'a, C> {
    /// Packs the rows `keys`; `row` is room for one.
    pub(crate) fn pack<E: Read<Compute = C>>(
        head: &Head<'_, E>,
        keys: Range<usize>,
        data: &'a mut [C],
        row: &mut [C],
        runs: &'a Runs,
    ) -> Self {
        let width = head.width();
        let data = &mut data[..keys.len().next_multiple_of(PANEL) * width];
        if let Some(last) = data.chunks_exact_mut(PANEL * width).next_back() {
            // The columns behind the last key are computed and ignored.
            last.fill(C::ZERO);
        }
        head.read(keys.start, Transposed::<E> { count: keys.len(), row: &mut row[..width], panels: data });
        Self { data, width, keys, runs: C::runs(runs) }
    }

    /// The columns that hold all of `keys`, which must be among the packed ones.
    pub(crate) fn columns(&self, keys: &Range<usize>) -> Columns {
        let first = (keys.start - self.keys.start) / PANEL;
        let end = (keys.end - self.keys.start).div_ceil(PANEL);
        Columns { start: self.keys.start + first * PANEL, count: (end - first) * PANEL }
    }

    /// `products[row][column] = factor * <rows[row], packed row of the column>`, rows of `products` `stride`
    /// apart.
    pub(crate) fn product(
        &self,
        rows: &[C],
        columns: &Columns,
        factor: C,
        products: &mut [C],
        stride: usize,
    ) {
        let count = rows.len() / self.width;
        if count == 1 {
            self.runs.product_of_row.count();
            dispatch(SingleRow { panels: self, row: rows, columns, factor, products });
            return;
        }
        self.runs.product.count();
        let first = (columns.start - self.keys.start) / PANEL;
        for index in 0..columns.count / PANEL {
            let panel = &self.data[(first + index) * PANEL * self.width..][..PANEL * self.width];
            let mut mode = Destination::Overwrite;
            // At least two sums in f32: one chain of additions over all of a row loses more, which large
            // logits amplify.
            let is_f32 = C::DTYPE == DType::F32;
            let most = if is_f32 { self.width.div_ceil(2).clamp(MIN_DEPTH, DEPTH) } else { DEPTH };
            for depth in (0..self.width).step_by(most) {
                let terms = most.min(self.width - depth);
                gemm(
                    MatMut::new(&mut products[index * PANEL..], count, PANEL, stride),
                    mode,
                    factor,
                    Mat::new(&rows[depth..], count, terms, self.width),
                    Mat::new(&panel[depth * PANEL..], terms, PANEL, PANEL),
                );
                mode = Destination::Accumulate;
            }
        }
    }
}

/// The products of one row: `gemm` would sum them in another order, and less exactly.
struct SingleRow<'b, 'a, C> {
    panels: &'b Panels<'a, C>,
    row: &'b [C],
    columns: &'b Columns,
    factor: C,
    products: &'b mut [C],
}

impl<C: Compute> Kernel for SingleRow<'_, '_, C> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        /// Terms that are summed before they join the total.
        const TERMS: usize = 16;
        let Self { panels, row, columns, factor, products } = self;
        let first = (columns.start - panels.keys.start) / PANEL;
        let (products, _) = products[..columns.count].as_chunks_mut::<PANEL>();
        for (index, products) in products.iter_mut().enumerate() {
            let panel = &panels.data[(first + index) * PANEL * panels.width..][..PANEL * panels.width];
            let (panel, _) = panel.as_chunks::<PANEL>();
            let mut totals = [C::ZERO; PANEL];
            for (terms, keys) in row.chunks(TERMS).zip(panel.chunks(TERMS)) {
                let mut sums = [C::ZERO; PANEL];
                for (&term, keys) in terms.iter().zip(keys) {
                    for column in 0..PANEL {
                        sums[column] = term.scaled_plus::<FMA>(keys[column], sums[column]);
                    }
                }
                for column in 0..PANEL {
                    totals[column] += sums[column];
                }
            }
            for column in 0..PANEL {
                products[column] = factor * totals[column];
            }
        }
    }
}

/// The rows `keys` of a head, dense, with the ones that are not finite kept apart: their weight is zero
/// wherever they take no part, and zero times infinity would be NaN.
pub(crate) struct Dense<'a, C> {
    data: &'a [C],
    width: usize,
    keys: Range<usize>,
    /// Positions whose packed row is zero because the row is not finite, with the row itself.
    not_finite: Vec<(usize, Vec<C>)>,
}

/// Reads rows of `width` one behind the other.
struct Copied<'b, E: Read> {
    to: &'b mut [E::Compute],
    width: usize,
}

impl<'a, E: Read> Reader<'a, E::Element> for Copied<'_, E> {
    #[inline(always)]
    fn read(self, mut rows: impl InOrder<'a, E::Element>) {
        for to in self.to.chunks_exact_mut(self.width) {
            read_row::<E>(rows.next(), to);
        }
    }
}

impl<'a, C: Compute> Dense<'a, C> {
    /// Packs the rows `keys`.
    pub(crate) fn pack<E: Read<Compute = C>>(
        head: &Head<'_, E>,
        keys: Range<usize>,
        data: &'a mut [C],
        runs: &Runs,
    ) -> Self {
        let width = head.width();
        let data = &mut data[..keys.len() * width];
        head.read(keys.start, Copied::<E> { to: data, width });
        let not_finite = set_apart(data, width);
        if !not_finite.is_empty() {
            C::runs(runs).not_finite_keys.count();
        }
        Self { data, width, keys, not_finite }
    }

    /// `sums[row] (+)= factor * sum over keys of weights[row][key] * packed row of the key`.
    ///
    /// Row `r` of `weights` and `marks` begins at `r * stride`; its columns stand for `columns`. A key takes
    /// part in a row where `marks` is not [`Compute::DISALLOWED`]; where it takes no part its weight must be
    /// zero.
    #[allow(clippy::too_many_arguments, reason = "a matrix product has many dimensions")]
    pub(crate) fn weighted_sum(
        &self,
        weights: &[C],
        marks: &[C],
        stride: usize,
        rows: usize,
        columns: &Columns,
        factor: C,
        sums: &mut [C],
    ) {
        let end = (columns.start + columns.count).min(self.keys.end);
        let mut mode = Destination::Overwrite;
        for start in (columns.start..end).step_by(KEY_CHUNK) {
            let terms = KEY_CHUNK.min(end - start);
            gemm(
                MatMut::new(sums, rows, self.width, self.width),
                mode,
                factor,
                Mat::new(&weights[start - columns.start..], rows, terms, stride),
                Mat::new(&self.data[(start - self.keys.start) * self.width..], terms, self.width, self.width),
            );
            mode = Destination::Accumulate;
        }
        if mode == Destination::Overwrite {
            sums[..rows * self.width].fill(C::ZERO);
        }
        for (index, values) in &self.not_finite {
            let position = self.keys.start + index;
            if !(columns.start..end).contains(&position) {
                continue;
            }
            let column = position - columns.start;
            for (row, sums) in sums.chunks_exact_mut(self.width).take(rows).enumerate() {
                if !marks[row * stride + column].is_disallowed() {
                    add_scaled(sums, factor, weights[row * stride + column], values);
                }
            }
        }
    }
}

/// Zeroes the rows that are not finite and returns them with their index.
pub(crate) fn set_apart<C: Compute>(rows: &mut [C], width: usize) -> Vec<(usize, Vec<C>)> {
    let finite = |row: &[C]| row.iter().fold(true, |finite, value| finite & value.is_finite());
    let mut apart = Vec::new();
    // One test for all: the rows are almost always finite.
    if !finite(rows) {
        for (index, row) in rows.chunks_exact_mut(width).enumerate() {
            if !finite(row) {
                apart.push((index, row.to_vec()));
                row.fill(C::ZERO);
            }
        }
    }
    apart
}
