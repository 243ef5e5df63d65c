//! How large the tiles of each kernel are.

use attention_core::{DType, Problem, Role};
use attention_kernels::{Features, block_threads};

use super::features::{KINDS, features_of, packs};

/// The head dimensions that kernels are compiled for: a call has the next one, with zeros behind its own.
/// Those above [`MOST_DEPTH`] are for the forward pass, as latent attention has them (DeepSeek-V2, arXiv
/// 2405.04434).
const DEPTHS: [usize; 9] = [32, 64, 96, 128, 192, 256, 384, 512, 576];

/// The largest head dimension of the backward pass.
pub(crate) const MOST_DEPTH: usize = 256;

/// The largest head dimensions of the forward pass, of queries and keys, and of values.
pub(crate) const MOST_HEAD: usize = 576;
pub(crate) const MOST_VALUE: usize = 512;

/// Columns of a value that a block has at most: more are shared among blocks.
const MOST_COLUMNS: usize = 256;

/// The tiles of a kernel: rows of queries, keys, warps, and how many of the streamed tiles there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    pub(crate) rows: usize,
    pub(crate) keys: usize,
    pub(crate) warps: usize,
    pub(crate) stages: usize,
    /// Whether products run on warpgroups: four warps for 64 rows, and operands in whole panels.
    pub(crate) warpgroups: bool,
    /// Whether f32 operands are split into two tf32 parts and multiplied on tensor cores.
    pub(crate) tf32_split: bool,
}

impl Tiles {
    pub(crate) const fn new(rows: usize, keys: usize, warps: usize, stages: usize) -> Self {
        Self { rows, keys, warps, stages, warpgroups: false, tf32_split: false }
    }

    const fn tf32_split(rows: usize, keys: usize, warps: usize, stages: usize) -> Self {
        Self { tf32_split: true, ..Self::new(rows, keys, warps, stages) }
    }

    /// Of so many warpgroups beside the loaders.
    const fn of_warpgroups(count: usize, rows: usize, keys: usize, stages: usize) -> Self {
        Self { warpgroups: true, ..Self::new(rows, keys, 4 * count, stages) }
    }

    /// Of the kernel that merges the parts of rows, behind a forward kernel of these tiles: blocks of one
    /// warp where those are, which leave no multiprocessor waiting; without tiles, and without the threads
    /// that load them. Of a batch-invariant call, whose parts the forward kernel merges too where there are
    /// many rows, both have the same exponentials: those of split products are others.
    pub(crate) fn of_merge(forward: Self, batch_invariant: bool) -> Self {
        let tf32_split = batch_invariant && forward.tf32_split;
        Self { tf32_split, ..Self::new(0, 0, forward.warps.min(4), 0) }
    }

    /// Of the kernel that lists tiles of this many rows, or keys.
    pub(crate) const fn of_schedule(height: usize) -> Self {
        Self::new(height, 0, 8, 0)
    }

    /// Of the kernels that go over rows without tiles.
    pub(crate) const fn of_rows() -> Self {
        Self::new(0, 0, 8, 0)
    }

    /// How products are computed, as names of variants say it.
    pub(crate) fn multiplied_by(self) -> &'static str {
        match (self.warpgroups, self.tf32_split) {
            (true, _) => " on warpgroups",
            (_, true) => " in tf32 parts",
            _ => "",
        }
    }

    /// Threads of a block.
    pub(crate) fn threads(self) -> usize {
        block_threads(self.warps, self.warpgroups)
    }

    /// The columns of a tile for operands of this many.
    pub(crate) fn columns(self, depth: usize) -> usize {
        if self.warpgroups { depth.next_multiple_of(PANEL) } else { depth }
    }
}

/// What of a device decides about tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    /// Shared memory that a block may have.
    pub(crate) shared_bytes: usize,
    /// Multiprocessors that blocks which go over several tiles may take, at least one.
    pub(crate) multiprocessors: usize,
    /// All that the device has: how keys are split, and so the bits of sums, must not depend on what is left
    /// to others.
    pub(crate) all_multiprocessors: usize,
    /// Whether it has the products of warpgroups, as compute capability 9.0 does.
    pub(crate) warpgroups: bool,
    /// Whether f32 operands are to be split into tf32 parts.
    pub(crate) tf32_split: bool,
}

impl Machine {
    /// One that every block fits.
    pub(crate) const ANY: Self = Self {
        shared_bytes: usize::MAX,
        multiprocessors: 1,
        all_multiprocessors: 1,
        warpgroups: false,
        tf32_split: false,
    };

    /// Without products of another kind than those of every device.
    fn plain(self) -> Self {
        Self { warpgroups: false, tf32_split: false, ..self }
    }
}

