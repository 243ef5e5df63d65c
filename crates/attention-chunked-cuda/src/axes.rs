//! What variants are called by the axes that their tiles do not say: options, head dimensions and stages.
//!
//! A kernel is compiled for each combination of tiles, options and head dimensions that calls ask for, which
//! are more than any suite can compile. So each kernel counts under several names: one for its tiles
//! (`launches.rs`), and one for each of its other axes by itself, for dense rows. A suite that has run all
//! names has run each value of each axis in each kernel and dtype, and all combinations of tiles with what
//! multiplies them, but not each option with each tile.

use attention_kernels::{Features, Layout};

use super::tiles::{Shape, Tiles};

/// The options that kernels are compiled for ([`features_of`](super::features::features_of)), in words. A
/// logit that is made by itself, of a scale that may be 0 or below, is an option too.
const OPTIONS: [(Features, &str); 10] = [
    (Features::NONE, "no option"),
    (Features::MASK, "mask"),
    (Features::DROPOUT, "dropout"),
    (Features::LOGITS, "any scale"),
    (Features::MASK.with(Features::LOGITS), "mask, any scale"),
    (Features::DROPOUT.with(Features::LOGITS), "dropout, any scale"),
    (Features::BIAS.with(Features::LOGITS), "bias"),
    (Features::ALIBI.with(Features::LOGITS), "ALiBi"),
    (Features::SOFTCAP.with(Features::LOGITS), "softcap"),
    (Features::ALL, "several options"),
];

/// The options of which tiles depend on as they do on these, which are one of
/// [`KINDS`](super::features::KINDS).
pub(crate) fn options_of_kind(kind: Features) -> impl Iterator<Item = Features> {
    let is_one = |features: Features| !features.is_none() && !features.is_all();
    OPTIONS
        .into_iter()
        .map(|(features, _)| features)
        .filter(move |&features| features == kind || (is_one(features) && is_one(kind)))
}

/// The names of a kernel of this shape by each axis. None of packed rows, of pages and of 8-bit keys, whose
/// kernels differ from those of dense rows in where rows lie and in what is widened on the way to a tile, and
/// of batch-invariant calls, whose kernels differ in how sums are merged.
pub(crate) fn axes(
    entry_point: &str,
    shape: Shape,
    options: Features,
    tiles: Tiles,
    layout: Layout,
) -> Vec<String> {
    if layout != Layout::Dense || shape.eight_bit.is_some() || shape.batch_invariant {
        return Vec::new();
    }
    let kernel = entry_point.trim_start_matches("attention_").replace('_', " ");
    let kernel = format!("{kernel} {}", shape.dtype);
    let mut names = Vec::new();
    // The others go over rows, of values and sums alone, in loops of any width.
    if tiles.rows > 0 {
        names.push(format!("{kernel}, {} stages{}", tiles.stages, tiles.multiplied_by()));
        let words = OPTIONS.iter().find(|&&(features, _)| features == options);
        let words =
            words.map_or_else(|| format!("options {}", options.bits()), |&(_, words)| words.to_owned());
        // A bias is the one option that its gradient has by itself, and its products are those of the
        // gradient of queries, which has all widths.
        let is_of_bias = entry_point == "attention_gradient_of_bias";
        if !is_of_bias || options.is_all() || options == Features::BIAS.with(Features::LOGITS) {
            names.push(format!("{kernel}, {words}"));
        }
        if !is_of_bias {
            names.push(format!("{kernel}, queries and keys of {}", shape.head));
            names.push(format!("{kernel}, values of {}", shape.value));
        }
    }
    names
}
