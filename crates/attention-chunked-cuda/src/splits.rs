//! How many splits the keys have (split-KV), so that a small number of query rows keeps a device busy.

use super::tiles::{Machine, Shape, Tiles};

/// Blocks of all splits, at most: two waves of a large device. The scratch of a problem is large
/// enough for as many splits as this allows, since it must not depend on the device.
const MOST_BLOCKS: usize = 264;

/// The same where one warp is a block, of which a multiprocessor has ten.
const MOST_WARPS: usize = 2640;

/// Keys of a split, at least: fewer are not worth the merge.
const MIN_KEYS: usize = 256;
const MIN_KEYS_OF_WARP: usize = 128;

/// Splits of so many keys for this number of blocks, at most, on any device. 1 where keys are not split.
/// `rows` are those of a head, or of the heads that share tiles.
pub(crate) fn most_splits(shape: Shape, rows: usize, blocks: usize, keys: usize) -> usize {
    let (most, least_keys) = match shape.has_blocks_of_one_warp(rows) {
        true => (MOST_WARPS, MIN_KEYS_OF_WARP),
        false => (MOST_BLOCKS, MIN_KEYS),
    };
    // A call without blocks has nothing to split.
    most.checked_div(blocks).unwrap_or(1).min(keys / least_keys).max(1)
}

/// Splits, up to `most`, of keys in so many tiles for this number of blocks, where a device runs `at_once`
/// blocks at the same time: one where they take 0.8 of these, else the fewest splits whose waves are 0.85 as
/// efficient as the best (FlashAttention's heuristic for its number of splits). The efficiency is the share
/// of the time in which all blocks would have a tile of keys, were each to take as long.
pub(crate) fn splits_by_waves(blocks: usize, key_tiles: usize, at_once: usize, most: usize) -> usize {
    if blocks.saturating_mul(5) >= at_once.saturating_mul(4) {
        return 1;
    }
    // Its inverse but for a factor that all have: the tiles that one block after the other goes over.
    let steps = |splits: usize| {
        blocks
            .saturating_mul(splits)
            .div_ceil(at_once.max(1))
            .saturating_mul(key_tiles.div_ceil(splits.max(1)))
    };
    let best = (1..=most).map(steps).min().unwrap_or(0);
    (1..=most).find(|&splits| steps(splits).saturating_mul(85) <= best.saturating_mul(100)).unwrap_or(1)
}

/// Blocks of the forward kernel that such a device runs at the same time.
pub(crate) fn blocks_at_once(shape: Shape, tiles: Tiles, machine: Machine) -> usize {
    // A multiprocessor has 1 KiB for itself beside what a block may have, and so has each block.
    const RESERVED: usize = 1 << 10;
    let room = machine.shared_bytes.saturating_add(RESERVED) / (shape.forward_bytes(tiles) + RESERVED);
    machine.all_multiprocessors.saturating_mul(room.clamp(1, shape.least_blocks(tiles)))
}

#[cfg(test)]
mod tests {
    use attention_core::{DType, Device, Problem, TensorDesc};

    use super::*;
    use crate::launches::{Launches, ScratchLayout};

    /// Devices with few and many multiprocessors, and much and little shared memory.
    fn devices() -> impl Iterator<Item = Machine> {
        (1..=200).flat_map(|multiprocessors| {
            [(99, false), (163, false), (227, true)].map(|(kibibytes, warpgroups)| Machine {
                shared_bytes: kibibytes << 10,
                multiprocessors,
                all_multiprocessors: multiprocessors,
                warpgroups,
                tf32_split: true,
            })
        })
    }

    /// The scratch of a problem, which is the same on every device, is large enough for the splits of any.
    #[test]
    fn scratch_holds_the_splits_of_every_device() {
        let mut seen = std::collections::BTreeSet::new();
        for dtype in [DType::Bf16, DType::F32] {
            for (batch, rows, heads, keys) in
                [(1, 1, 32, 8192), (32, 1, 32, 8192), (64, 1, 32, 2048), (3, 7, 8, 777), (1, 100, 8, 1 << 16)]
            {
                let desc = |length, heads| TensorDesc::contiguous(dtype, [batch, length, heads, 128]);
                let (query, key) = (desc(rows, heads), desc(keys, 8));
                let problem = Problem::builder(query, key, key).device(Device::Cuda(0)).build().unwrap();
                let bytes = Launches::of(&problem, Machine::ANY).unwrap().scratch_bytes();
                for machine in devices() {
                    let plan = Launches::of(&problem, machine).unwrap();
                    assert_eq!(plan.scratch_bytes(), bytes, "{problem}, {machine:?}");
                    let needed = plan.splits * batch * rows * heads * size_of::<f32>();
                    match &plan.scratch {
                        ScratchLayout::Partials { out, state } => {
                            assert!(needed * 128 <= out.len() && needed * 2 <= state.len(), "{problem}");
                            assert!(out.end <= state.start && state.end <= bytes, "{problem}");
                        }
                        _ => assert_eq!(plan.splits, 1, "{problem}, {machine:?}"),
                    }
                    seen.insert(plan.splits);
                }
            }
        }
        assert!(seen.len() > 20, "{seen:?}");
    }

    /// What is left to other work on the device changes no bit.
    #[test]
    fn a_margin_leaves_splits_as_they_are() {
        let desc = |rows| TensorDesc::contiguous(DType::Bf16, [1, rows, 8, 128]);
        let problem =
            Problem::builder(desc(100), desc(1 << 16), desc(1 << 16)).device(Device::Cuda(0)).build();
        let problem = problem.unwrap();
        for machine in devices() {
            let splits = |machine| Launches::of(&problem, machine).unwrap().splits;
            assert_eq!(splits(Machine { multiprocessors: 1, ..machine }), splits(machine), "{machine:?}");
        }
    }

    /// The fewest splits whose share of time with a block at work is 0.85 of the best.
    #[test]
    fn splits_are_the_fewest_that_are_nearly_the_best() {
        for at_once in (1..=200).flat_map(|multiprocessors| [1, 2, 10, 16].map(|each| each * multiprocessors))
        {
            for blocks in [1, 2, 7, 8, 32, 64, 100, 256, 512, 2000] {
                for (key_tiles, most) in [(1, 1), (8, 2), (64, 10), (65, 16), (256, 64), (2048, 330)] {
                    let splits = splits_by_waves(blocks, key_tiles, at_once, most);
                    let what = format!("{blocks} blocks, {key_tiles} tiles, {at_once} at once, up to {most}");
                    if blocks as f64 >= 0.8 * at_once as f64 {
                        assert_eq!(splits, 1, "{what}");
                        continue;
                    }
                    let efficiency = |splits: usize| {
                        let waves = (blocks as f64 * splits as f64 / at_once as f64).ceil();
                        let longest = (key_tiles as f64 / splits as f64).ceil();
                        (blocks * key_tiles) as f64 / (at_once as f64 * waves * longest)
                    };
                    let best = (1..=most).map(efficiency).fold(0.0, f64::max);
                    assert!(
                        (1..=most).contains(&splits) && efficiency(splits) > 0.85 * best - 1e-9,
                        "{what}"
                    );
                    assert!((1..splits).all(|fewer| efficiency(fewer) < 0.85 * best + 1e-9), "{what}");
                }
            }
        }
    }
}
