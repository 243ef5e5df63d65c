//! Tensors that the suite owns: any dtype, any strides, with guard elements around and between their
//! elements.

use attention_core::{
    DType, Dims, F8E4M3, F8E5M2, Float8, Overflow, Scalar, Strides, TensorDesc, View, ViewMut,
};
use half::{bf16, f16};

use crate::cases::Layout;

/// Elements before the lowest and after the highest one that no call may touch: two of the widest vectors of
/// halves.
const GUARD: usize = 64;

/// The elements of a [`HostTensor`] in memory order, gaps and guards included.
#[derive(Clone, Debug)]
enum Storage {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    F8E4M3(Vec<F8E4M3>),
    F8E5M2(Vec<F8E5M2>),
    Bool(Vec<bool>),
    I32(Vec<i32>),
    U32(Vec<u32>),
    I64(Vec<i64>),
}

/// Runs the same expression on the vector of whichever dtype the storage has.
macro_rules! on_storage {
    ($storage:expr, $data:ident => $body:expr) => {
        match $storage {
            Storage::F64($data) => $body,
            Storage::F32($data) => $body,
            Storage::F16($data) => $body,
            Storage::Bf16($data) => $body,
            Storage::F8E4M3($data) => $body,
            Storage::F8E5M2($data) => $body,
            Storage::Bool($data) => $body,
            Storage::I32($data) => $body,
            Storage::U32($data) => $body,
            Storage::I64($data) => $body,
        }
    };
}

/// What a buffer is filled with where the suite has not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// NaN, and numbers that no call takes as a length in integers: what lies between the elements of an
    /// input, and what outputs hold before a call.
    Nan,
    /// A finite pattern that no computation produces by accident: what lies around the elements of an output.
    Canary,
}

impl Fill {
    /// The bits of the fill, the same in every build.
    fn bits(self, dtype: DType) -> u64 {
        match (self, dtype) {
            (Fill::Nan, DType::F64) => 0x7FF8_0000_DEAD_BEEF,
            (Fill::Nan, DType::F32) => 0x7FC0_BEEF,
            (Fill::Nan, DType::F16) => 0x7EEF,
            (Fill::Nan, DType::Bf16) => 0x7FEF,
            (Fill::Nan, DType::F8E4M3 | DType::F8E5M2) => 0x7F,
            (Fill::Nan, DType::I64) => 0xDEAD_BEEF_7FF8_0001,
            (Fill::Nan, DType::I32 | DType::U32) => 0xDEAD_BEEF,
            (Fill::Canary, DType::F64) => 0x5A5A_A5A5_5A5A_A5A5,
            (Fill::Canary, DType::F32) => 0x5A5A_A5A5,
            (Fill::Canary, DType::F16 | DType::Bf16) => 0x5AA5,
            (Fill::Canary, DType::F8E4M3 | DType::F8E5M2) => 0x5A,
            _ => 0,
        }
    }
}

/// A strided tensor in memory of its own.
#[derive(Clone, Debug)]
pub struct HostTensor {
    storage: Storage,
    desc: TensorDesc,
    /// Where in the storage the element at index 0 is.
    origin: usize,
}

impl HostTensor {
    /// A tensor whose elements, gaps and guards all hold `fill` (`false` for booleans).
    ///
    /// # Panics
    /// For a dtype that no tensor of a call has.
    pub fn filled(dtype: DType, shape: impl Into<Dims>, layout: Layout, fill: Fill) -> Self {
        let shape = shape.into();
        let placement = layout.place(&shape);
        let len = placement.len + 2 * GUARD;
        let bits = fill.bits(dtype);
        let storage = match dtype {
            DType::F64 => Storage::F64(vec![f64::from_bits(bits); len]),
            DType::F32 => Storage::F32(vec![f32::from_bits(bits as u32); len]),
            DType::F16 => Storage::F16(vec![f16::from_bits(bits as u16); len]),
            DType::Bf16 => Storage::Bf16(vec![bf16::from_bits(bits as u16); len]),
            DType::F8E4M3 => Storage::F8E4M3(vec![F8E4M3::from_bits(bits as u8); len]),
            DType::F8E5M2 => Storage::F8E5M2(vec![F8E5M2::from_bits(bits as u8); len]),
            DType::Bool => Storage::Bool(vec![false; len]),
            DType::I32 => Storage::I32(vec![bits as i32; len]),
            DType::U32 => Storage::U32(vec![bits as u32; len]),
            DType::I64 => Storage::I64(vec![bits as i64; len]),
            other => panic!("{other} is not a dtype of the suite"),
        };
        let strides = Strides::from_slice(&placement.strides).expect("as many strides as axes");
        let desc = TensorDesc::strided(dtype, shape, strides).expect("as many strides as axes");
        Self { storage, desc, origin: placement.origin + GUARD }
    }