/// Bytes for the barriers between them, which are 8 bytes each.
const GATES: usize = 128;

/// Bytes for the barriers of the forward kernel and for what its producers say of the tiles of a block.
const FORWARD_GATES: usize = 512;

/// Columns of a panel: the rows that the products of warpgroups read have 128 bytes.
const PANEL: usize = 64;

/// Query rows that one warp has: as many as a product on tensor cores.
pub(crate) const FEW_ROWS: usize = 16;

/// Query rows of a warp that reads keys and values of 8 bits as they are, at least: it computes outputs
/// transposed, and so many are the columns of a product on tensor cores.
const FEWEST_ROWS: usize = 8;

/// What decides about tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) dtype: DType,
    pub(crate) head: usize,
    pub(crate) value: usize,
    pub(crate) features: Features,
    /// More queries, and more keys, than a tile of split products has of either, and heads so wide that the
    /// bounds have room for what such products leave out (docs/numerics.md, "Split operands"). Of
    /// batch-invariant calls, for which lengths do not count: whether heads are so wide.
    large: bool,
    /// Whether tiles must not depend on the rows and keys of the call.
    pub(crate) batch_invariant: bool,
    /// The dtype of keys and values of 8 bits.
    pub(crate) eight_bit: Option<DType>,
}

impl Shape {
    /// `None` where a head dimension is too large for any pass.
    pub(crate) fn of(problem: &Problem) -> Option<Self> {
        let depth = |width: usize| DEPTHS.into_iter().find(|&depth| depth >= width);
        let dims = problem.dims();
        Some(Self {
            dtype: problem.dtype(),
            head: depth(dims.head_dim)?,
            value: depth(dims.value_head_dim)?,
            features: features_of(problem),
            large: (problem.batch_invariant() || dims.query_length.min(dims.key_length) > 128)
                && dims.head_dim.min(dims.value_head_dim) >= 64,
            batch_invariant: problem.batch_invariant(),
            eight_bit: problem.dtype_of(Role::Key).filter(|dtype| dtype.is_eight_bit()),
        })
    }

    /// Every shape of a dtype that tiles may depend on, with keys of that dtype or of 8 bits.
    pub(crate) fn all(dtype: DType, eight_bit: Option<DType>) -> impl Iterator<Item = Self> {
        let pairs = DEPTHS.into_iter().flat_map(|head| DEPTHS.map(|value| (head, value)));
        pairs.filter(|&(_, value)| value <= MOST_VALUE).flat_map(move |(head, value)| {
            let is_wide = head.min(value) >= 64;
            KINDS.into_iter().flat_map(move |features| {
                [(false, false), (true, false), (is_wide, true)]
                    .into_iter()
                    .filter(move |&(large, batch_invariant)| {
                        // Keys of 8 bits have no batch-invariant calls.
                        (is_wide || !large) && !(batch_invariant && eight_bit.is_some())
                    })
                    .map(move |(large, batch_invariant)| Self {
                        dtype,
                        head,
                        value,
                        features,
                        large,
                        batch_invariant,
                        eight_bit,
                    })
            })
        })
    }

