//! The matrix unit: its tiles, their configuration, and the product of packed operands.

use std::arch::asm;

use crate::engine::TileMut;
use crate::scratch::{extent, round_up};

/// The vectors beside the tiles.
pub(super) type Avx512 = crate::simd::Avx512<true>;

/// Elements of a tile.
pub(super) const TILE: usize = 512;
/// Bytes between rows of a packed tile.
const ROW_BYTES: usize = 64;

/// The engine for operands of `PARTS` bf16 parts: 1 for bf16, 2 for f16, 3 for f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles<const PARTS: usize> {
    simd: Avx512,
}

impl<const PARTS: usize> Tiles<PARTS> {
    /// Where the machine has AMX and this process may use it.
    pub(crate) fn detect() -> Option<Self> {
        let simd = Avx512::detect()?;
        crate::Level::Amx.is_available().then_some(Self { simd })
    }

    /// The vectors.
    pub(super) fn vectors(self) -> Avx512 {
        self.simd
    }

    /// Elements of a packed operand.
    pub(super) const fn packed_len(outer: usize, inner: usize) -> usize {
        round_up(outer, 32).saturating_mul(round_up(inner, 32)).saturating_mul(PARTS)
    }

    /// Where part 0 of the tile of `outer` and `inner` begins, where the inner axis has `length` elements.
    #[inline(always)]
    pub(super) const fn tile_at(outer: usize, inner: usize, length: usize) -> usize {
        (outer / 16 * length.div_ceil(32) + inner / 32) * PARTS * TILE
    }
}

/// A tile configuration in palette 1: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig([u8; 64]);

static ALL_FULL: TileConfig = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        // Bytes a row in 16 bits, then rows in 8.
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = 16;
        tile += 1;
    }
    TileConfig(bytes)
};

/// A product of 32 by 32 outputs, with the products of parts that matter, `(left: right ..)`, as byte offsets
/// of their tiles: a left tile is loaded once for all its right ones.
macro_rules! tile_product {
    ($a0:expr, $a1:expr, $b0:expr, $b1:expr, $count:expr, $step:expr, $c:expr, $c_stride:expr, $load:expr;
     $(($a:literal: $($b:literal)+))+) => {{
        // Four tiles of sums: zero or as they are in memory, then all steps, then back to memory.
        let (c0, c1) = ($c, $c.wrapping_add(16));
        let (c2, c3) = ($c.wrapping_byte_add(16 * $c_stride), $c.wrapping_byte_add(16 * $c_stride).wrapping_add(16));
        // SAFETY: `product` asserted that both operands have the `steps` tiles that the loop reads and that
        // `out` has 32 rows of 32 sums; `self` proves that the processor has AMX. Tiles have the only
        // configuration there is, that of `with_tiles`; without one, the instructions raise an exception. All
        // tile registers are named as clobbered.
        unsafe {
            asm!(
                "test {load}, {load}",
                "jz 3f",
                "tileloadd tmm0, [{c0} + {cs}*1]",
                "tileloadd tmm1, [{c1} + {cs}*1]",
                "tileloadd tmm2, [{c2} + {cs}*1]",
                "tileloadd tmm3, [{c3} + {cs}*1]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                $(
                    concat!("tileloadd tmm4, [{a0} + {s}*1 + ", $a, "]"),
                    concat!("tileloadd tmm5, [{a1} + {s}*1 + ", $a, "]"),
                    $(
                        concat!("tileloadd tmm6, [{b0} + {s}*1 + ", $b, "]"),
                        concat!("tileloadd tmm7, [{b1} + {s}*1 + ", $b, "]"),
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                    )+
                )+
                "add {a0}, {step}",
                "add {a1}, {step}",
                "add {b0}, {step}",
                "add {b1}, {step}",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c0} + {cs}*1], tmm0",
                "tilestored [{c1} + {cs}*1], tmm1",
                "tilestored [{c2} + {cs}*1], tmm2",
                "tilestored [{c3} + {cs}*1], tmm3",
                a0 = inout(reg) $a0 => _,
                a1 = inout(reg) $a1 => _,
                b0 = inout(reg) $b0 => _,
                b1 = inout(reg) $b1 => _,
                n = inout(reg) $count => _,
                step = const $step,
                s = in(reg) ROW_BYTES,
                c0 = in(reg) c0,
                c1 = in(reg) c1,
                c2 = in(reg) c2,
                c3 = in(reg) c3,
                cs = in(reg) $c_stride,
                load = in(reg) usize::from($load),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }};
}

