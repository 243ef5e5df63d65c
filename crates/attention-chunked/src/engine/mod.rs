//! Matrix products on packed operands: what an implementation of the chunked algorithm is built from.
//!
//! The algorithm ([`forward`](crate::forward), [`backward`](crate::backward)) is written once over
//! [`Engine`]. An engine decides how operands are packed, multiplies them, and says with which vectors
//! everything between the products is done. [`Fused`](vector::Fused) multiplies with fused multiply-add on
//! any vector level; [`Tiles`](amx::Tiles) with the matrix unit of AMX.
//!
//! Shapes of one block: `rows` query rows, `keys` keys, `width` the head dimension of the operand at hand.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod vector;

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;

use crate::simd::Simd;
use crate::tensor::Operands;

/// Rows that are staged at a time: read from the caller's tensors, widened, and handed over to be packed.
pub(crate) const STAGE: usize = 32;

/// Rows of the largest block of any engine.
pub(crate) const MAX_BLOCK_ROWS: usize = 128;

/// The distance between rows of a tile: a bit more than a block, since rows a power of two apart would share
/// the sets of the cache.
pub(crate) const fn tile_stride<E: Engine>() -> usize {
    E::BLOCK_KEYS + 16
}

/// [`STAGE`] rows on their way to be packed. Rows behind the last real one are zero.
#[derive(Clone, Copy)]
#[allow(clippy::large_enum_variant, reason = "one at a time, on the stack")]
pub(crate) enum Staged<'a, F> {
    /// Converted to what is computed in.
    Floats(FloatRows<'a, F>),
    /// As they lie in the caller's tensor, for an engine with [`TAKES_BF16`](Engine::TAKES_BF16); empty where
    /// zero.
    Bf16([&'a [bf16]; STAGE]),
}

/// Rows of `width` elements, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct FloatRows<'a, F> {
    pub(crate) data: &'a [F],
    pub(crate) stride: usize,
    pub(crate) width: usize,
}

impl<'a, F> Staged<'a, F> {
    /// The converted rows, for an engine that is given no others.
    pub(crate) fn floats(self) -> FloatRows<'a, F> {
        match self {
            Self::Floats(rows) => rows,
            Self::Bf16(_) => unreachable!("rows as they lie are for engines that take them"),
        }
    }
}

/// Rows of an operand as the engine packed them.
#[derive(Clone, Copy)]
pub(crate) struct PackedRows<'a, P> {
    pub(crate) data: &'a [P],
    /// How many rows there are, those that groups were filled up with included.
    pub(crate) len: usize,
}

/// Where a product goes: rows `stride` apart.
pub(crate) struct TileMut<'a, F> {
    pub(crate) data: &'a mut [F],
    pub(crate) stride: usize,
}

/// The sums of some keys, as the engine keeps them.
pub(crate) struct KeySumsMut<'a, F> {
    /// Of [`key_sums_len`](Engine::key_sums_len).
    pub(crate) data: &'a mut [F],
    /// How many keys they are of.
    pub(crate) keys: usize,
}

/// A block of weights: probabilities, or gradients of logits.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a, F, P> {
    /// How many rows there are.
    pub(crate) rows: usize,
    /// Row-major, `stride` apart.
    pub(crate) tile: &'a [F],
    pub(crate) stride: usize,
    /// As the engine packed them, where it packs weights.
    pub(crate) packed: &'a [P],
}

/// Where the gradients of a block are packed to: null where they are not wanted.
#[derive(Clone, Copy)]
pub(crate) struct GradientPacks<P> {
    /// Probabilities, of [`gradients_len`](Engine::gradients_len), for the sums of values.
    pub(crate) for_values: *mut P,
    /// Gradients of products, of the same length, for the sums of keys.
    pub(crate) for_keys: *mut P,
    /// The same, of [`weights_len`](Engine::weights_len), as the weights of keys.
    pub(crate) as_weights: *mut P,
}

