//! How large the tiles of each kernel are.

use attention_core::{DType, Problem};

use super::features::Features;

/// The head dimensions that kernels are compiled for: a call has the next one, with zeros behind its own.
const DEPTHS: [usize; 6] = [32, 64, 96, 128, 192, 256];

/// The largest head dimension.
pub(crate) const MOST_DEPTH: usize = DEPTHS[DEPTHS.len() - 1];

/// The tiles of a kernel: rows of queries, keys, warps, and how many of the streamed tiles there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiles {
    pub(crate) rows: usize,
    pub(crate) keys: usize,
    pub(crate) warps: usize,
    pub(crate) stages: usize,
}

/// What decides about tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) dtype: DType,
    pub(crate) head: usize,
    pub(crate) value: usize,
    pub(crate) features: Features,
}

impl Shape {
    /// `None` where a head dimension is too large.
    pub(crate) fn of(problem: &Problem) -> Option<Self> {
        let depth = |width: usize| DEPTHS.into_iter().find(|&depth| depth >= width);
        let dims = problem.dims();
        Some(Self {
            dtype: problem.dtype(),
            head: depth(dims.head_dim)?,
            value: depth(dims.value_head_dim)?,
            features: Features::of(problem),
        })
    }

    fn is_half(self) -> bool {
        matches!(self.dtype, DType::F16 | DType::Bf16)
    }

    fn depth(self) -> usize {
        self.head.max(self.value)
    }

    /// Rows and keys of tiles for f32 and f64, as what is held and what is streamed: so large that products are not held up by
    /// shared memory, where a thread has eight rows.
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

    /// For the forward pass with this many rows to a key/value head or query head. They fit the shared memory of every
    /// device.
    pub(crate) fn forward(self, rows_of_head: usize) -> Tiles {
        if !self.is_half() {
            let (rows, keys) = self.without_tensor_cores();
            return Tiles { rows, keys, warps: 4, stages: 1 };
        }
        // Two blocks of 16 rows to a warp halve what it reads from shared memory, where registers allow it.
        let rows =
            if self.features.bits() == 0 && self.depth() <= 128 && rows_of_head > 64 { 128 } else { 64 };
        let keys = if self.depth() > 192 || self.features.is_all() { 32 } else { 64 };
        Tiles { rows, keys, warps: 4, stages: 1 }
    }

    /// For the gradients of keys and values, within this much shared memory if there are such.
    pub(crate) fn keys(self, limit: usize) -> Tiles {
        let mut tiles = if self.is_half() {
            let rows = match self.depth() {
                ..=128 if !self.features.is_all() => 64,
                ..=192 => 32,
                _ => 16,
            };
            Tiles { rows, keys: 64, warps: 4, stages: 2 }
        } else {
            let (keys, rows) = self.without_tensor_cores();
            Tiles { rows, keys, warps: 4, stages: 1 }
        };
        let least_keys = if self.is_half() { tiles.keys } else { 16 };
        while self.keys_bytes(tiles) > limit {
            match tiles {
                Tiles { stages: 2, .. } => tiles.stages = 1,
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

    /// For the gradient of queries, within this much shared memory if there are such.
    pub(crate) fn queries(self, limit: usize) -> Tiles {
        let mut tiles = if self.is_half() {
            let keys = if self.depth() > 128 || self.features.is_all() { 32 } else { 64 };
            Tiles { rows: 64, keys, warps: 4, stages: 2 }
        } else {
            let (rows, keys) = self.without_tensor_cores();
            Tiles { rows, keys, warps: 4, stages: 1 }
        };
        let (least_rows, least_keys) = if self.is_half() { (tiles.rows, 32) } else { (16, 16) };
        while self.queries_bytes(tiles) > limit {
            match tiles {
                Tiles { stages: 2, .. } => tiles.stages = 1,
                Tiles { keys, .. } if keys > least_keys => tiles.keys /= 2,
                Tiles { rows, .. } if rows > least_rows => tiles.rows /= 2,
                _ => break,
            }
        }
        tiles
    }

    /// For the gradient of the bias, within this much shared memory if there are such.
    pub(crate) fn bias(self, limit: usize) -> Tiles {
        let tiles = self.queries(limit);
        Tiles { keys: tiles.keys.min(32), stages: 1, ..tiles }
    }

    /// Bytes of a tile of operands in shared memory: 16 bytes behind each row.
    fn tile(self, rows: usize, depth: usize) -> usize {
        rows * (depth * self.dtype.size() + 16)
    }

    /// Bytes that weights pass through on their way to a product: none in tensor cores' registers.
    fn room(self, height: usize, width: usize) -> usize {
        if self.is_half() { 0 } else { self.tile(height, width) }
    }

    fn both(self, rows: usize) -> usize {
        self.tile(rows, self.head) + self.tile(rows, self.value)
    }

    /// Shared memory of the forward kernel.
    pub(crate) fn forward_bytes(self, tiles: Tiles) -> usize {
        self.tile(tiles.rows, self.head) + self.both(tiles.keys) + self.room(tiles.rows, tiles.keys)
    }

    /// Shared memory of the kernel for the gradients of keys and values.
    pub(crate) fn keys_bytes(self, tiles: Tiles) -> usize {
        let states = 2 * tiles.rows * self.dtype.accumulator().size();
        self.both(tiles.keys)
            + tiles.stages * (self.both(tiles.rows) + states)
            + self.room(tiles.keys, tiles.rows)
    }

    /// Shared memory of the kernels for the gradients of queries and of the bias.
    pub(crate) fn queries_bytes(self, tiles: Tiles) -> usize {
        self.both(tiles.rows) + tiles.stages * self.both(tiles.keys) + self.room(tiles.rows, tiles.keys)
    }
}
