//! Keys and values that may be of 8 bits: bytes are widened a row at a time, exactly, into what is computed
//! in, so that everything behind reads rows of that.

use attention_core::{DType, F8E4M3, F8E5M2, Float8, HostView, Row, View};
use half::f16;

use super::stage::AHEAD;
use super::{Floats, Operands, is_strided};
use crate::engine::{Engine, FloatRows, STAGE, Staged};
use crate::float::Float;
use crate::scratch::extent;
use crate::simd::{CacheLevel, Kernel, Simd, prefetch};

/// Keys or values: of the query's dtype, or of 8 bits.
#[derive(Clone, Copy)]
pub(crate) enum Cached<'a> {
    Floats(Floats<'a>),
    EightBit(EightBit<'a>),
}

/// Keys or values of 8 bits.
#[derive(Clone, Copy)]
pub(crate) struct EightBit<'a> {
    view: HostView<'a, u8>,
    format: Format,
}

/// What the bytes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    E4M3,
    E5M2,
}

impl<'a> Cached<'a> {
    /// Of a view in host memory that a checked call has as key or value.
    pub(crate) fn new(view: View<'a>) -> Self {
        let format = match view.desc().dtype() {
            DType::F8E4M3 => Format::E4M3,
            DType::F8E5M2 => Format::E5M2,
            _ => return Self::Floats(Floats::new(view)),
        };
        let view = view.host_bytes();
        let view = view.unwrap_or_else(|| unreachable!("a checked call has keys and values in host memory"));
        Self::EightBit(EightBit { view, format })
    }

    /// Whether they are of 8 bits.
    pub(crate) fn is_eight_bit(&self) -> bool {
        matches!(self, Self::EightBit(_))
    }

    /// Whether the elements of a row are not neighbours.
    pub(crate) fn is_strided(&self) -> bool {
        match self {
            Self::Floats(floats) => floats.is_strided(),
            Self::EightBit(bytes) => is_strided(&bytes.view),
        }
    }

    /// What [tiles](Operands::tile) of them are multiples of: a power of two.
    pub(crate) fn unit_of_tile<F: Operands>(&self) -> f64 {
        match self {
            Self::Floats(_) => 1.0,
            Self::EightBit(bytes) => F::unit_of_tile(bytes),
        }
    }

    /// [`Floats::stage`] without a factor.
    pub(crate) fn stage<'r, E: Engine>(
        &'r self,
        engine: E,
        count: usize,
        index: &dyn Fn(usize) -> [usize; 3],
        clean: bool,
        room: &'r mut [E::F],
    ) -> (Staged<'r, E::F>, u32) {
        match self {
            Self::Floats(floats) => floats.stage(engine, count, index, E::F::ONE, clean, room),
            Self::EightBit(bytes) => {
                let not_finite = bytes.stage(engine.plain(), count, index, clean, room);
                let width = bytes.width();
                let stride = Floats::stage_stride(width);
                (Staged::Floats(FloatRows { data: room, stride, width }), not_finite)
            }
        }
    }

    /// One row, unstaged.
    pub(crate) fn read_row<F: Float>(&self, index: [usize; 3], to: &mut [F]) {
        match self {
            Self::Floats(floats) => floats.read_row(index, to),
            Self::EightBit(bytes) => {
                for (to, byte) in to.iter_mut().zip(bytes.view.row(&index).iter()) {
                    *to = F::from_f32(bytes.format.value(byte));
                }
            }
        }
    }
}

/// A row, and how many elements behind it the one is that is prefetched with it.
pub(crate) type RowAhead<'a> = (Row<'a, u8>, isize);