    /// An input tensor: `value` gives the elements in row-major order, rounded to the dtype, where what is too
    /// large for it is not finite; NaN lies around them.
    pub fn from_values(
        dtype: DType,
        shape: impl Into<Dims>,
        layout: Layout,
        mut value: impl FnMut(usize) -> f64,
    ) -> Self {
        let mut tensor = Self::filled(dtype, shape, layout, Fill::Nan);
        for (index, position) in tensor.positions().enumerate() {
            tensor.store(position, value(index));
        }
        tensor
    }

    /// A boolean tensor in which `value` gives the elements in row-major order.
    pub fn from_bools(shape: impl Into<Dims>, layout: Layout, mut value: impl FnMut(usize) -> bool) -> Self {
        let mut tensor = Self::filled(DType::Bool, shape, layout, Fill::Nan);
        for (index, position) in tensor.positions().enumerate() {
            tensor.store(position, f64::from(u8::from(value(index))));
        }
        tensor
    }

    /// A tensor of integers in which `value` gives the elements in row-major order; those that the dtype does
    /// not have lose their upper bits.
    ///
    /// # Panics
    /// For a dtype that is no integer.
    pub fn from_integers(
        dtype: DType,
        shape: impl Into<Dims>,
        layout: Layout,
        mut value: impl FnMut(usize) -> i64,
    ) -> Self {
        let mut tensor = Self::filled(dtype, shape, layout, Fill::Nan);
        for (index, position) in tensor.positions().enumerate() {
            match &mut tensor.storage {
                Storage::I32(data) => data[position] = value(index) as i32,
                Storage::U32(data) => data[position] = value(index) as u32,
                Storage::I64(data) => data[position] = value(index),
                _ => panic!("{dtype} is no integer"),
            }
        }
        tensor
    }

    /// An output tensor before a call: elements hold NaN, what lies around them a canary.
    pub fn poisoned(desc: &TensorDesc, layout: Layout) -> Self {
        let mut tensor = Self::filled(desc.dtype(), desc.shape(), layout, Fill::Canary);
        let bits = Fill::Nan.bits(desc.dtype());
        for position in tensor.positions() {
            tensor.store_bits(position, bits);
        }
        tensor
    }

    /// A tensor of another shape: `from` says by row-major indices which element of this one each element
    /// has, bit for bit, or which number where it has none.
    pub(crate) fn rearranged(
        &self,
        shape: impl Into<Dims>,
        layout: Layout,
        mut from: impl FnMut(usize) -> Result<usize, f64>,
    ) -> Self {
        let mut tensor = Self::filled(self.desc.dtype(), shape, layout, Fill::Nan);
        for (index, position) in tensor.positions().enumerate() {
            match from(index) {
                Ok(source) => tensor.store_bits(position, self.bits_at(self.position(source))),
                Err(value) => tensor.store(position, value),
            }
        }
        tensor
    }

    /// Dtype, shape and strides.
    pub fn desc(&self) -> TensorDesc {
        self.desc
    }

