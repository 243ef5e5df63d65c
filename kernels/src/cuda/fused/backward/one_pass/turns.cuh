// The order in which blocks add to the gradient of queries in the kernel for all three gradients. Each block
// has a tile of keys, and adds its part of the gradient of every tile of query rows that see any of them. It
// does so in its turn: first the block with the last keys that the rows see, last the one with the first. So
// every sum has one order, and the same bits each time.
//
// Blocks take their tiles of keys in the order of tickets, those of a head with the last keys first, and go
// over query rows from the first to the last. A block waits only for blocks with earlier tickets, which run or
// have ended: none waits for a block that has not begun, whatever else the device runs. And a block seldom
// waits: under causal masking it reaches a row after the blocks with later keys, which begin with later rows.
//
// All blocks must read the same lengths and offsets. What changes those in device memory while the kernel runs
// may leave a turn that no block takes, and a wait that does not end.
// Needs: fused/backward/keys/scheduler.cuh.

// A tile of query rows of a head, and the turn of a tile of keys in its sum.
struct QueryTurn {
    // The tile's place among all (`query_slots`).
    long long slot;
    // Blocks that add to it before, and whether none does so behind.
    int before;
    bool is_last;
};

// Tiles of query rows of a head and batch row, or of packed sequences of a head.
__device__ inline long long query_slots(const Parameters &p) {
#if LAYOUT == LAYOUT_DENSE
    return (p.query_length + ROWS - 1) / ROWS;
#else
    return count_of_slots(p, p.query_rows, ROWS, 1);
#endif
}

// The place of the tile of query rows from `t` on. Starts of packed sequences that fall, which no call has
// but memory of the device may hold, give two tiles one place: blocks then wait for fewer others than there
// are, never for one that does not come.
__device__ inline long long query_slot(const Parameters &p, const Sequence &sequence, long long b, long long n, int t) {
#if LAYOUT == LAYOUT_DENSE
    return (b * p.query_heads + n) * query_slots(p) + t / ROWS;
#else
    return n * query_slots(p) + (unsigned)sequence.first_query / (unsigned)ROWS + b + t / ROWS;
#endif
}

// The turn of a tile of keys in the sum of query rows from `t` on, some of which see some of its keys.
__device__ inline QueryTurn query_turn(const Parameters &p, const KeyTile &tile, long long n, int t) {
    const int last_t = min(t + ROWS, tile.sequence.queries) - 1;
    const unsigned own = (unsigned)tile.first / KEYS, lowest = (unsigned)first_key(tile.sequence, t) / KEYS,
                   highest = (unsigned)(end_key(tile.sequence, last_t) - 1) / KEYS;
    return QueryTurn{query_slot(p, tile.sequence, tile.b, n, t), (int)(highest - own), own == lowest};
}

// The same without divisions, for a loop over query rows; and whether every row of a tile of them sees every
// key of the tile. All are counts of rows, or rows, of 32 bits.
struct TurnsOfTile {
    // Rows from `all_from` to before `all_to` see all keys of the tile.
    int all_from, all_to;
    // Tiles of rows from `last_from` on see no keys before it, those that end behind `before_from` keys behind
    // it.
    int last_from, before_from, queries;

    __device__ inline explicit TurnsOfTile(const KeyTile &tile) {
        const SequenceRows &sequence = tile.sequence;
        const auto row = [&](long long t) { return between(t, 0, sequence.queries); };
        const bool whole = tile.first + KEYS <= tile.end;
        queries = sequence.queries;
        all_from = whole ? row(tile.end - sequence.high) : sequence.queries;
        all_to = row(tile.first - sequence.low + 1);
        last_from = tile.first == 0 ? 0 : row(tile.first - sequence.low);
        before_from = tile.first + KEYS < sequence.keys ? row(tile.first + KEYS - sequence.high + 1) : sequence.queries;
    }
    __device__ inline bool sees_all(int t) const { return t >= all_from && t + ROWS <= all_to; }
    __device__ inline bool is_last(int t) const { return t >= last_from; }
    __device__ inline bool is_first(int t) const { return min(t + ROWS, queries) <= before_from; }
};

// Whether no block has the tile of query rows from `t` on: its gradient is 0.
__device__ inline bool has_no_turn(const Sequence &sequence, int t) {
    const int last_t = min(t + ROWS, sequence.queries) - 1;
    return t >= sequence.queries || first_key(sequence, t) >= end_key(sequence, last_t);
}

// Scratch that attention_prepare_gradients sets to 0, a number per tile of query rows each: blocks that have
// added to its sum; and behind those whether the sum is not finite, and behind all the next ticket.
__device__ inline unsigned *blocks_done(const Parameters &p) { return p.query_turns; }
__device__ inline unsigned *non_finite_tiles(const Parameters &p) { return p.query_turns + p.query_tiles; }
__device__ inline unsigned *next_ticket(const Parameters &p) { return p.query_turns + 2 * p.query_tiles; }
