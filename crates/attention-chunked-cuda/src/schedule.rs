//! Lists of the tiles of packed rows in scratch, which kernels in front write (`fused/schedule.cu`).

use attention_core::Unsupported;
use attention_cuda::parameters::SCHEDULED_TILE;
use attention_kernels::{KeyGradients, Layout};

use super::launches::{Kernel, Launches, limit};
use super::rows::Rows;
use super::tiles::Tiles;

/// Blocks that write a schedule, at most. Each of them counts the tiles of all sequences; not measured.
const SCHEDULING_BLOCKS: usize = 64;

/// The source of the kernels that list the tiles of packed rows.
pub(crate) const SCHEDULE: &str = "attention_schedule.cu";

/// Those kernels, for tiles of query rows and of keys.
pub(crate) const SCHEDULES: [&str; 2] = ["attention_schedule_query_tiles", "attention_schedule_key_tiles"];

/// What a kernel that lists tiles is called among the variants: it depends on nothing but their height.
pub(crate) fn name_of_schedule(entry_point: &str) -> String {
    entry_point.trim_start_matches("attention_").replace('_', " ")
}

impl Launches {
    /// Sets scratch aside for the entries of the longest schedule of the pass, those of tiles of so many rows
    /// or keys in so many heads: of the lowest tiles there are on any device, since scratch must not depend
    /// on it.
    pub(crate) fn set_schedule(&mut self, tiles_of: &[(Rows, usize, usize)]) -> Result<(), Unsupported> {
        if self.layout != Layout::Packed {
            return Ok(());
        }
        let height = self.shape.lowest_tile();
        let entries = |&(rows, shared, heads): &(Rows, usize, usize)| {
            rows.tiles(height, shared).saturating_mul(heads).saturating_mul(SCHEDULED_TILE)
        };
        let bytes = tiles_of.iter().map(entries).max().unwrap_or(0);
        let range = || {
            let start = self.scratch.bytes().checked_next_multiple_of(SCHEDULED_TILE)?;
            Some(start..start.checked_add(bytes)?)
        };
        self.schedule = range().ok_or_else(|| {
            limit(
                "tiles of packed rows",
                bytes / SCHEDULED_TILE,
                "scratch for them does not fit an address space",
            )
        })?;
        Ok(())
    }

    /// Adds a kernel whose blocks have a tile of packed rows of some head each, behind one that lists them.
    pub(crate) fn add_scheduled(
        &mut self,
        kernel: Kernel,
        height: usize,
        entries: [usize; 2],
        blocks: &[usize],
    ) -> Result<(), Unsupported> {
        if self.layout == Layout::Packed {
            let entry_point = SCHEDULES[usize::from(kernel.entry_point == "attention_gradient_of_keys")];
            let tiles = Tiles::of_schedule(height);
            let entries = entries[0].saturating_mul(entries[1]);
            if entries.saturating_mul(SCHEDULED_TILE) > self.schedule.len() {
                let lowest = self.shape.lowest_tile();
                return Err(limit("tiles of rows", height, format!("scratch is for at least {lowest}")));
            }
            let list = Kernel {
                source: SCHEDULE,
                entry_point,
                tiles,
                gradients: KeyGradients::None,
                blocks: 0,
                shared_bytes: 0,
            };
            self.add(list, &[entries.div_ceil(tiles.threads()).min(SCHEDULING_BLOCKS)])?;
        }
        self.add(kernel, &[&entries[..], blocks].concat())
    }
}