impl<'a> EightBit<'a> {
    /// The bytes.
    pub(crate) fn view(&self) -> &HostView<'a, u8> {
        &self.view
    }

    /// The length of a row.
    pub(super) fn width(&self) -> usize {
        self.view.shape()[3]
    }

    /// [`Floats::stage_floats`].
    fn stage<F: Operands, S: Simd<F>>(
        &self,
        simd: S,
        count: usize,
        index: &dyn Fn(usize) -> [usize; 3],
        clean: bool,
        room: &mut [F],
    ) -> u32 {
        let width = self.width();
        let stride = Floats::stage_stride(width);
        let ahead = self.view.strides()[1].wrapping_mul(AHEAD as isize);
        let rows = (0..count).map(|row| (self.view.row(&index(row)), ahead));
        let not_finite = self.widen(simd, rows, stride, room);
        for (row, to) in room.chunks_exact_mut(stride).take(STAGE).enumerate() {
            if row >= count || clean && not_finite >> row & 1 == 1 {
                to[..width].fill(F::ZERO);
            }
        }
        not_finite
    }

    /// Widens rows of the view, at most [`STAGE`], to rows of `to` that are `stride` apart. Bit `r` of the
    /// result says that row `r` has an element that is not finite.
    ///
    /// # Panics
    /// Where `to` has fewer rows.
    pub(crate) fn widen<F: Float, S: Simd<F>>(
        &self,
        simd: S,
        rows: impl Iterator<Item = RowAhead<'a>>,
        stride: usize,
        to: &mut [F],
    ) -> u32 {
        let (format, rows) = (self.format, &Rows::new(rows, self.width(), stride));
        simd.vectorize(Widen { simd, format, rows, to })
    }

    /// Converts rows of the view, at most [`STAGE`], to rows of f16 one behind the other, divided by
    /// [`unit_of_halves`](Self::unit_of_halves).
    ///
    /// # Panics
    /// Where `to` has fewer rows.
    pub(super) fn halve<F: Float, S: Simd<F>>(
        &self,
        simd: S,
        rows: impl Iterator<Item = RowAhead<'a>>,
        to: &mut [f16],
    ) {
        let width = self.width();
        simd.vectorize(Halve { format: self.format, rows: &Rows::new(rows, width, width), to });
    }

    /// The exponents of e4m3 are 8 less than those of f16, and those of e5m2 are the same.
    pub(super) fn unit_of_halves(&self) -> f64 {
        match self.format {
            Format::E4M3 => E4M3_UNIT.into(),
            Format::E5M2 => 1.0,
        }
    }
}

/// What numbers of e4m3 are multiples of, as the bits of f16 that theirs are.
const E4M3_UNIT: f32 = 256.0;

/// Bytes that are widened at a time: with AVX-512 a vector of 16-bit numbers.
const GROUP: usize = 32;

impl Format {
    /// What a byte means.
    fn value(self, byte: u8) -> f32 {
        match self {
            Self::E4M3 => F8E4M3::from_bits(byte).to_f32(),
            Self::E5M2 => F8E5M2::from_bits(byte).to_f32(),
        }
    }
}

/// A conversion of rows, group by group. Methods must be `#[inline(always)]`, as for a [`Kernel`].
trait Conversion<T> {
    /// Converts some bytes of a row.
    fn group(&mut self, bytes: &[u8; GROUP], to: &mut [T; GROUP]);

    /// Is called behind row `index`.
    fn end(&mut self, index: usize);
}

/// Rows that are widened together: one call for each would take as long as a short row.
struct Rows<'a> {
    rows: [Option<RowAhead<'a>>; STAGE],
    count: usize,
    width: usize,
    /// The distance of the widened rows.
    stride: usize,
}

impl<'a> Rows<'a> {
    fn new(from: impl Iterator<Item = RowAhead<'a>>, width: usize, stride: usize) -> Self {
        let (mut rows, mut count) = ([None; STAGE], 0);
        for (to, row) in rows.iter_mut().zip(from) {
            *to = Some(row);
            count += 1;
        }
        Self { rows, count, width, stride }
    }

