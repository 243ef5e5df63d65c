// What a block of the kernel for the gradient of queries works on: a tile of query rows of a head, and the
// keys that they see.
// Needs: fused/schedule.cuh, fused/backward/gradients.cuh.

struct QueryTile {
    long long b, n, key_head;
    Sequence sequence;
    int first_t;
    // The keys that any row of the tile sees, and those that all of its rows see.
    int from, to, all_from, all_to;
};

// The tile of this block, the last one of a head first: under causal masking it takes longest.
__device__ inline QueryTile query_tile_of_block(const Parameters &p) {
    QueryTile tile;
#if LAYOUT == LAYOUT_DENSE
    const int row_tiles = (int)((p.query_length + ROWS - 1) / ROWS);
    const TileIndex place = tile_of_block(p, blockIdx.x, row_tiles, (unsigned)p.query_heads);
    tile.first_t = (row_tiles - 1 - place.tile) * ROWS;
    tile.n = place.head, tile.b = place.batch, tile.key_head = (unsigned)place.head / (unsigned)p.group;
    tile.sequence = sequence_of<true>(p, tile.b);
#else
    const ScheduledTile place = scheduled_tile(p, blockIdx.x);
    tile.n = place.head, tile.b = place.batch, tile.key_head = place.key_head;
    tile.sequence = place.sequence;
    tile.first_t = place.first;
#endif
    tile.from = tile.to = tile.all_from = tile.all_to = 0;
    if (tile.first_t < tile.sequence.queries) {
        const int last_t = min(tile.first_t + ROWS, tile.sequence.queries) - 1;
        tile.from = first_key(tile.sequence, tile.first_t) / KEYS * KEYS;
        tile.to = end_key(tile.sequence, last_t);
        tile.all_from = first_key(tile.sequence, last_t);
        tile.all_to = end_key(tile.sequence, tile.first_t);
    }
    return tile;
}

// The scores of the tile's rows in scratch, which attention_prepare_gradients sets to another number than 0
// for far rows alone.
__device__ inline const real *scores_of_tile(const Parameters &p, const QueryTile &tile) {
    return scores_of_states(p) + scratch_row(p, tile.sequence, tile.b, tile.n, tile.first_t);
}

__device__ inline bool is_far_row(const Parameters &p, const QueryTile &tile, int row) {
    return tile.first_t + row < tile.sequence.queries && scores_of_tile(p, tile)[row] != 0;
}
