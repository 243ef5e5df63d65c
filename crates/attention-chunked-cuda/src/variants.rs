//! What kernels are called among the variants of the backend, and all that plans may choose.

use std::collections::BTreeSet;

use attention_core::DType;
use attention_kernels::Layout;

use super::axes::{axes, options_of_kind};
use super::one_pass::{ALL_GRADIENTS, FINISH};
use super::schedule::{SCHEDULES, name_of_schedule};
use super::tiles::{MOST_DEPTH, Machine, Shape, Tiles};

/// As [`variant`], of a kernel for batch-invariant calls: those differ in how sums are merged, whatever the
/// tiles are.
pub(crate) fn variant_batch_invariant(
    entry_point: &str,
    dtype: DType,
    tiles: Tiles,
    more: &str,
    layout: Layout,
) -> String {
    let name = entry_point.trim_start_matches("attention_").replace('_', " ");
    let rows = match layout {
        Layout::Dense => "",
        Layout::Packed => ", packed",
        Layout::Paged => ", paged",
    };
    format!("{name} {dtype}{rows}, batch invariant{}{more}", tiles.multiplied_by())
}

/// What a kernel is called among the variants of the backend: by its entry point, dtype, tiles and what
/// multiplies them. Head dimensions, options and stages that share tiles share a variant, and are counted
/// apart ([`axes`]). All tiles share one of packed rows, of pages, and of 8-bit keys, that are multiplied
/// alike: where rows lie, and what is widened on the way to a tile, is apart from how many a tile has. Kernels
/// that read bytes as they are have other products, of 8 or of 16 rows. The two dtypes of 8 bits differ in one
/// conversion.
pub(crate) fn variant(entry_point: &str, shape: Shape, tiles: Tiles, more: &str, layout: Layout) -> String {
    let Shape { dtype, eight_bit, .. } = shape;
    let name = entry_point.trim_start_matches("attention_").replace('_', " ");
    let Tiles { rows, keys, warps, .. } = tiles;
    let tile = if rows > 0 { format!(" {rows}x{keys}") } else { String::new() };
    let by = tiles.multiplied_by();
    let keys = match eight_bit {
        Some(_) if shape.reads_bytes(tiles) => &format!(", 8-bit keys by {rows} rows"),
        Some(_) => ", 8-bit keys",
        None => "",
    };
    let of_rows = match layout {
        Layout::Dense if eight_bit.is_some() => "dense",
        Layout::Dense => return format!("{name} {dtype}{tile}, {warps} warps{by}{more}"),
        Layout::Packed => "packed",
        Layout::Paged => "paged",
    };
    // Which gradients a kernel gives is apart from where rows lie, too.
    let more = if more == ONE_GRADIENT { "" } else { more };
    format!("{name} {dtype}{keys}, {of_rows}{by}{more}")
}

/// Of a forward kernel with split keys, whose partial results another kernel merges.
pub(crate) const SPLIT_KEYS: &str = ", keys in parts";

/// Of a kernel for one of the two gradients that one kernel gives otherwise.
pub(crate) const ONE_GRADIENT: &str = ", one gradient";

pub(crate) const LAYOUTS: [Layout; 3] = [Layout::Dense, Layout::Packed, Layout::Paged];

/// The variants of every kernel that a plan for this device may choose.
pub(crate) fn variants(machine: Machine) -> BTreeSet<String> {
    let mut names = BTreeSet::from(SCHEDULES.map(name_of_schedule));
    for (dtype, layout) in DType::FLOATS.into_iter().flat_map(|dtype| LAYOUTS.map(|layout| (dtype, layout))) {
        for shape in [None, Some(DType::F8E4M3)].into_iter().flat_map(|keys| Shape::all(dtype, keys)) {
            let of = |entry_point: &str, tiles: Tiles, more: &str| {
                variant(entry_point, shape, tiles, more, layout)
            };
            let of_splits = |entry_point: &str, tiles: Tiles, more: &str| match shape.batch_invariant {
                true => variant_batch_invariant(entry_point, dtype, tiles, more, layout),
                false => of(entry_point, tiles, more),
            };
            type Name<'a> = &'a dyn Fn(&str, Tiles, &str) -> String;
            let mut insert = |name: Name<'_>, entry_point: &str, tiles: Tiles, more: &str| {
                names.insert(name(entry_point, tiles, more));
                for options in options_of_kind(shape.features) {
                    names.extend(axes(entry_point, shape, options, tiles, layout));
                }
            };
            for &rows in shape.counts_of_rows() {
                let tiles = shape.forward(rows, machine);
                if shape.forward_bytes(tiles) <= machine.shared_bytes {
                    let merge = Tiles::of_merge(tiles, shape.batch_invariant);
                    insert(&of_splits, "attention_forward", tiles, "");
                    insert(&of_splits, "attention_forward", tiles, SPLIT_KEYS);
                    insert(&of_splits, "attention_merge", merge, "");
                }
            }
            // Keys in pages, and those of 8 bits, have no gradients.
            if shape.depth() > MOST_DEPTH || layout == Layout::Paged || shape.eight_bit.is_some() {
                continue;
            }
            let (keys, queries, bias) = (shape.keys(machine), shape.queries(machine), shape.bias(machine));
            let fits = [shape.keys_bytes(keys), shape.queries_bytes(queries), shape.queries_bytes(bias)];
            if fits.iter().any(|&bytes| bytes > machine.shared_bytes) {
                continue;
            }
            insert(&of_splits, "attention_prepare_gradients", Tiles::of_rows(), "");
            insert(&of, "attention_gradient_of_sinks", Tiles::of_rows(), "");
            insert(&of, "attention_gradient_of_queries", queries, "");
            insert(&of, "attention_gradient_of_keys", keys, ONE_GRADIENT);
            if let Some([tiles, of_finish]) = shape.one_pass(machine).filter(|_| layout == Layout::Dense) {
                insert(&of, ALL_GRADIENTS, tiles, "");
                insert(&of, FINISH, of_finish, "");
            }
            if !shape.splits_gradients() {
                insert(&of, "attention_gradient_of_keys", keys, "");
            }
            // Kernels without an option have no bias.
            if !shape.features.is_none() {
                insert(&of, "attention_gradient_of_bias", bias, "");
            }
        }
    }
    names
}