    /// Converts each row, prefetches what is to be, and leaves room behind the rows as it is.
    #[inline(always)]
    fn convert<T: Copy + Default>(&self, to: &mut [T], conversion: &mut impl Conversion<T>) {
        let &Self { ref rows, count, width, stride } = self;
        assert!(extent(count, stride, width) <= to.len());
        for (index, (row, ahead)) in rows[..count].iter().flatten().enumerate() {
            let (to, last_to) = to[index * stride..][..width].as_chunks_mut::<GROUP>();
            let mut last = [0; GROUP];
            if let Some(bytes) = row.contiguous() {
                prefetch(CacheLevel::First, bytes.as_ptr().wrapping_offset(*ahead), bytes.len());
                let (bytes, last_bytes) = bytes.as_chunks::<GROUP>();
                for (bytes, to) in bytes.iter().zip(to) {
                    conversion.group(bytes, to);
                }
                for (to, &byte) in last.iter_mut().zip(last_bytes) {
                    *to = byte;
                }
            } else {
                let whole = to.len() * GROUP;
                for (group, to) in to.iter_mut().enumerate() {
                    let mut bytes = [0; GROUP];
                    for (byte, to) in bytes.iter_mut().enumerate() {
                        *to = row.at(group * GROUP + byte);
                    }
                    conversion.group(&bytes, to);
                }
                for (byte, to) in last[..last_to.len()].iter_mut().enumerate() {
                    *to = row.at(whole + byte);
                }
            }
            if !last_to.is_empty() {
                let mut to = [T::default(); GROUP];
                conversion.group(&last, &mut to);
                last_to.copy_from_slice(&to[..last_to.len()]);
            }
            conversion.end(index);
        }
    }
}

/// The bits of f16: an e5m2 is the upper half of one, and an e4m3 that of a number without the
/// [unit](E4M3_UNIT), subnormals too.
#[inline(always)]
fn halves<const E4M3: bool>(bytes: [u8; GROUP]) -> [f16; GROUP] {
    // Copies on either side: a loop from memory to memory does not become vectors.
    let mut halves = [f16::ZERO; GROUP];
    for (half, byte) in halves.iter_mut().zip(bytes) {
        let bits = u16::from(byte);
        *half = f16::from_bits(if E4M3 {
            let magnitude = bits & 0x7f;
            // The one NaN would be a number.
            let nan = if magnitude == 0x7f { 0x7e00 } else { 0 };
            (bits & 0x80) << 8 | magnitude << 7 | nan
        } else {
            bits << 8
        });
    }
    halves
}

/// [`EightBit::halve`].
struct Halve<'r, 'a> {
    format: Format,
    rows: &'r Rows<'a>,
    to: &'r mut [f16],
}

impl Kernel for Halve<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match self.format {
            Format::E4M3 => self.rows.convert(self.to, &mut ToHalves::<true>),
            Format::E5M2 => self.rows.convert(self.to, &mut ToHalves::<false>),
        }
    }
}

struct ToHalves<const E4M3: bool>;

impl<const E4M3: bool> Conversion<f16> for ToHalves<E4M3> {
    #[inline(always)]
    fn group(&mut self, bytes: &[u8; GROUP], to: &mut [f16; GROUP]) {
        *to = halves::<E4M3>(*bytes);
    }

    #[inline(always)]
    fn end(&mut self, _: usize) {}
}

/// [`EightBit::widen`], through f16, which processors widen in one instruction.
struct Widen<'r, 'a, F, S> {
    simd: S,
    format: Format,
    rows: &'r Rows<'a>,
    to: &'r mut [F],
}

impl<F: Float, S: Simd<F>> Kernel for Widen<'_, '_, F, S> {
    type Output = u32;

    #[inline(always)]
    fn run(self) -> u32 {
        let Self { simd, format, rows, to } = self;
        match format {
            Format::E4M3 => {
                let mut to_floats = ToFloats::<F, S, true>::new(simd);
                rows.convert(to, &mut to_floats);
                to_floats.not_finite
            }
            Format::E5M2 => {
                let mut to_floats = ToFloats::<F, S, false>::new(simd);
                rows.convert(to, &mut to_floats);
                to_floats.not_finite
            }
        }
    }
}

struct ToFloats<F: Float, S: Simd<F>, const E4M3: bool> {
    simd: S,
    /// Zero times the numbers of the row: NaN of one that is not finite, which every sum keeps.
    nothing: S::V,
    not_finite: u32,
}

impl<F: Float, S: Simd<F>, const E4M3: bool> ToFloats<F, S, E4M3> {
    #[inline(always)]
    fn new(simd: S) -> Self {
        Self { simd, nothing: simd.splat(F::ZERO), not_finite: 0 }
    }
}