/// A packed operand: 32 of its outer axis from `outer` on, `steps` tiles of its inner axis from `inner` on.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub(super) data: &'a [u16],
    /// Length of the inner axis.
    pub(super) length: usize,
    pub(super) outer: usize,
    pub(super) inner: usize,
}

impl<const PARTS: usize> Tiles<PARTS> {
    /// `out[32][32] (+)= left * right` over `steps` tiles of 32 of the inner axis. With `exact`, every
    /// product of parts that the operands' dtype needs; without, those that weights rounded to it need.
    #[inline(always)]
    pub(super) fn product(
        self,
        left: Operand<'_>,
        right: Operand<'_>,
        steps: usize,
        out: TileMut<'_, f32>,
        add: bool,
        exact: bool,
    ) {
        let tiles = |operand: Operand<'_>| {
            let first = Self::tile_at(operand.outer, operand.inner, operand.length);
            let second = Self::tile_at(operand.outer + 16, operand.inner, operand.length);
            assert!(operand.inner.is_multiple_of(32) && operand.outer.is_multiple_of(32));
            assert!((operand.inner / 32).saturating_add(steps) <= operand.length.div_ceil(32));
            assert!(second.saturating_add(steps.saturating_mul(PARTS * TILE)) <= operand.data.len());
            (operand.data[first..].as_ptr(), operand.data[second..].as_ptr())
        };
        let TileMut { data: out, stride } = out;
        assert!(extent(32, stride, 32) <= out.len());
        if steps == 0 {
            if !add {
                out.chunks_mut(stride).take(32).for_each(|row| row[..32].fill(0.0));
            }
            return;
        }
        let ((a0, a1), (b0, b1)) = (tiles(left), tiles(right));
        let (c, c_stride) = (out.as_mut_ptr(), stride * size_of::<f32>());
        match (PARTS, exact) {
            (1, _) => tile_product!(a0, a1, b0, b1, steps, 1024, c, c_stride, add; (0: 0)),
            (2, true) => {
                tile_product!(a0, a1, b0, b1, steps, 2048, c, c_stride, add; (1024: 0 1024) (0: 1024 0))
            }
            (2, false) => tile_product!(a0, a1, b0, b1, steps, 2048, c, c_stride, add; (1024: 0) (0: 1024 0)),
            _ => tile_product!(
                a0, a1, b0, b1, steps, 3072, c, c_stride, add; (2048: 0) (1024: 1024 0) (0: 2048 1024 0)
            ),
        }
    }

    /// Runs `work` with the tiles configured on this thread, which is what [`product`](Self::product) needs.
    pub(super) fn with_tiles<R>(self, work: impl FnOnce() -> R) -> R {
        /// Gives the tiles back, also where `work` panics.
        struct Release;
        impl Drop for Release {
            fn drop(&mut self) {
                // SAFETY: `with_tiles` has just used AMX on this thread, so it is there; no code after this
                // uses tiles before they are configured again.
                unsafe {
                    asm!("tilerelease", out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
                         out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack));
                }
            }
        }
        // SAFETY: `self` proves that the processor has AMX and that the process may use it. The instruction
        // reads the 64 bytes of `ALL_FULL`, a valid configuration.
        unsafe {
            asm!("ldtilecfg [{config}]", config = in(reg) &raw const ALL_FULL, out("tmm0") _,
                 out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                 out("tmm7") _, options(nostack, readonly));
        }
        let _release = Release;
        work()
    }
}
