//! The table of intrinsics of AVX2 and AVX-512: the operations that both levels carry out in the same way.

/// Writes, inside an implementation of [`Simd`](super::Simd), its types, its constants and the methods that
/// are made of the intrinsics named. An entry of `loads`, `binary`, `ternary` or `reductions` has the name of
/// the method that it becomes. A level without such an intrinsic leaves the entry out and writes the method
/// itself.
///
/// # Safety
/// The blocks below rely on what every invocation must keep to:
/// - A value of `Self` exists only where detection found the features of all intrinsics named.
/// - An intrinsic of `loads` reads one vector, `store` writes one, at any alignment; no other reaches memory.
macro_rules! operations {
    (
        types: { float: $float:ty, vector: $vector:ty, mask: $mask:ty },
        tile: { rows: $rows:literal, vectors: $vectors:literal },
        side_by_side: $side_by_side:literal,
        splat: $splat:ident,
        loads: { $($load:ident: $load_intrinsic:ident),+ },
        store: $store:ident,
        binary: { $($binary:ident: $binary_intrinsic:ident),+ $(,)? },
        ternary: { $($ternary:ident: $ternary_intrinsic:ident),+ },
        bits: { and: $and:ident, andnot: $andnot:ident, or: $or:ident },
        compare: $compare:ident,
        $(reductions: { $($reduce:ident: $reduce_intrinsic:ident),+ },)?
    ) => {
        type V = $vector;
        type Mask = $mask;

        const LANES: usize = size_of::<$vector>() / size_of::<$float>();
        const TILE_ROWS: usize = $rows;
        const TILE_VECTORS: usize = $vectors;
        const SIDE_BY_SIDE: usize = $side_by_side;

        #[inline(always)]
        fn splat(self, x: $float) -> $vector {
            // SAFETY: `self` proves that the processor has the instruction.
            unsafe { $splat(x) }
        }
        $(
            #[inline(always)]
            unsafe fn $load(self, from: *const $float) -> $vector {
                // SAFETY: `self` proves that the processor has the instruction, which reads `LANES` elements;
                // the caller promised that they can be read.
                unsafe { $load_intrinsic(from) }
            }
        )+
        #[inline(always)]
        unsafe fn store(self, to: *mut $float, x: $vector) {
            // SAFETY: `self` proves that the processor has the instruction, which writes `LANES` elements;
            // the caller promised that they can be written.
            unsafe { $store(to, x) }
        }
        $(
            #[inline(always)]
            fn $binary(self, a: $vector, b: $vector) -> $vector {
                // SAFETY: `self` proves that the processor has the instruction.
                unsafe { $binary_intrinsic(a, b) }
            }
        )+
        $(
            #[inline(always)]
            fn $ternary(self, a: $vector, b: $vector, c: $vector) -> $vector {
                // SAFETY: `self` proves that the processor has the instruction.
                unsafe { $ternary_intrinsic(a, b, c) }
            }
        )+
        // The one bit that is set in -0.0 is the sign.
        #[inline(always)]
        fn abs(self, a: $vector) -> $vector {
            // SAFETY: `self` proves that the processor has the instructions.
            unsafe { $andnot($splat(-0.0), a) }
        }
        #[inline(always)]
        fn copysign(self, a: $vector, b: $vector) -> $vector {
            // SAFETY: `self` proves that the processor has the instructions.
            unsafe { $or(a, $and(b, $splat(-0.0))) }
        }
        // Ordered, so false for NaN, and quiet.
        #[inline(always)]
        fn less(self, a: $vector, b: $vector) -> $mask {
            // SAFETY: `self` proves that the processor has the instruction.
            unsafe { $compare::<_CMP_LT_OQ>(a, b) }
        }
        #[inline(always)]
        fn equal(self, a: $vector, b: $vector) -> $mask {
            // SAFETY: `self` proves that the processor has the instruction.
            unsafe { $compare::<_CMP_EQ_OQ>(a, b) }
        }
        $($(
            #[inline(always)]
            fn $reduce(self, a: $vector) -> $float {
                // SAFETY: `self` proves that the processor has the instructions.
                unsafe { $reduce_intrinsic(a) }
            }
        )+)?
    };
}

pub(super) use operations;
