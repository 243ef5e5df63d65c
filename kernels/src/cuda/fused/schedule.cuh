// The schedule of packed rows: a list with an entry for each tile of each head, which a kernel in front
// (schedule.cu) writes, so that a block reads where its rows are in one load in the place of a search. The
// tiles of the longest sequence come first, and entries without a tile last, whose blocks end at once.
// Needs: fused/sequence.cuh.

// Which of a head's tiles comes at place `index` of `tiles`, in an order for blocks that go over pairs of
// neighbouring places (forward/scheduler.cuh). Under causal masking the last tile takes longest: it is paired
// with the first, the last but one with the second. An odd head has the order turned around where the number
// of tiles is odd, since a pair then reaches from head to head.
__device__ inline int tile_of_pairs(int index, int tiles, int head) {
    if ((tiles & head & 1) != 0) index = tiles - 1 - index;
    return index % 2 ? index / 2 : tiles - 1 - index / 2;
}

#if LAYOUT == LAYOUT_PACKED

struct alignas(16) ScheduledTile {
    // The sequence; -1 where the entry has no tile.
    int batch;
    // The head, or the place among groups of heads that share tiles; and its key/value head.
    int head, key_head;
    // The first row of the tile, counted over the heads that share it, or its first key.
    int first;
    Sequence sequence;
};

static_assert(sizeof(ScheduledTile) == 64, "the host's size");

__device__ inline ScheduledTile scheduled_tile(const Parameters &p, unsigned index) {
    constexpr int WORDS = sizeof(ScheduledTile) / sizeof(uint4);
    union {
        uint4 words[WORDS];
        ScheduledTile tile;
    };
    const uint4 *const from = reinterpret_cast<const uint4 *>(p.schedule + index);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) words[i] = __ldg(from + i);
    return tile;
}

#endif