    /// The tensor as the input of a call.
    pub fn view(&self) -> View<'_> {
        let (shape, strides) = (self.desc.shape(), self.desc.strides());
        on_storage!(&self.storage, data => View::strided(data, self.origin, shape, strides))
            .expect("the placement lies inside the storage")
    }

    /// The tensor as the output of a call.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let (shape, strides) = (self.desc.shape(), self.desc.strides());
        on_storage!(&mut self.storage, data => ViewMut::strided(data, self.origin, shape, strides))
            .expect("the placement of an output has no overlaps")
    }

    /// The elements in row-major order as f64 (exact but for integers beyond 2^53; 0 and 1 for booleans).
    pub fn values(&self) -> Vec<f64> {
        self.positions().map(|position| self.load(position)).collect()
    }

    /// The elements of a tensor of integers in row-major order.
    ///
    /// # Panics
    /// For other tensors.
    pub fn integers(&self) -> Vec<i64> {
        let at = |position: usize| match &self.storage {
            Storage::I32(data) => data[position].into(),
            Storage::U32(data) => data[position].into(),
            Storage::I64(data) => data[position],
            _ => panic!("{} is no integer", self.desc.dtype()),
        };
        self.positions().map(at).collect()
    }

    /// Replaces every element of a tensor of integers; `value` is given what is there. Upper bits that the
    /// dtype does not have are lost.
    pub(crate) fn map_integers(&mut self, mut value: impl FnMut(i64) -> i64) {
        for position in self.positions() {
            match &mut self.storage {
                Storage::I32(data) => data[position] = value(data[position].into()) as i32,
                Storage::U32(data) => data[position] = value(data[position].into()) as u32,
                Storage::I64(data) => data[position] = value(data[position]),
                _ => panic!("{} is no integer", self.desc.dtype()),
            }
        }
    }

    /// The bits of the elements in row-major order.
    pub fn bits(&self) -> Vec<u64> {
        self.positions().map(|position| self.bits_at(position)).collect()
    }

    /// Replaces the element at this row-major index; the value is rounded to the dtype.
    pub fn set(&mut self, index: usize, value: f64) {
        let position = self.position(index);
        self.store(position, value);
    }

    /// Whether the element at this row-major index is what [`poisoned`](Self::poisoned) left there.
    pub fn is_unwritten(&self, index: usize) -> bool {
        self.bits_at(self.position(index)) == Fill::Nan.bits(self.desc.dtype())
    }

    /// Whether no element was written since [`poisoned`](Self::poisoned).
    pub fn is_untouched(&self) -> bool {
        let poison = Fill::Nan.bits(self.desc.dtype());
        self.first_stray_write().is_none()
            && self.positions().all(|position| self.bits_at(position) == poison)
    }

    /// The first place outside the elements that does not hold the canary any more, counted in elements from
    /// the element at index 0.
    pub fn first_stray_write(&self) -> Option<isize> {
        let len = on_storage!(&self.storage, data => data.len());
        let mut is_element = vec![false; len];
        for position in self.positions() {
            is_element[position] = true;
        }
        let canary = Fill::Canary.bits(self.desc.dtype());
        (0..len)
            .find(|&position| !is_element[position] && self.bits_at(position) != canary)
            .map(|position| position as isize - self.origin as isize)
    }

    /// Where in the storage the elements lie, in row-major order.
    fn positions(&self) -> impl Iterator<Item = usize> + use<> {
        let tensor = (self.desc, self.origin);
        let count = self.desc.element_count().expect("the shape was allocated");
        (0..count).map(move |index| position(&tensor.0, tensor.1, index))
    }

    fn position(&self, index: usize) -> usize {
        position(&self.desc, self.origin, index)
    }

    fn store(&mut self, position: usize, value: f64) {
        match &mut self.storage {
            Storage::F64(data) => data[position] = value,
            Storage::F32(data) => data[position] = f32::from_f64(value),
            Storage::F16(data) => data[position] = <f16 as Scalar>::from_f64(value),
            Storage::Bf16(data) => data[position] = <bf16 as Scalar>::from_f64(value),
            Storage::F8E4M3(data) => data[position] = F8E4M3::from_f64(value, Overflow::Nan),
            Storage::F8E5M2(data) => data[position] = F8E5M2::from_f64(value, Overflow::Nan),
            Storage::Bool(data) => data[position] = value != 0.0,
            Storage::I32(data) => data[position] = value as i32,
            Storage::U32(data) => data[position] = value as u32,
            Storage::I64(data) => data[position] = value as i64,
        }
    }

    fn store_bits(&mut self, position: usize, bits: u64) {
        match &mut self.storage {
            Storage::F64(data) => data[position] = f64::from_bits(bits),
            Storage::F32(data) => data[position] = f32::from_bits(bits as u32),
            Storage::F16(data) => data[position] = f16::from_bits(bits as u16),
            Storage::Bf16(data) => data[position] = bf16::from_bits(bits as u16),
            Storage::F8E4M3(data) => data[position] = F8E4M3::from_bits(bits as u8),
            Storage::F8E5M2(data) => data[position] = F8E5M2::from_bits(bits as u8),
            Storage::Bool(data) => data[position] = bits != 0,
            Storage::I32(data) => data[position] = (bits as u32).cast_signed(),
            Storage::U32(data) => data[position] = bits as u32,
            Storage::I64(data) => data[position] = bits.cast_signed(),
        }
    }

    fn load(&self, position: usize) -> f64 {
        match &self.storage {
            Storage::F64(data) => data[position],
            Storage::F32(data) => f64::from(data[position]),
            Storage::F16(data) => Scalar::to_f64(data[position]),
            Storage::Bf16(data) => Scalar::to_f64(data[position]),
            Storage::F8E4M3(data) => data[position].to_f64(),
            Storage::F8E5M2(data) => data[position].to_f64(),
            Storage::Bool(data) => f64::from(u8::from(data[position])),
            Storage::I32(data) => data[position].into(),
            Storage::U32(data) => data[position].into(),
            Storage::I64(data) => data[position] as f64,
        }
    }

    fn bits_at(&self, position: usize) -> u64 {
        match &self.storage {
            Storage::F64(data) => data[position].to_bits(),
            Storage::F32(data) => data[position].to_bits().into(),
            Storage::F16(data) => data[position].to_bits().into(),
            Storage::Bf16(data) => data[position].to_bits().into(),
            Storage::F8E4M3(data) => data[position].to_bits().into(),
            Storage::F8E5M2(data) => data[position].to_bits().into(),
            Storage::Bool(data) => data[position].into(),
            Storage::I32(data) => data[position].cast_unsigned().into(),
            Storage::U32(data) => data[position].into(),
            Storage::I64(data) => data[position].cast_unsigned(),
        }
    }
}

