// What a block of the kernel for the gradients of keys and values works on: a tile of keys of a key/value
// head, and the query rows of all heads of its group that see any of them.
// Needs: fused/schedule.cuh.

struct KeyTile {
    long long b, key_head;
    Sequence sequence;
    // Keys from `first` to before `end`, query rows from `from` to before `to`, in `steps` tiles over all
    // heads.
    int first, end, from, to, steps;
};

__device__ inline KeyTile key_tile_of_block(const Parameters &p) {
    KeyTile tile;
#if LAYOUT == LAYOUT_DENSE
    const unsigned key_tiles = (unsigned)((p.key_length + KEYS - 1) / KEYS);
    const TileIndex place = tile_of_block(p, blockIdx.x, key_tiles, (unsigned)p.key_heads);
    tile.first = place.tile * KEYS;
    tile.key_head = place.head, tile.b = place.batch;
    tile.sequence = sequence_of(p, tile.b);
#else
    const ScheduledTile place = scheduled_tile(p, blockIdx.x);
    tile.key_head = place.head, tile.b = place.batch;
    tile.sequence = place.sequence;
    tile.first = place.first;
#endif
    tile.end = min(tile.first + KEYS, tile.sequence.keys);
    tile.from = tile.to = 0;
    if (tile.first < tile.end) {
        tile.from = between(tile.first - tile.sequence.high + 1, 0, tile.sequence.queries);
        tile.to = between(tile.end - tile.sequence.low, 0, tile.sequence.queries);
    }
    const int row_tiles = tile.from < tile.to ? (tile.to - tile.from + ROWS - 1) / ROWS : 0;
    tile.steps = row_tiles * p.group;
    return tile;
}
