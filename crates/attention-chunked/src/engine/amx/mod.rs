//! Products on the matrix unit of AMX: bf16 operands, f32 sums, 32 by 32 outputs at a time.
//!
//! Operands of other dtypes are sums of bf16 parts: an f16 is exactly two, an f32 exactly three (each part
//! the nearest bf16 of what the ones before left). The products of parts that matter are added in one chain
//! of accumulators; left out are those below the rounding of the numerics class (docs/numerics.md, "Split
//! operands").
//!
//! Everything is packed in tiles of 1 KiB that are loaded as they lie, `[outer / 16][inner / 32][part]`,
//! where the inner axis is the one that is summed over: a left tile is 16 rows of 32 elements, a right one 16
//! rows of 16 pairs.
//!
//! The sums for keys are kept transposed, `[width][keys]`: then the weights, which are new for every block,
//! are the right operand, whose pairs are two neighbouring rows, and the terms, packed once, are the
//! transposed left one.

mod engine;
mod pack;
mod tile;

pub(crate) use tile::Tiles;