    /// Counts of rows to a head of which the forward pass has other tiles each.
    pub(crate) fn counts_of_rows(self) -> &'static [usize] {
        match (self.large || self.batch_invariant, self.eight_bit) {
            (true, _) => &[129],
            (false, None) => &[1, FEW_ROWS + 1, 65],
            (false, Some(_)) => &[1, FEWEST_ROWS + 1, FEW_ROWS + 1, 65],
        }
    }

    /// Threads of `attention_prepare_gradients` that share a row: so many that each has 16 bytes of it.
    pub(crate) fn threads_to_a_row(self) -> usize {
        let chunks = self.value * self.dtype.size() / 16;
        [32, 16, 8].into_iter().find(|&threads| threads <= chunks).unwrap_or(4)
    }

    /// Blocks that share the columns of values.
    pub(crate) fn slices(self) -> usize {
        self.value.div_ceil(MOST_COLUMNS)
    }

    pub(crate) fn columns_of_slice(self) -> usize {
        self.value.div_ceil(self.slices())
    }

    pub(crate) fn is_half(self) -> bool {
        matches!(self.dtype, DType::F16 | DType::Bf16)
    }

    pub(crate) fn depth(self) -> usize {
        self.head.max(self.value)
    }

    /// Rows and keys of tiles for f32 and f64, as what is held and what is streamed: so large that products
    /// are not held up by shared memory, where a thread has eight rows.
    fn without_tensor_cores(self) -> (usize, usize) {
        match (self.dtype == DType::F64, self.depth()) {
            (false, ..=64) => (64, 64),
            (false, ..=128) => (64, 32),
            (false, _) => (32, 16),
            (true, ..=64) => (32, 32),
            (true, ..=128) => (32, 16),
            (true, _) => (16, 16),
        }
    }

    /// Rows of a tile of the forward pass as far as scratch depends on it, which must not depend on the
    /// device.
    pub(crate) fn nominal_rows(self, rows_of_head: usize) -> usize {
        match self.is_half() {
            false => self.without_tensor_cores().0,
            true if self.batch_invariant || rows_of_head > 64 => 128,
            true => 64,
        }
    }

    /// Whether blocks of the forward pass have one warp, for so many rows of a head or of those that share
    /// tiles.
    pub(crate) fn has_blocks_of_one_warp(self, rows_of_head: usize) -> bool {
        self.is_half() && !self.batch_invariant && self.depth() <= MOST_DEPTH && rows_of_head <= FEW_ROWS
    }

    /// Blocks of the forward kernel that fit the registers of a multiprocessor, at least: `MIN_BLOCKS` of the
    /// kernel.
    pub(crate) fn least_blocks(self, tiles: Tiles) -> usize {
        let is_small = tiles.columns(self.head) + tiles.columns(self.columns_of_slice()) <= 256;
        match (tiles.warps, is_small) {
            (8.., _) => 1,
            (1, true) if self.reads_bytes(tiles) => {
                if tiles.rows == FEWEST_ROWS {
                    16
                } else {
                    12
                }
            }
            (1, true) => 10,
            (warps, _) => 8 / warps,
        }
    }

    /// The fewest rows, or keys where these are not streamed, of any kernel's tiles on any device.
    pub(crate) fn lowest_tile(self) -> usize {
        if self.is_half() && self.eight_bit.is_none() { FEW_ROWS } else { FEWEST_ROWS }
    }

    /// The first of these tiles of split products that the device has room for, if it is to have some.
    fn tf32_split_tiles(
        self,
        machine: Machine,
        bytes: fn(Self, Tiles) -> usize,
        tiles: &[Tiles],
    ) -> Option<Tiles> {
        let wanted = machine.tf32_split && self.dtype == DType::F32 && self.large && self.depth() <= 128;
        tiles.iter().copied().find(|&tiles| wanted && bytes(self, tiles) <= machine.shared_bytes)
    }

    /// For the forward pass with heads that no backward pass takes: the largest that the device has room for,
    /// or the smallest.
    fn large_heads(self, machine: Machine) -> Tiles {
        let (larger, smallest) = if self.is_half() && self.eight_bit.is_some() {
            (&[Tiles::new(64, 32, 4, 1), Tiles::new(32, 32, 2, 1)][..], Tiles::new(16, 32, 1, 1))
        } else if self.is_half() {
            (&[Tiles::new(64, 32, 4, 1)][..], Tiles::new(32, 32, 2, 1))
        } else {
            (&[Tiles::new(32, 16, 4, 1), Tiles::new(16, 16, 4, 1)][..], Tiles::new(8, 16, 4, 1))
        };
        let fits = |tiles: &&Tiles| self.forward_bytes(**tiles) <= machine.shared_bytes;
        larger.iter().find(fits).copied().unwrap_or(smallest)
    }

    /// For the forward pass with this many rows to a key/value head or query head. Of batch-invariant calls,
    /// the tiles for many rows: those for few have other keys, and products of other instructions.
    pub(crate) fn forward(self, rows_of_head: usize, machine: Machine) -> Tiles {
        let rows_of_head = if self.batch_invariant { usize::MAX } else { rows_of_head };
        // Two blocks of 16 rows to a warp, where registers allow it.
        let split = match (self.depth(), self.features.is_all()) {
            (..=64, false) => Tiles::tf32_split(128, 64, 4, 1),
            (..=64, true) => Tiles::tf32_split(64, 64, 4, 1),
            (_, false) => Tiles::tf32_split(128, 32, 4, 1),
            (_, true) => Tiles::tf32_split(64, 32, 4, 1),
        };
        if let Some(split) = self.tf32_split_tiles(machine, Self::forward_bytes, &[split]) {
            return split;
        }
        if self.depth() > MOST_DEPTH {
            return self.large_heads(machine);
        }
        if !self.is_half() {
            // Where a block may have so much memory, threads with eight rows and four keys read less of it.
            let large = Tiles::new(128, 64, 8, 1);
            let has_room = self.forward_bytes(large) <= machine.shared_bytes;
            if self.dtype == DType::F32 && (65..=128).contains(&self.depth()) && rows_of_head > 64 && has_room
            {
                return large;
            }
            let (rows, keys) = self.without_tensor_cores();
            let tiles = Tiles::new(rows, keys, 4, 1);
            // The largest heads of f64 leave no room for bytes to be widened on the smallest devices.
            let is_large = self.eight_bit.is_some() && self.forward_bytes(tiles) > machine.shared_bytes;
            return if is_large { Tiles::new(8, keys, 4, 1) } else { tiles };
        }
        if machine.warpgroups && rows_of_head > 64 {
            // Measured on an H100, as the others below. Three warpgroups have room for short sums alone.
            return match self.depth() {
                ..=64 if self.features.is_none() => Tiles::of_warpgroups(3, 192, 128, 1),
                ..=128 if !self.features.is_all() => Tiles::of_warpgroups(2, 128, 128, 1),
                _ => Tiles::of_warpgroups(2, 128, 64, 1),
            };
        }
        if self.has_blocks_of_one_warp(rows_of_head) {
            // One warp to a block: many such blocks have more memory under way than few large ones.
            let fewest = Tiles::new(FEWEST_ROWS, 32, 1, 1);
            let is_fewest = rows_of_head <= FEWEST_ROWS && self.reads_bytes(fewest);
            return if is_fewest { fewest } else { Tiles::new(FEW_ROWS, 32, 1, 1) };
        }
        // Two blocks of 16 rows to a warp halve what it reads from shared memory, where registers allow it.
        let rows = if self.features.is_none() && self.depth() <= 128 && rows_of_head > 64 { 128 } else { 64 };
        let keys = if self.depth() > 192 || self.features.is_all() { 32 } else { 64 };
        Tiles::new(rows, keys, 4, 1)
    }

    /// For the gradients of keys and values, within the shared memory of a block if there are such.
    pub(crate) fn keys(self, machine: Machine) -> Tiles {
        let rows = if self.depth() <= 64 { 64 } else { 32 };
        let split = [
            Tiles::tf32_split(rows, 128, 8, 2),
            Tiles::tf32_split(32, 128, 8, 1),
            Tiles::tf32_split(32, 64, 4, 1),
        ];
        if let Some(split) = self.tf32_split_tiles(machine, Self::keys_bytes, &split) {
            return split;
        }
        let mut tiles = if machine.warpgroups && self.is_half() {
            Tiles::of_warpgroups(
                2,
                if self.depth() <= 64 && self.features.is_none() { 128 } else { 64 },
                128,
                2,
            )
        } else if self.is_half() {
            let rows = match self.depth() {
                ..=128 if !self.features.is_all() => 64,
                ..=192 => 32,
                _ => 16,
            };
            Tiles::new(rows, 64, 4, 2)
        } else {
            let (keys, rows) = self.without_tensor_cores();
            Tiles::new(rows, keys, 4, 1)
        };
        let least_keys = if self.is_half() { tiles.keys } else { 16 };
        while self.keys_bytes(tiles) > machine.shared_bytes {
            match tiles {
                Tiles { stages: 2.., .. } => tiles.stages -= 1,
                Tiles { warpgroups: true, .. } => break,
                Tiles { rows: 32.., .. } => tiles.rows /= 2,
                Tiles { keys, .. } if keys > least_keys => tiles.keys /= 2,
                _ => break,
            }
        }
        tiles
    }

    /// Whether the gradients of keys and of values are too many sums for one kernel.
    pub(crate) fn splits_gradients(self) -> bool {
        self.is_half() && self.head + self.value > 256
    }

    /// For the gradient of queries, within the shared memory of a block if there are such.
    pub(crate) fn queries(self, machine: Machine) -> Tiles {
        let split = if self.depth() <= 64 {
            &[Tiles::tf32_split(64, 64, 4, 1)][..]
        } else {
            &[
                Tiles::tf32_split(128, 32, 8, 2),
                Tiles::tf32_split(128, 32, 8, 1),
                Tiles::tf32_split(64, 32, 4, 1),
            ][..]
        };
        if let Some(split) = self.tf32_split_tiles(machine, Self::queries_bytes, split) {
            return split;
        }
        let mut tiles = if machine.warpgroups && self.is_half() {
            if self.depth() <= 128 && !self.features.is_all() {
                Tiles::of_warpgroups(2, 128, 128, 2)
            } else {
                Tiles::of_warpgroups(2, 128, 64, 3)
            }
        } else if self.is_half() {
            let keys = if self.depth() > 128 || self.features.is_all() { 32 } else { 64 };
            Tiles::new(64, keys, 4, 2)
        } else {
            let (rows, keys) = self.without_tensor_cores();
            Tiles::new(rows, keys, 4, 1)
        };
        let (least_rows, least_keys) = if self.is_half() { (tiles.rows, 32) } else { (16, 16) };
        while self.queries_bytes(tiles) > machine.shared_bytes {
            match tiles {
                Tiles { stages: 2.., .. } => tiles.stages -= 1,
                Tiles { warpgroups: true, .. } => break,
                Tiles { keys, .. } if keys > least_keys => tiles.keys /= 2,
                Tiles { rows, .. } if rows > least_rows => tiles.rows /= 2,
                _ => break,
            }
        }
        tiles
    }

    /// For the gradient of the bias, within the shared memory of a block if there are such.
    pub(crate) fn bias(self, machine: Machine) -> Tiles {
        let tiles = self.queries(machine.plain());
        Tiles { keys: tiles.keys.min(32), stages: 1, ..tiles }
    }

    /// Bytes of rows of operands in shared memory: 16 bytes behind each row, but for whole panels and split
    /// products.
    fn tile(self, tiles: Tiles, rows: usize, depth: usize) -> usize {
        rows * (tiles.columns(depth) * self.dtype.size()
            + if tiles.warpgroups || tiles.tf32_split { 0 } else { 16 })
    }

    /// Bytes behind the tiles: those that weights pass through on their way to a product, which are none
    /// where there are tensor cores; or barriers.
    fn room(self, tiles: Tiles, height: usize, width: usize) -> usize {
        match (tiles.warpgroups, self.is_half() || tiles.tf32_split) {
            (true, _) => GATES,
            (false, true) => 0,
            (false, false) => self.tile(tiles, height, width),
        }
    }

    fn both(self, tiles: Tiles, rows: usize) -> usize {
        self.tile(tiles, rows, self.head) + self.tile(tiles, rows, self.columns_of_slice())
    }

    /// Whether the forward kernel reads keys and values of 8 bits as they are, `READS_BYTES` of the kernel.
    pub(crate) fn reads_bytes(self, tiles: Tiles) -> bool {
        let widths = [self.head, self.columns_of_slice()];
        self.eight_bit.is_some()
            && self.is_half()
            && tiles.warps == 1
            && widths.into_iter().all(|width| width % 64 == 0 && width <= 256)
    }

    /// Shared memory of the forward kernel.
    pub(crate) fn forward_bytes(self, tiles: Tiles) -> usize {
        let slots = if tiles.warpgroups { 2 } else { 1 };
        let of_keys = if self.reads_bytes(tiles) {
            0
        } else if self.eight_bit.is_some() && tiles.warps == 1 {
            // Keys and values take turns, `SHARES_TILE` of the kernel.
            self.tile(tiles, tiles.keys, self.head.max(self.columns_of_slice()))
        } else {
            slots * self.both(tiles, tiles.keys)
        };
        self.tile(tiles, tiles.rows, self.head)
            + of_keys
            + self.staged(tiles)
            + if tiles.warpgroups { FORWARD_GATES } else { self.room(tiles, tiles.rows, tiles.keys) }
    }

    /// Bytes of 8-bit keys and values on their way to a tile.
    fn staged(self, tiles: Tiles) -> usize {
        let columns = tiles.columns(self.head) + tiles.columns(self.columns_of_slice());
        if self.eight_bit.is_some() { tiles.keys * columns } else { 0 }
    }

    /// Shared memory of the kernel for the gradients of keys and values.
    pub(crate) fn keys_bytes(self, tiles: Tiles) -> usize {
        // `NUMBERS` of the kernel.
        let states = (2 * tiles.rows + 4) * self.dtype.accumulator().size();
        self.both(tiles, tiles.keys)
            + tiles.stages * (self.both(tiles, tiles.rows) + states)
            + self.room(tiles, tiles.keys, tiles.rows)
    }

    /// Shared memory of the kernels for the gradients of queries and of the bias, with `NUMBERS` of the
    /// former on warpgroups: the scores of rows, and beside a mask or bias alone their other states and 16
    /// bytes that say what each sees.
    pub(crate) fn queries_bytes(self, tiles: Tiles) -> usize {
        let size = self.dtype.accumulator().size();
        let others = if packs(self.features) { tiles.rows * (2 * size + 16) } else { 0 };
        let numbers = if tiles.warpgroups { (tiles.rows + 4) * size + others } else { 0 };
        self.both(tiles, tiles.rows)
            + numbers
            + tiles.stages * self.both(tiles, tiles.keys)
            + self.room(tiles, tiles.rows, tiles.keys)
    }
}
