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

// The tile of this index, in the order of the grid: of a head, the first tile first. IN_TURN is for the kernel
// whose blocks add to the gradient of queries in turn (one_pass/turns.cuh): the last tile first, and tiles of
// query rows that are the same for every tile of keys.
template <bool IN_TURN = false>
__device__ inline KeyTile key_tile(const Parameters &p, unsigned index) {
    KeyTile tile;
#if LAYOUT == LAYOUT_DENSE
    const unsigned key_tiles = (unsigned)((p.key_length + KEYS - 1) / KEYS);
    const TileIndex place = tile_of_block(p, index, key_tiles, (unsigned)p.key_heads);
    tile.first = (IN_TURN ? (int)key_tiles - 1 - place.tile : place.tile) * KEYS;
    tile.key_head = place.head, tile.b = place.batch;
    tile.sequence = sequence_of(p, tile.b);
#else
    const ScheduledTile place = scheduled_tile(p, index);
    tile.key_head = place.head, tile.b = place.batch;
    tile.sequence = place.sequence;
    tile.first = place.first;
    if (IN_TURN) tile.first = (tile.sequence.key_rows + KEYS - 1) / KEYS * KEYS - KEYS - place.first;
#endif
    tile.end = min(tile.first + KEYS, tile.sequence.keys);
    tile.from = tile.to = 0;
    if (tile.first < tile.end) {
        tile.from = between(tile.first - tile.sequence.high + 1, 0, tile.sequence.queries);
        tile.to = between(tile.end - tile.sequence.low, 0, tile.sequence.queries);
    }
    if (IN_TURN) tile.from = tile.from < tile.to ? tile.from / ROWS * ROWS : tile.to;
    const int row_tiles = tile.from < tile.to ? (tile.to - tile.from + ROWS - 1) / ROWS : 0;
    tile.steps = row_tiles * p.group;
    return tile;
}
