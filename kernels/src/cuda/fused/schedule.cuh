// The schedule of packed rows: a list with an entry for each tile of each head, which a kernel in front
// (schedule.cu) writes, so that a block reads where its rows are in one load in the place of a search. The
// tiles of the longest sequence come first, and entries without a tile last, whose blocks end at once.
// Needs: fused/sequence.cuh.

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
