// Isolation of NaN after cuDNN's plan: rows of a result that are not finite are recomputed from visible keys
// alone. cuDNN multiplies values at masked positions by 0, and 0 times NaN is NaN.
// Needs: fused/exact.cuh.
//
// NaN or infinities reach all rows of one of cuDNN's tiles: those that see the key and, through products with
// 0, those that do not. So of GROUP rows of one tile, only the first and the last are checked. The same is
// true of keys and the rows that see them.
//
// f16 and bf16, every option, compute capability 8.0 and later. ROWS groups per block, one warp per row that
// is recomputed. Tested by the conformance suite of attention-cudnn.

// The host sets the number of rows in a group (`rows_of_group` in nan_isolation.rs of attention-cudnn); with
// 1, every row is checked.
#ifndef GROUP
#define GROUP 1
#endif

static_assert(HALVES, "results are told apart by their bits");

// Whether eight numbers are finite.
__device__ inline bool is_finite(const uint4 &of) {
    // The bits of the exponent, all ones in NaN and infinities, and the lowest of them: adding it to a
    // largest exponent carries into the sign bit.
    constexpr unsigned HIGHEST = DTYPE == DTYPE_F16 ? 0x7c007c00u : 0x7f807f80u,
                       ONE = DTYPE == DTYPE_F16 ? 0x04000400u : 0x00800080u;
    const unsigned any =
        ((of.x & HIGHEST) + ONE) | ((of.y & HIGHEST) + ONE) | ((of.z & HIGHEST) + ONE) | ((of.w & HIGHEST) + ONE);
    return (any & 0x80008000u) == 0;
}

// The groups that a warp checks.
constexpr int GROUPS_OF_WARP = ROWS / WARPS;

// Checks a warp's groups of rows of a result's head, the first of which begins with row `first` of a sequence
// whose row 0 is row `origin` of the tensor: bit i is 1 if a checked row of group i is not finite. Requires
// first < end. Groups at `end` or beyond read row `end` - 1 instead, so their bits may be 1 as well.
template <int DEPTH>
__device__ inline unsigned non_finite_groups(const Tensor &tensor, long long b, long long origin, long long head,
                                             int first, int end, int width, bool aligned) {
    constexpr int LANES = lanes_of_row<DEPTH>(), AT_ONCE = 32 / LANES, DEEP = GROUPS_OF_WARP / AT_ONCE;
    constexpr int STEPS = (DEPTH + LANES * CHUNK - 1) / (LANES * CHUNK), LOOKS = GROUP > 1 ? 2 : 1;
    // Up to 8 chunks, 32 registers, are in flight at once; both rows of a group are, if they fit into that.
    constexpr int LOOKS_AT_ONCE = LOOKS * DEEP * STEPS <= 8 ? LOOKS : 1;
    const int lane = threadIdx.x % 32;
    const element *const rows = at(tensor, b, origin, head);
    const auto row_of_look = [&](int i, int look) {
        const int row = first + (i * AT_ONCE + lane / LANES) * GROUP + look * (GROUP - 1);
        return rows + min(row, end - 1) * tensor.stride[1];
    };
    bool finite[DEEP];
#pragma unroll
    for (int i = 0; i < DEEP; ++i) finite[i] = true;
    if (aligned) {
#pragma unroll LOOKS_AT_ONCE
        for (int look = 0; look < LOOKS; ++look) {
            uint4 chunks[DEEP][STEPS];
            // Past the end of a row, its last chunk is read again, so that no load depends on a branch.
#pragma unroll
            for (int i = 0; i < DEEP; ++i)
#pragma unroll
                for (int step = 0; step < STEPS; ++step) {
                    const int column = min((step * LANES + lane % LANES) * CHUNK, width - CHUNK);
                    chunks[i][step] = *reinterpret_cast<const uint4 *>(row_of_look(i, look) + column);
                }
#pragma unroll
            for (int i = 0; i < DEEP; ++i)
#pragma unroll
                for (int step = 0; step < STEPS; ++step) finite[i] &= is_finite(chunks[i][step]);
        }
    } else {
#pragma unroll 1
        for (int look = 0; look < LOOKS; ++look)
#pragma unroll
            for (int i = 0; i < DEEP; ++i) {
                const element *const from = row_of_look(i, look);
#pragma unroll 1
                for (int column = lane % LANES; column < width; column += LANES)
                    finite[i] &= is_finite(widened(from[column * tensor.stride[3]]));
            }
    }
    unsigned non_finite = 0;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
        const unsigned votes = __ballot_sync(~0u, !finite[i]);
#pragma unroll
        for (int own = 0; own < AT_ONCE; ++own)
            if (votes >> (own * LANES) & (LANES == 32 ? ~0u : (1u << LANES) - 1))
                non_finite |= 1u << (i * AT_ONCE + own);
    }
    return non_finite;
}

