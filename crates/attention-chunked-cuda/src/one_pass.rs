//! The kernel for all three gradients, on warpgroups (`fused/backward/one_pass`): which problems have it, its
//! tiles, and its scratch.

use std::ops::Range;

use attention_core::{Gradients, Pass, Problem, Unsupported};
use attention_cuda::parameters::QueryTiles;
use attention_kernels::Layout;

use super::limits::limit;
use super::rows::Rows;
use super::tiles::{Machine, Shape, Tiles};

/// The largest head dimension: the sums of keys and values of two warpgroups, and a tile's part of the
/// gradient of queries, fill their registers.
const MOST_HEAD: usize = 128;

/// Keys of a tile: 64 for each of two warpgroups.
const KEYS: usize = 128;

/// Bytes of a number of sums, and of what blocks tell each other of a tile.
const SUM: usize = size_of::<f32>();
const TURN: usize = size_of::<u32>();

/// The entry points, in the order in which they run.
pub(crate) const ALL_GRADIENTS: &str = "attention_gradients";
pub(crate) const FINISH: &str = "attention_finish_queries";

/// Where the kernel's scratch is, in bytes, and how many tiles of query rows it is for.
#[derive(Clone, Debug, Default)]
pub(crate) struct OnePassScratch {
    sums: Range<usize>,
    turns: Range<usize>,
    pub(crate) tiles: usize,
}

impl OnePassScratch {
    /// Where it ends.
    pub(crate) fn end(&self) -> usize {
        self.turns.end
    }

    /// The addresses in scratch that begins at `base`.
    pub(crate) fn addresses(&self, base: u64) -> QueryTiles {
        let at = |range: &Range<usize>| base + range.start as u64;
        // `of` checked that the count fits.
        QueryTiles { sums: at(&self.sums), turns: at(&self.turns), count: self.tiles as i64 }
    }

    /// Behind the first `behind` bytes. Sums are passed from one tile of keys to the next, so that a single
    /// one needs none.
    pub(crate) fn of(shape: Shape, problem: &Problem, behind: usize) -> Result<Self, Unsupported> {
        let (queries, keys) = (Rows::of_queries(problem), Rows::of_keys(problem));
        let rows = shape.rows_of_one_pass();
        let tiles = queries.tiles(rows, 1).saturating_mul(problem.dims().query_heads);
        let columns = Tiles::of_one_pass(rows).columns(shape.head);
        let ranges = || {
            let numbers = if keys.most_of_one() <= KEYS { 0 } else { tiles.checked_mul(rows * columns)? };
            let start = behind.checked_next_multiple_of(128)?;
            let sums = start..start.checked_add(numbers.checked_mul(SUM)?)?;
            let words = tiles.checked_mul(2)?.checked_add(1)?;
            let turns = sums.end..sums.end.checked_add(words.checked_mul(TURN)?)?;
            Some(Self { sums, turns, tiles })
        };
        ranges().ok_or_else(|| {
            limit("tiles of query rows", tiles, "scratch for their sums does not fit an address space")
        })
    }
}

impl Tiles {
    /// Of the kernel for all three gradients.
    const fn of_one_pass(rows: usize) -> Self {
        Self { warpgroups: true, ..Self::new(rows, KEYS, 8, 2) }
    }

    /// Of the kernel behind it.
    const fn of_finish(rows: usize) -> Self {
        Self::new(rows, KEYS, 8, 0)
    }
}

impl Shape {
    /// Whether calls of these shapes have such a kernel, on a device with warpgroups.
    pub(crate) fn fits_one_pass(self) -> bool {
        self.is_half() && self.depth() <= MOST_HEAD && self.eight_bit.is_none()
    }

    fn rows_of_one_pass(self) -> usize {
        if self.depth() <= 64 && self.features.is_none() { 128 } else { 64 }
    }

    /// Shared memory of the kernel, as its `SharedOnePass`.
    pub(crate) fn one_pass_bytes(self, tiles: Tiles) -> usize {
        let logits = 2 * tiles.rows * tiles.keys * self.dtype.size();
        let sums = 2 * tiles.rows * tiles.columns(self.head) * SUM;
        self.keys_bytes(tiles) + logits + sums
    }

    /// Tiles of the kernel and of the one behind it, where the device has them.
    pub(crate) fn one_pass(self, machine: Machine) -> Option<[Tiles; 2]> {
        let rows = self.rows_of_one_pass();
        let tiles = Tiles::of_one_pass(rows);
        let fits =
            machine.warpgroups && self.fits_one_pass() && self.one_pass_bytes(tiles) <= machine.shared_bytes;
        fits.then_some([tiles, Tiles::of_finish(rows)])
    }
}

/// Whether a problem with rows in this layout is given the kernel where the device has it: all three
/// gradients in half precision, of dense rows. Scratch is set aside then, whether or not the device has it.
///
/// Not for grouped heads of which rows see other keys each (causal, windows): a tile of keys goes over the
/// rows of all heads of the group, so there are few tiles, of very different lengths, and the device waits
/// for the last ones (0.94 of the two kernels at 4 x 4096, 32 heads on 8, causal; 1.10 without a mask).
///
/// Not for packed rows, which the kernel takes: in a run of the suite, a call with many short sequences
/// ended with an access to memory outside of the context, in f16, where the same call passed in bf16. That
/// is not understood. So not for batch-invariant calls either, whose sequences have the same bits dense and
/// packed.
pub(crate) fn wants_one_pass(shape: Shape, layout: Layout, problem: &Problem) -> bool {
    let all = [Gradients::QUERY, Gradients::KEY, Gradients::VALUE];
    let structured = problem.causal() || !problem.window().is_unbounded();
    problem.pass() == Pass::Backward
        && shape.fits_one_pass()
        && layout == Layout::Dense
        && !problem.batch_invariant()
        && !(structured && problem.dims().group_size() > 1)
        && all.into_iter().all(|gradient| problem.gradients().contains(gradient))
}
