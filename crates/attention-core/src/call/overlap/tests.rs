//! The overlap rule against the sets of bytes themselves.

use std::collections::HashSet;

use proptest::prelude::*;

use super::{Extent, elements_meet};
use crate::{DType, Dims, Strides, TensorDesc, ViewMut};

/// A tensor and where it lies.
struct Placed(Extent, TensorDesc);

impl Placed {
    fn meets(&self, other: &Self) -> bool {
        elements_meet((self.0, &self.1), (other.0, &other.1))
    }

    fn range_meets(&self, other: &Self) -> bool {
        self.0.meets(other.0)
    }
}

/// A placed tensor whose first element is at `address`.
fn placed(address: usize, desc: TensorDesc) -> Placed {
    let (low, high) = desc.span().unwrap();
    let size = desc.dtype().size() as isize;
    let at = |offset: isize| address.wrapping_add_signed(offset * size);
    Placed((at(low)..at(high + 1)).into(), desc)
}

/// Every byte of every element.
fn bytes(address: usize, desc: TensorDesc) -> HashSet<usize> {
    let (shape, size) = (desc.shape(), desc.dtype().size());
    let count = desc.element_count().unwrap();
    let mut bytes = HashSet::new();
    for flat in 0..count {
        let (mut rest, mut offset) = (flat, 0);
        for axis in (0..desc.rank()).rev() {
            offset += (rest % shape[axis]) as isize * desc.strides()[axis];
            rest /= shape[axis];
        }
        let first = address.wrapping_add_signed(offset * size as isize);
        bytes.extend(first..first + size);
    }
    bytes
}

fn disjoint(a: (usize, TensorDesc), b: (usize, TensorDesc)) -> bool {
    bytes(a.0, a.1).is_disjoint(&bytes(b.0, b.1))
}

fn tensor() -> impl Strategy<Value = (usize, TensorDesc)> {
    let dtype = prop_oneof![Just(DType::F64), Just(DType::F32), Just(DType::F16), Just(DType::Bool)];
    // Strides that make rows and blocks turn up often, beside any other.
    let stride = prop_oneof![3 => -13isize..14, 1 => Just(4), 1 => Just(12), 1 => Just(24), 1 => Just(-4)];
    (dtype, proptest::collection::vec((0usize..4, stride), 0..=4), 0usize..64).prop_map(
        |(dtype, axes, place)| {
            let (shape, strides): (Vec<_>, Vec<_>) = axes.into_iter().unzip();
            let (shape, strides) = (Dims::try_from(shape).unwrap(), Strides::try_from(strides).unwrap());
            let desc = TensorDesc::strided(dtype, shape, strides).unwrap();
            (10_000 + place * dtype.size(), desc)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Never "disjoint" where bytes are shared, whatever the layouts.
    #[test]
    fn shared_bytes_are_always_found(a in tensor(), b in tensor()) {
        let (first, second) = (placed(a.0, a.1), placed(b.0, b.1));
        prop_assert_eq!(first.meets(&second), second.meets(&first));
        if !disjoint(a, b) {
            prop_assert!(first.meets(&second));
            prop_assert!(first.range_meets(&second));
        }
        if a.1.is_empty() || b.1.is_empty() {
            prop_assert!(!first.meets(&second));
        }
    }

    /// Exact for the parts of one row-major buffer: boxes of it meet where their index ranges do.
    #[test]
    fn boxes_of_one_buffer_are_told_apart(
        shape in proptest::array::uniform4(1usize..5),
        corners in proptest::array::uniform8(0usize..5),
        order in Just([0usize, 1, 2, 3]).prop_shuffle(),
    ) {
        let whole = TensorDesc::contiguous(DType::F32, shape);
        let part = |corners: &[usize]| {
            let (mut address, mut size) = (4096, [0; 4]);
            for axis in 0..4 {
                let start = corners[axis] % shape[axis];
                size[axis] = 1 + corners[axis] * 3 % (shape[axis] - start);
                address += 4 * start * whole.strides()[axis] as usize;
            }
            // Any order of the axes: BTNH and BNTH views of the same storage.
            let desc = TensorDesc::strided(
                DType::F32,
                order.map(|axis| size[axis]),
                order.map(|axis| whole.strides()[axis]),
            );
            (address, desc.unwrap())
        };
        let (a, b) = (part(&corners[..4]), part(&corners[4..]));
        prop_assert_eq!(placed(a.0, a.1).meets(&placed(b.0, b.1)), !disjoint(a, b));
    }

    /// The parts of a fused buffer along any axis, in any order of axes, never meet: heads of QKV, batch
    /// rows.
    #[test]
    fn parts_of_a_split_view_are_told_apart(
        shape in proptest::array::uniform4(1usize..5),
        axis in 0usize..4,
        cut in (0usize..5, 0usize..5),
        order in Just([0usize, 1, 2, 3]).prop_shuffle(),
    ) {
        let mut data = vec![0f32; shape.iter().product()];
        let size = shape[order[axis]];
        let (first, second) = (cut.0.min(size), cut.1.min(size - cut.0.min(size)));
        let view = ViewMut::from_slice(&mut data, shape).unwrap().permute(order).unwrap();
        let parts = view.split(axis, [first, second, size - first - second]).unwrap();
        let parts = parts.map(|part| Placed(part.address_range().into(), part.desc()));
        for (i, part) in parts.iter().enumerate() {
            for other in &parts[i + 1..] {
                prop_assert!(!part.meets(other));
            }
        }
    }

    /// One flat buffer a row: `[B, T, N*H + K*H + K*Hv]`, whose parts have heads of different lengths.
    #[test]
    fn fused_rows_with_another_value_head_dim_are_told_apart(
        batch in 1usize..3, length in 1usize..4, heads in 1usize..4, group in 1usize..4,
        head_dim in 1usize..6, value_head_dim in 1usize..6,
    ) {
        let (n, k) = (heads * group, heads);
        let width = n * head_dim + k * head_dim + k * value_head_dim;
        let part = |start: usize, heads: usize, head_dim: usize| {
            let strides = [length * width, width, head_dim, 1].map(|stride| stride as isize);
            (4096 + 2 * start, TensorDesc::strided(DType::Bf16, [batch, length, heads, head_dim], strides).unwrap())
        };
        let parts = [
            part(0, n, head_dim),
            part(n * head_dim, k, head_dim),
            part((n + k) * head_dim, k, value_head_dim),
        ];
        for (i, &a) in parts.iter().enumerate() {
            prop_assert!(placed(a.0, a.1).meets(&placed(a.0, a.1)));
            for &b in &parts[i + 1..] {
                prop_assert!(disjoint(a, b));
                prop_assert!(!placed(a.0, a.1).meets(&placed(b.0, b.1)));
            }
        }
    }
}

#[test]
fn neighbours_in_memory_do_not_meet() {
    let desc = TensorDesc::contiguous(DType::F32, [2, 3]);
    let a = placed(4096, desc);
    assert!(!a.meets(&placed(4096 + 24, desc)));
    assert!(a.meets(&placed(4096 + 20, desc)));
    assert!(!a.range_meets(&placed(4096 + 24, desc)));
}

#[test]
fn extreme_strides_do_not_overflow() {
    let wide = TensorDesc::strided(DType::Bool, [2, 1], [isize::MAX - 1, isize::MIN]).unwrap();
    assert!(wide.span().is_some());
    let a = placed(1, wide);
    assert!(a.meets(&placed(1, wide)));
    assert!(!a.meets(&placed(2, TensorDesc::contiguous(DType::Bool, [4]))));
}
