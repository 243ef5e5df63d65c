// Writes the schedule of packed rows (schedule.cuh) for the kernel behind it, whose tiles have ROWS rows or
// keys.
// Needs: fused/schedule.cuh.
//
// Every block counts the tiles of all sequences, a thread to a sequence, and writes its part of the entries.
// The order is that of sequences, of their heads, and of the tiles of a head.

#if LAYOUT == LAYOUT_PACKED

// Exclusive prefix sum over the threads of the block; `total` is the sum of all.
__device__ inline unsigned long long sum_before(unsigned long long own, unsigned long long &total) {
    __shared__ unsigned long long of_warps[WARPS];
    unsigned long long sum = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned long long before = __shfl_up_sync(~0u, sum, distance);
        if (threadIdx.x % 32 >= distance) sum += before;
    }
    if (threadIdx.x % 32 == 31) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    unsigned long long before = 0;
    total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp < threadIdx.x / 32) before += of_warps[warp];
        total += of_warps[warp];
    }
    return before + sum - own;
}

// `entries` are all that a grid has blocks for: starts in device memory may make more, of which none is
// written behind them. `tiles_of` gives the number of tiles of a sequence for each head, `size_of` how long
// such a tile takes, and `first_of` and `key_head_of` what an entry says of a tile and a head.
template <class TilesOf, class SizeOf, class FirstOf, class KeyHeadOf>
__device__ inline void write_schedule(const Parameters &p, unsigned entries, unsigned heads, TilesOf tiles_of,
                                      SizeOf size_of, FirstOf first_of, KeyHeadOf key_head_of) {
    // Of as many sequences as threads: each as it is, and in the order of the schedule how many entries come
    // before it, its tiles, and which of these sequences it is.
    __shared__ Sequence sequences[THREADS];
    __shared__ int sizes[THREADS], order[THREADS], tiles[THREADS];
    __shared__ unsigned begins[THREADS];
    const unsigned first_index = blockIdx.x * THREADS + threadIdx.x, step = gridDim.x * THREADS;
    unsigned done = 0;
    for (long long chunk = 0; chunk <= p.batch && done < entries; chunk += THREADS) {
        const long long b = chunk + threadIdx.x;
        int own_tiles = 0, own_size = 0;
        if (b <= p.batch) {
            const Sequence sequence = sequence_of(p, b);
            sequences[threadIdx.x] = sequence;
            own_tiles = tiles_of(sequence);
            own_size = size_of(sequence);
        }
        // Longest first, where all sequences are of one chunk. Threads without a sequence keep their places.
        int place = threadIdx.x;
        if (p.batch < THREADS) {
            sizes[threadIdx.x] = own_size;
            __syncthreads();
            if (b <= p.batch) {
                place = 0;
                for (int other = 0; other <= (int)p.batch; ++other)
                    place += sizes[other] > own_size || (sizes[other] == own_size && other < threadIdx.x);
            }
        }
        order[place] = threadIdx.x;
        tiles[place] = own_tiles;
        __syncthreads();
        unsigned long long total;
        const unsigned long long before = sum_before(tiles[threadIdx.x], total);
        begins[threadIdx.x] = (unsigned)min(before * heads, (unsigned long long)entries - done);
        const unsigned count = (unsigned)min(total * heads, (unsigned long long)entries - done);
        __syncthreads();
        for (unsigned index = first_index; index < count; index += step) {
            // The last one that begins at or before this entry: those without tiles begin with the next one.
            int low = 0;
#pragma unroll
            for (int half = THREADS / 2; half > 0; half /= 2)
                if (begins[low + half] <= index) low += half;
            const Sequence &sequence = sequences[order[low]];
            const unsigned own = index - begins[low], count_of_tiles = (unsigned)tiles[low];
            // Tiles of a head follow each other, those of heads that share a mask or bias in turn.
            const unsigned turn = own % (unsigned)p.swizzle, of_turn = own / (unsigned)p.swizzle;
            const int head = (int)(of_turn / count_of_tiles * (unsigned)p.swizzle + turn);
            ScheduledTile entry;
            entry.batch = (int)(chunk + order[low]);
            entry.head = head;
            entry.key_head = key_head_of(head);
            entry.first = first_of((int)(of_turn % count_of_tiles), (int)count_of_tiles, head);
            entry.sequence = sequence;
            p.schedule[done + index] = entry;
        }
        done += count;
        __syncthreads();
    }
    for (unsigned index = done + first_index; index < entries; index += step) {
        ScheduledTile none{};
        none.batch = -1;
        p.schedule[index] = none;
    }
}

__device__ inline int tiles_of_rows(long long rows) { return (int)((rows + ROWS - 1) / ROWS); }

#endif

// Tiles of query rows, the last one of a head first: under causal masking it takes longest. For a kernel
// whose blocks go over several tiles, in pairs of a long and a short one.
extern "C" __global__ void __launch_bounds__(BLOCK)
    attention_schedule_query_tiles(const __grid_constant__ Parameters p) {
#if LAYOUT == LAYOUT_PACKED
    const unsigned heads = (unsigned)p.query_heads / (unsigned)p.pack_gqa;
    write_schedule(
        p, count_of_slots(p, p.query_rows, ROWS, p.pack_gqa) * heads, heads,
        [&](const Sequence &sequence) { return tiles_of_rows((long long)sequence.query_rows * p.pack_gqa); },
        [](const Sequence &sequence) { return sequence.keys; },
        [&](int tile, int count, int head) {
            return (p.forward_tiles > 0 ? tile_of_pairs(tile, count, head) : count - 1 - tile) * ROWS;
        },
        [&](int head) { return (int)((unsigned)(head * p.pack_gqa) / (unsigned)p.group); });
#endif
}

// Tiles of keys, which may be dense.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_schedule_key_tiles(const __grid_constant__ Parameters p) {
#if LAYOUT == LAYOUT_PACKED
    const unsigned heads = (unsigned)p.key_heads;
    const unsigned tiles = packs_keys(p) ? count_of_slots(p, p.key_rows, ROWS, 1)
                                         : (unsigned)tiles_of_rows(p.key_length) * (unsigned)p.batch;
    write_schedule(
        p, tiles * heads, heads, [](const Sequence &sequence) { return tiles_of_rows(sequence.key_rows); },
        [](const Sequence &sequence) { return sequence.queries; }, [](int tile, int, int) { return tile * ROWS; },
        [](int head) { return head; });
#endif
}