impl<F: Float, S: Simd<F>, const E4M3: bool> Conversion<F> for ToFloats<F, S, E4M3> {
    #[inline(always)]
    fn group(&mut self, bytes: &[u8; GROUP], to: &mut [F; GROUP]) {
        const { assert!(GROUP.is_multiple_of(S::LANES)) };
        let simd = self.simd;
        let unit = simd.splat(F::from_f32(E4M3_UNIT));
        let room = halves::<E4M3>(*bytes);
        for column in (0..GROUP).step_by(S::LANES) {
            // SAFETY: both have GROUP elements, which are whole vectors, one of which begins at `column`.
            unsafe {
                let x = simd.load_f16(room.as_ptr().add(column));
                self.nothing = simd.fma(x, simd.splat(F::ZERO), self.nothing);
                simd.store(to.as_mut_ptr().add(column), if E4M3 { simd.mul(x, unit) } else { x });
            }
        }
    }

    #[inline(always)]
    fn end(&mut self, index: usize) {
        if self.simd.reduce_sum(self.nothing) != F::ZERO {
            self.not_finite |= 1 << index;
        }
        self.nothing = self.simd.splat(F::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use attention_core::Scalar as _;

    use super::*;
    use crate::config::ChunkedConfig;
    use crate::engines::{WithEngines, with_engines};
    use crate::level::Level;
    use crate::tensor::Source;

    /// Rows of every width up to two groups, neighbours or not, with every byte in every lane: checks the
    /// numbers, and what is not finite.
    struct Widens(DType);

    impl WithEngines for Widens {
        type Output = ();

        fn run<E: Engine, Small: Engine>(self, engine: E, _: Option<Small>) {
            let memory: Vec<u8> = (0..1024).map(|index| index as u8).collect();
            for (width, stride) in (1..=2 * GROUP + 1).flat_map(|width| [(width, 1), (width, 3)]) {
                // Rows that begin at every byte.
                let desc = attention_core::TensorDesc::strided(self.0, [1, 256, 1, width], [0, 1, 0, stride]);
                // SAFETY: the last element is at 255 + 128 * 3, inside of the memory, which outlives the view
                // and is not written.
                let view = unsafe {
                    View::from_raw_parts(memory.as_ptr(), attention_core::Device::Cpu, desc.unwrap())
                };
                let cached = Cached::new(view.unwrap());
                let Cached::EightBit(bytes) = cached else { unreachable!("of 8 bits") };
                assert!(cached.is_eight_bit() && cached.is_strided() == (stride != 1 && width > 1));
                let (mut to, mut one) = (vec![E::F::ONE; width], vec![E::F::ONE; width]);
                for row in 0..256 {
                    let rows = std::iter::once((bytes.view().row(&[0, row, 0]), 0));
                    let is_finite = bytes.widen(engine.plain(), rows.clone(), width, &mut to) == 0;
                    let mut tile = vec![<E::F as Operands>::Tile::default(); width];
                    E::F::tile(engine.plain(), &bytes, rows, &mut tile);
                    for (tile, &wide) in tile.iter().zip(&to) {
                        let got = tile.widen::<E::F>() * E::F::from_f64(E::F::unit_of_tile(&bytes));
                        assert!(got == wide || got.is_nan() && wide.is_nan(), "{} {row}", self.0);
                    }
                    cached.read_row([0, row, 0], &mut one);
                    for (column, (&wide, &one)) in to.iter().zip(&one).enumerate() {
                        let want = bytes.format.value((row + column * stride as usize) as u8);
                        let same = |got: E::F| {
                            got.to_f64().to_bits() == f64::from(want).to_bits()
                                || got.is_nan() && want.is_nan()
                        };
                        assert!(same(wide) && same(one), "{} {row} {column}: {wide:?} {want}", self.0);
                    }
                    assert_eq!(is_finite, to.iter().all(|x| x.is_finite()), "{} {row} {width}", self.0);
                }
            }
        }
    }

    #[test]
    fn every_byte_is_widened_exactly() {
        for level in Level::available() {
            for dtype in DType::EIGHT_BIT {
                for of_query in [DType::F32, DType::F64] {
                    with_engines(level, &ChunkedConfig::default(), of_query, Widens(dtype));
                }
            }
        }
    }
}