/// What becomes of sums that are in memory already.
#[derive(Clone, Copy)]
pub(crate) enum Accumulate<'a, F> {
    /// They are overwritten.
    Overwrite,
    /// The new ones are added.
    Add,
    /// The new ones are added to a multiple of them, one factor per row.
    ScaleAdd(&'a [F]),
}

/// A way to multiply. All lengths are in elements of [`Packed`](Self::Packed) unless they say otherwise; all
/// methods panic where a buffer is shorter than its length function says, so no argument reaches memory it
/// should not.
pub(crate) trait Engine: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// What logits, softmax and sums are computed in.
    type F: Operands;
    /// The vectors of everything between the products.
    type S: Simd<Self::F>;
    /// Elements of packed operands.
    type Packed: Pod + Default;

    /// Whether rows of bf16 are packed as they lie.
    const TAKES_BF16: bool = false;

    /// Query rows of a block. Packed rows are padded to a multiple of it.
    const BLOCK_ROWS: usize;
    /// Keys of a block: the unit in which the online softmax advances.
    const BLOCK_KEYS: usize;
    /// Blocks of keys begin and end at multiples of this, at most [`BLOCK_KEYS`](Self::BLOCK_KEYS).
    const KEY_STEP: usize;

    /// Whether weights lie in the tile, where products were.
    const WEIGHTS_IN_TILE: bool;

    /// Columns of packed weights come in multiples of this.
    const WEIGHT_STEP: usize;

    /// The distance between rows of weighted sums of `width` columns.
    fn sum_stride(width: usize) -> usize;

    /// The vectors.
    fn simd(self) -> Self::S;

    /// The vectors of what needs nothing of the engine: reading rows, what is added to logits, and decoding,
    /// for which nothing is packed. Engines of one level share their code.
    type Plain: Simd<Self::F>;

    /// The same.
    fn plain(self) -> Self::Plain;

    /// Runs `work` with the state that products need set up on this thread.
    fn with_state<R>(self, work: impl FnOnce() -> R) -> R {
        work()
    }

    /// Length of `rows` packed queries.
    fn queries_len(rows: usize, width: usize) -> usize;
    /// Packs staged rows `first..first + STAGE` of `rows`.
    fn pack_queries(self, staged: Staged<'_, Self::F>, first: usize, rows: usize, to: &mut [Self::Packed]);
    /// Length of `keys` keys packed for products with queries; `keys` is a multiple of [`STAGE`].
    fn keys_len(keys: usize, width: usize) -> usize;
    /// Packs staged keys `first..first + STAGE` of `keys`.
    fn pack_keys(self, staged: Staged<'_, Self::F>, first: usize, keys: usize, to: &mut [Self::Packed]);
    /// Length of `keys` rows packed for sums weighted by keys.
    fn values_len(keys: usize, width: usize) -> usize;
    /// Packs staged rows `first..first + STAGE` of `keys`.
    fn pack_values(self, staged: Staged<'_, Self::F>, first: usize, keys: usize, to: &mut [Self::Packed]);

    /// `out[row - rows.start][key - range.start] = <queries[row], keys[key]>` for the queries `rows` and the
    /// keys `range`, whose ends are multiples of [`KEY_STEP`](Self::KEY_STEP), or the second is the number of
    /// keys.
    fn products(
        self,
        queries: PackedRows<'_, Self::Packed>,
        rows: Range<usize>,
        keys: PackedRows<'_, Self::Packed>,
        range: Range<usize>,
        width: usize,
        out: TileMut<'_, Self::F>,
    );

    /// Length of the packed weights of a block.
    fn weights_len(rows: usize, keys: usize) -> usize;

    /// Takes two neighbouring vectors of weights of a row on their way to the tile.
    ///
    /// Called inside [`Simd::vectorize`].
    ///
    /// # Safety
    /// `packed` points to [`weights_len`](Self::weights_len) elements of a block with `keys` columns; `row`
    /// and the columns `column..column + 2 * LANES` are inside the block; `tile` points to those columns of
    /// the row.
    unsafe fn put_weights(
        simd: Self::S,
        packed: *mut Self::Packed,
        keys: usize,
        row: usize,
        column: usize,
        tile: *mut Self::F,
        weights: [<Self::S as Simd<Self::F>>::V; 2],
    );

    /// `out[row] = sum over keys of weights[row][key] * values[keys.start + key]` for the rows of the weights
    /// and the keys of the tile, which are `keys` of the values; `accumulate` says what becomes of what `out`
    /// has.
    fn weighted_sums(
        self,
        weights: Weights<'_, Self::F, Self::Packed>,
        values: PackedRows<'_, Self::Packed>,
        keys: Range<usize>,
        width: usize,
        accumulate: Accumulate<'_, Self::F>,
        out: TileMut<'_, Self::F>,
    );

    // The gradients of keys and values: sums over query rows.

    /// Whether gradients are packed on their way to the tile, by [`put_gradients`](Self::put_gradients).
    const PACKS_GRADIENTS: bool = false;

    /// Packs what is computed of two neighbouring rows, the first even, at two neighbouring vectors of
    /// columns: `[row][vector]`, zero where there is nothing.
    ///
    /// Called inside [`Simd::vectorize`], where [`PACKS_GRADIENTS`](Self::PACKS_GRADIENTS).
    ///
    /// # Safety
    /// The buffers are those of a block; rows and columns are inside it, and the columns are a multiple of
    /// two vectors.
    #[inline(always)]
    unsafe fn put_gradients(
        _: Self::S,
        _: &GradientPacks<Self::Packed>,
        _: usize,
        _: usize,
        _: [[<Self::S as Simd<Self::F>>::V; 2]; 2],
        _: [[<Self::S as Simd<Self::F>>::V; 2]; 2],
    ) {
        unreachable!("this engine takes gradients from the tile")
    }

    /// Length of `rows` query-side rows packed for sums over queries.
    fn terms_len(rows: usize, width: usize) -> usize;
    /// Packs staged rows `first..first + STAGE` of `rows`.
    fn pack_terms(self, staged: Staged<'_, Self::F>, first: usize, rows: usize, to: &mut [Self::Packed]);
    /// Length of the scratch that [`pack_gradients`](Self::pack_gradients) fills.
    fn gradients_len(rows: usize, keys: usize) -> usize;
    /// Packs a tile of `rows` rows, the first `count` real, of `keys` columns, for
    /// [`weighted_sums`](Self::weighted_sums) (`as_weights`) and for [`add_key_sums`](Self::add_key_sums).
    /// Nothing to do where products take the tile as it is.
    fn pack_gradients(
        self,
        tile: &[Self::F],
        stride: usize,
        count: usize,
        keys: usize,
        as_weights: Option<&mut [Self::Packed]>,
        for_keys: Option<&mut [Self::Packed]>,
    );
    /// Elements of the sums of `keys` keys.
    fn key_sums_len(keys: usize, width: usize) -> usize;
    /// `sums[keys.start + key] += sum over rows of weights[row][key] * terms[first + row]` for the rows of
    /// the weights and the keys of the tile, which are `keys` of the sums.
    fn add_key_sums(
        self,
        weights: Weights<'_, Self::F, Self::Packed>,
        terms: PackedRows<'_, Self::Packed>,
        first: usize,
        keys: Range<usize>,
        width: usize,
        sums: KeySumsMut<'_, Self::F>,
    );
    /// The sums of keys `first..first + STAGE` of `keys`, as rows some distance apart, which is also given:
    /// where they lie, or in the room, which is as long as that of staged rows. `first` is a multiple of
    /// [`STAGE`].
    fn key_sum_rows<'r>(
        self,
        sums: &'r [Self::F],
        keys: usize,
        width: usize,
        first: usize,
        room: &'r mut [Self::F],
    ) -> (&'r [Self::F], usize);

    /// Where the sum of a key and column is.
    fn key_sum_at(keys: usize, width: usize, key: usize, column: usize) -> usize;
}