// Whether a row of a result's head is finite; called by a whole warp, which gets the same answer.
__device__ inline bool is_finite_row(const Tensor &tensor, long long b, long long position, long long head, int width) {
    const element *const from = at(tensor, b, position, head);
    bool finite = true;
    for (int column = threadIdx.x % 32; column < width; column += 32)
        finite &= is_finite(widened(from[column * tensor.stride[3]]));
    return __all_sync(~0u, finite);
}

// Calls `again` with each row before `end` of the groups whose bits are 1.
template <class Again>
__device__ inline void for_each_row(unsigned groups, int first, int end, Again again) {
    while (groups != 0) {
        const int row = first + (__ffs((int)groups) - 1) * GROUP;
        groups &= groups - 1;
        for (int own = row; own < min(row + GROUP, end); ++own) again(own);
    }
}

// The rows that a warp checks.
struct Strip {
    long long batch, head;
    Sequence sequence;
    // The warp's first row; at the sequence's end or beyond it if there is none.
    int first;
};

constexpr int ROWS_OF_BLOCK = ROWS * GROUP;

__device__ inline unsigned strips_of_head(long long rows) {
    return (unsigned)((rows + ROWS_OF_BLOCK - 1) / ROWS_OF_BLOCK);
}

__device__ inline Strip strip_of_warp(const Parameters &p, int batch, int head, int tile) {
    Strip strip;
    strip.batch = batch;
    strip.head = head;
    strip.sequence = sequence_of(p, batch);
    strip.first = tile * ROWS_OF_BLOCK + threadIdx.x / 32 * GROUPS_OF_WARP * GROUP;
#if LAYOUT != LAYOUT_DENSE
    // A slot of the grid that no strip of the sequence has.
    if (tile < 0) strip.first = 0x7fffffff;
#endif
    return strip;
}

// The strips of a block of queries or keys. The host launches as many blocks (`blocks` in nan_isolation.rs).
__device__ inline Strip strip_of_queries(const Parameters &p, unsigned block) {
#if LAYOUT == LAYOUT_DENSE
    const TileIndex place = tile_of_block(p, block, strips_of_head(p.query_length), (unsigned)p.query_heads);
#else
    const SequenceTile place = query_tile_of(p, ROWS_OF_BLOCK, 1, block, (unsigned)p.query_heads);
#endif
    return strip_of_warp(p, place.batch, place.head, place.tile);
}

__device__ inline Strip strip_of_keys(const Parameters &p, unsigned block) {
#if LAYOUT == LAYOUT_DENSE
    const TileIndex place = tile_of_block(p, block, strips_of_head(p.key_length), (unsigned)p.key_heads);
#else
    const SequenceTile place = key_tile_of(p, ROWS_OF_BLOCK, block, (unsigned)p.key_heads);
#endif
    return strip_of_warp(p, place.batch, place.head, place.tile);
}

// The minimum number of blocks per multiprocessor. It limits the registers per thread to those of the checks,
// which every call runs; recomputing rows would be faster with more, but is rare.
constexpr int MANY = 4;