/// Where in the storage the element at a row-major index lies.
fn position(desc: &TensorDesc, origin: usize, index: usize) -> usize {
    let (shape, strides) = (desc.shape(), desc.strides());
    let (mut rest, mut offset) = (index, 0isize);
    for axis in (0..shape.rank()).rev() {
        offset += (rest % shape[axis]) as isize * strides[axis];
        rest /= shape[axis];
    }
    origin.wrapping_add_signed(offset)
}

/// The multi-axis form of a row-major index, for messages.
pub fn unravel(index: usize, shape: &[usize]) -> Vec<usize> {
    let mut rest = index;
    let mut axes: Vec<usize> = (shape.iter().rev())
        .map(|&size| {
            let axis = rest % size.max(1);
            rest /= size.max(1);
            axis
        })
        .collect();
    axes.reverse();
    axes
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUTS: [Layout; 7] = [
        Layout::Contiguous,
        Layout::Transposed,
        Layout::Padded,
        Layout::InnerStride,
        Layout::Reversed { axis: 1 },
        Layout::Reversed { axis: 3 },
        Layout::FusedSlice { start: 1, total: 6 },
    ];

    #[test]
    fn values_read_back_through_every_layout_and_dtype() {
        for layout in LAYOUTS {
            for dtype in DType::EIGHT_BIT {
                // 15 is the largest whole number up to which e4m3 has all, and 7 in e5m2.
                let tensor = HostTensor::from_values(dtype, [2, 3, 4, 5], layout, |index| (index % 8) as f64);
                let want: Vec<f64> = (0..120).map(|index| f64::from(index % 8)).collect();
                assert_eq!(tensor.values(), want, "{layout:?} {dtype}");
            }
            for dtype in DType::FLOATS {
                let tensor = HostTensor::from_values(dtype, [2, 3, 4, 5], layout, |index| index as f64);
                let want: Vec<f64> = (0..120).map(f64::from).collect();
                assert_eq!(tensor.values(), want, "{layout:?} {dtype}");
                if dtype == DType::F32 {
                    let view = tensor.view().host::<f32>().unwrap();
                    assert_eq!(view.at(&[1, 2, 3, 4]), 119.0, "{layout:?}");
                }
            }
        }
    }

    #[test]
    fn integers_read_back_and_lie_among_others_that_are_no_length() {
        for layout in [Layout::Contiguous, Layout::InnerStride, Layout::Reversed { axis: 0 }] {
            for (dtype, numbers) in [
                (DType::I32, [0, -1, i32::MAX.into(), i32::MIN.into()]),
                (DType::U32, [0, 1, u32::MAX.into(), 7]),
                (DType::I64, [0, -1, i64::MAX, i64::MIN]),
            ] {
                let mut tensor = HostTensor::from_integers(dtype, [4], layout, |index| numbers[index]);
                assert_eq!(tensor.integers(), numbers, "{layout:?} {dtype}");
                assert_eq!(tensor.values()[1], numbers[1] as f64);
                let lowest = tensor.bits_at(0) as u32;
                assert!(lowest as i32 != 0 && (lowest as i32).unsigned_abs() > 1 << 24, "{lowest:x}");
                tensor.map_integers(|number| number / 2);
                assert_eq!(tensor.integers()[3], numbers[3] / 2);
            }
        }
    }

    #[test]
    fn stray_writes_are_seen() {
        for layout in LAYOUTS {
            let desc = TensorDesc::contiguous(DType::F32, [2, 3, 4, 5]);
            let mut tensor = HostTensor::poisoned(&desc, layout);
            assert!(tensor.is_untouched() && tensor.is_unwritten(7));
            for index in 0..120 {
                tensor.set(index, 1.0);
            }
            assert_eq!(tensor.first_stray_write(), None, "{layout:?}");
            let Storage::F32(data) = &mut tensor.storage else { unreachable!() };
            data[3] = 0.0;
            assert_eq!(tensor.first_stray_write(), Some(3 - tensor.origin as isize));
        }
    }

    #[test]
    fn indices_unravel_row_major() {
        assert_eq!(unravel(119, &[2, 3, 4, 5]), [1, 2, 3, 4]);
        assert_eq!(unravel(0, &[3]), [0]);
    }
}
