//! Lists of the tiles of packed rows in scratch, which kernels in front write (`fused/schedule.cu`).

use std::ops::Range;

use attention_cuda::parameters::SCHEDULED_TILE;

use super::one_pass::ALL_GRADIENTS;
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

/// The one of them whose tiles a kernel goes over.
pub(crate) fn schedule_of(entry_point: &str) -> &'static str {
    SCHEDULES[usize::from(["attention_gradient_of_keys", ALL_GRADIENTS].contains(&entry_point))]
}

/// Entries of the longest of these schedules, with tiles of `height` rows or keys. Each schedule is the rows
/// or keys, the number of heads that share a tile, and the number of heads, or of groups that share tiles.
pub(crate) fn most_entries(height: usize, of: &[(Rows, usize, usize)]) -> usize {
    let entries =
        |&(rows, shared, heads): &(Rows, usize, usize)| rows.tiles(height, shared).saturating_mul(heads);
    of.iter().map(entries).max().unwrap_or(0)
}

/// The range of scratch, in bytes, for this number of entries, from the first aligned byte at `behind` or
/// later; `None` if it does not fit an address space.
pub(crate) fn place_of(entries: usize, behind: usize) -> Option<Range<usize>> {
    let start = behind.checked_next_multiple_of(SCHEDULED_TILE)?;
    Some(start..start.checked_add(entries.checked_mul(SCHEDULED_TILE)?)?)
}

/// Whether this range of scratch, in bytes, fits the entries.
pub(crate) fn has_room(place: &Range<usize>, entries: usize) -> bool {
    entries.saturating_mul(SCHEDULED_TILE) <= place.len()
}

/// Blocks of the kernel that writes the entries.
pub(crate) fn blocks_for(entries: usize, tiles: Tiles) -> usize {
    entries.div_ceil(tiles.threads()).min(SCHEDULING_BLOCKS)
}
