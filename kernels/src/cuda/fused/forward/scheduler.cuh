// What a block of the forward kernel works on: a tile of query rows, a range of keys, and a slice of the
// columns of values.
// Needs: fused/schedule.cuh.

struct ForwardTile {
    long long b, first_head, key_head;
    Sequence sequence;
    // Rows of the tile are counted over the head, or over the query heads that share it with pack GQA: the
    // heads of a position, then those of the next one.
    int first_row, rows_of_head;
    // Which of the splits of the keys, and which slice of the columns of values and outputs, `width` of them
    // from `first_column` on.
    int split, slice, first_column, width;
    // The keys that any row of the tile sees, and those that all of its rows see.
    int from, to, all_from, all_to;

    __device__ inline int t_of(const Parameters &p, int row) const {
        return p.pack_gqa == 1 ? row : (int)((unsigned)row / (unsigned)p.pack_gqa);
    }
    __device__ inline long long head_of(const Parameters &p, int row) const {
        return p.pack_gqa == 1 ? first_head : first_head + (unsigned)row % (unsigned)p.pack_gqa;
    }
    __device__ inline bool is_stored(int local_row) const { return first_row + local_row < rows_of_head; }
};

// Which of a head's tiles comes at place `index` of `tiles`: on warpgroups, where a block goes over pairs of
// neighbouring places, by pairs. Elsewhere a tile has a block of its own, and the longest come first.
__device__ inline int tile_in_turn(int index, int tiles, int head) {
    return ON_WARPGROUPS ? tile_of_pairs(index, tiles, head) : tiles - 1 - index;
}

// The index at which a block finds its split, slice and tile: its own, so that splits of a head are
// neighbours, unless products read bytes. There blocks of all heads of a split are neighbours, since a row of
// a head is as a rule 128 bytes and that of the next head lies behind it, so that they read the same pages of
// DRAM at the same time. A grid has the same number of blocks for each head and split.
__device__ inline unsigned index_of_block(const Parameters &p, unsigned block) {
#if READS_BYTES && LAYOUT != LAYOUT_PACKED
    if (p.splits > 1) {
        const unsigned heads = (unsigned)p.query_heads / (unsigned)p.pack_gqa, splits = (unsigned)p.splits;
        const unsigned head = block % heads, others = block / heads;
        return (others / splits * heads + head) * splits + others % splits;
    }
#endif
    return block;
}

// The tile of this index (index_of_block).
__device__ inline ForwardTile forward_tile(const Parameters &p, unsigned index) {
    ForwardTile tile;
#if LAYOUT == LAYOUT_DENSE
    tile.rows_of_head = (int)(p.query_length * p.pack_gqa);
    const int row_tiles = (tile.rows_of_head + ROWS - 1) / ROWS;
#endif
#if LAYOUT == LAYOUT_PACKED
    // Without a division in front of the load, as a rule.
    tile.split = 0;
    if (p.splits > 1) {
        tile.split = (int)(index % (unsigned)p.splits);
        index /= (unsigned)p.splits;
    }
    tile.slice = (int)(index % SLICES);
    const ScheduledTile place = scheduled_tile(p, index / SLICES);
#else
    tile.split = (int)(index % (unsigned)p.splits);
    tile.slice = (int)(index / (unsigned)p.splits % SLICES);
#endif
#if LAYOUT == LAYOUT_DENSE
    const TileIndex place = tile_of_block(p, index / (unsigned)p.splits / SLICES, row_tiles,
                                          (unsigned)p.query_heads / (unsigned)p.pack_gqa);
#elif LAYOUT == LAYOUT_PACKED
    const Sequence &sequence = place.sequence;
    tile.rows_of_head = sequence.query_rows * p.pack_gqa;
#else
    const SequenceTile place = query_tile_of(p, ROWS, p.pack_gqa, index / (unsigned)p.splits / SLICES,
                                             (unsigned)p.query_heads / (unsigned)p.pack_gqa);
    const Sequence sequence = sequence_of(p, place.batch);
    tile.rows_of_head = sequence.query_rows * p.pack_gqa;
#endif
    tile.first_column = tile.slice * VALUE;
    tile.width = SLICES == 1 ? p.value_head_dim : min(VALUE, p.value_head_dim - tile.first_column);
#if LAYOUT == LAYOUT_DENSE
    tile.first_row = tile_in_turn(place.tile, row_tiles, place.batch * (int)p.query_heads + place.head) * ROWS;
#elif LAYOUT == LAYOUT_PACKED
    tile.first_row = place.first;
#else
    const int tiles_of_sequence = (tile.rows_of_head + ROWS - 1) / ROWS;
    tile.first_row = place.tile < 0 || place.tile >= tiles_of_sequence
                         ? tiles_of_sequence * ROWS
                         : tile_in_turn(place.tile, tiles_of_sequence, place.head) * ROWS;
#endif
    tile.first_head = (long long)place.head * p.pack_gqa;
    tile.b = place.batch;
#if LAYOUT == LAYOUT_PACKED
    tile.key_head = place.key_head;
#else
    tile.key_head = (unsigned)tile.first_head / (unsigned)p.group;
#endif
#if LAYOUT == LAYOUT_DENSE
    tile.sequence = sequence_of(p, tile.b);
#else
    tile.sequence = sequence;
#endif

    const int first_t = tile.t_of(p, tile.first_row);
    const int last_t = min(tile.t_of(p, tile.first_row + ROWS - 1), tile.sequence.queries - 1);
    tile.from = tile.to = tile.all_from = tile.all_to = 0;
    if (first_t <= last_t) {
        tile.from = first_key(tile.sequence, first_t) / KEYS * KEYS;
        tile.to = end_key(tile.sequence, last_t);
        tile.all_from = first_key(tile.sequence, last_t);
        tile.all_to = end_key(tile.sequence, first_t);
    }
#if BATCH_INVARIANT
    if (p.splits > 1) {
        const int first = tile.split * KEYS_PER_SPLIT;
        tile.from = max(tile.from, first);
        tile.to = min(tile.to, first + KEYS_PER_SPLIT);
    }
#else
    if (p.splits > 1 && tile.from < tile.to) {
        const int key_tiles = (tile.to - tile.from + KEYS - 1) / KEYS;
        const int each = (key_tiles + p.splits - 1) / p.splits;
        tile.from = (int)min((long long)tile.to, tile.from + (long long)tile.split * each * KEYS);
        tile.to = (int)min((long long)tile.to, tile.from + (long long)each * KEYS);
    }
#endif
    return tile;
}

#if ON_WARPGROUPS

// The tiles that this block goes over, in turn. A grid has at most one block for each multiprocessor, so that
// a block's producers load a tile while its consumers store the results of the one before. Where there are
// more tiles than blocks, a block takes pairs of them (tile_of_pairs), as many pairs apart as there are
// blocks.
struct TilesOfBlock {
    // Tiles before this one, and the index of this one.
    int count;
    unsigned index;

    __device__ inline TilesOfBlock(const Parameters &p) : count(0) { find(p); }
    __device__ inline bool has_tile(const Parameters &p) const { return index < (unsigned)p.forward_tiles; }
    __device__ inline void advance(const Parameters &p) {
        ++count;
        find(p);
    }

   private:
    __device__ inline void find(const Parameters &p) {
        const unsigned blocks = gridDim.x, at_once = (unsigned)p.forward_tiles > blocks ? 2 : 1;
        index = (blockIdx.x + count / at_once * blocks) * at_once + count % at_once;
    }
};

#endif
