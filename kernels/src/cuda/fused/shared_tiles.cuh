// Tiles of operands in shared memory, and the copies that fill them (cp.async).
// Needs: fused/sequence.cuh.
//
// Eight neighbouring rows begin in different banks. Three layouts do that: rows of DEPTH elements padded by
// 16 bytes; for wgmma, panels of 64 columns with the 128-byte swizzle (the 16 bytes at i of a row stand at i
// ^ row % 8); for split products, rows without padding whose columns are swizzled by `turn_of_row`, so that
// eight threads read from different banks whether they read two rows in four pieces, or four even or odd rows
// in two.

constexpr int CHUNK = 16 / sizeof(element);

struct alignas(16) Chunk {
    element of[CHUNK];
};

__device__ inline Chunk chunk_at(const element *from) { return *reinterpret_cast<const Chunk *>(from); }

template <int DEPTH>
__device__ constexpr int row_stride() {
    return DEPTH + (SPLITS ? 0 : CHUNK);
}

// The swizzle of a row's columns: columns are exclusive-ored with it. Linear in the row: turn(a ^ b) =
// turn(a) ^ turn(b).
__device__ constexpr int turn_of_row(int row) { return SPLITS ? (((row ^ row >> 2) & 1) << 2 | (row & 2)) * CHUNK : 0; }

// The threads that fill a tile: all of the block, or of the producers one of LOADERS parts. FORWARD and
// ONE_PASS are defined in the sources of the forward kernel and of the one for all three gradients.
#if (defined(FORWARD) && !EIGHT_BIT) || defined(ONE_PASS)
#define LOADERS 4
#else
#define LOADERS 2
#endif
constexpr int LOADING_THREADS = PRODUCER_THREADS > 0 ? PRODUCER_THREADS / LOADERS : THREADS;
__device__ inline int loading_thread() {
    return PRODUCER_THREADS > 0 ? (threadIdx.x - THREADS) % LOADING_THREADS : threadIdx.x;
}

// Bytes of a row of a panel.
constexpr int PANEL_BYTES = 128;

// Elements of a tile.
template <int HEIGHT, int DEPTH>
__device__ constexpr int tile_size() {
    return HEIGHT * (ON_WARPGROUPS ? DEPTH : row_stride<DEPTH>());
}

// The index in a tile of this row and column, a multiple of CHUNK.
template <int HEIGHT, int DEPTH>
__device__ inline int place_of(int row, int column) {
    if constexpr (ON_WARPGROUPS) return (column / 64 * HEIGHT + row) * 64 + (column % 64 ^ row % 8 * 8);
    return row * row_stride<DEPTH>() + (column ^ turn_of_row(row));
}

__device__ inline unsigned shared_address(const void *pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

// Where products read bytes, a copy asks for the aligned 256 bytes around it in L2: rows of two heads of 128,
// whose blocks are neighbours (index_of_block).
#if READS_BYTES
#define L2_PREFETCH ".L2::256B"
#else
#define L2_PREFETCH ""
#endif

// Copies 16 bytes asynchronously, or writes 16 zero bytes where `there` is false.
__device__ inline void cp_async_16(unsigned to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global" L2_PREFETCH " [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
                 : "memory");
}

// Copies one number asynchronously.
__device__ inline void cp_async_number(real *to, const real *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "n"(sizeof(real))
                 : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Makes what this thread has written to shared memory visible to products on warpgroups and to bulk copies, once
// a barrier has ordered it.
__device__ inline void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits until at most this many of the groups that were committed last are in flight.
template <int GROUPS>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#if ON_WARPGROUPS
    fence_shared();
#endif
}

// Rows of a tile in their own order.
struct InOrder {
    static __device__ constexpr int of(int row) { return row; }
};

// Fills HEIGHT rows of a tile, in the order `Order`. `row_at` gives the address of a row, or null for a row
// of zeros; columns from `width` on are zeros too. `there` is any address that may be read.
template <int HEIGHT, int DEPTH, class Order = InOrder, class RowAt>
__device__ inline void load_tile(element *tile, RowAt row_at, int width, long long inner, bool aligned,
                                 const char *there) {
    constexpr int CHUNKS = DEPTH / CHUNK;
    for (int index = loading_thread(); index < HEIGHT * CHUNKS; index += LOADING_THREADS) {
        const int row = index / CHUNKS, column = index % CHUNKS * CHUNK;
        element *to = tile + place_of<HEIGHT, DEPTH>(Order::of(row), column);
        const element *from = row_at(row);
        if (aligned) {
            const bool inside = from && column < width;
            cp_async_16(shared_address(to), inside ? (const void *)(from + column) : there, inside);
        } else {
#pragma unroll
            for (int i = 0; i < CHUNK; ++i)
                to[i] = from && column + i < width ? from[(column + i) * inner] : element(0);
        }
    }
}

// Rows `first` to `first + HEIGHT` of a tensor [B, length, heads, ..], `width` columns from `first_column`
// on; those from `end` on are zeros.
template <int HEIGHT, int DEPTH, class Order = InOrder>
__device__ inline void load_rows(element *tile, const Tensor &tensor, long long b, long long head, long long first,
                                 long long end, int width, bool aligned, int first_column = 0) {
    const element *origin = at(tensor, b, first, head) + first_column * tensor.stride[3];
    const long long step = tensor.stride[1];
#if ON_WARPGROUPS
    if (aligned) {
        // Eight threads copy a row of a panel; a thread's rows are a power of two apart.
        constexpr int ROWS_AT_ONCE = LOADING_THREADS / 8;
        static_assert(HEIGHT % ROWS_AT_ONCE == 0 && (ROWS_AT_ONCE & ROWS_AT_ONCE - 1) == 0,
                      "every thread has as many rows");
        const int row = loading_thread() / 8, column = loading_thread() % 8 * CHUNK;
        const unsigned to = shared_address(tile + place_of<HEIGHT, DEPTH>(Order::of(row), column));
        const char *from = reinterpret_cast<const char *>(origin + row * step + column);
        const long long jump = step * (ROWS_AT_ONCE * (int)sizeof(element));
        const int rows = (int)min(end - first, (long long)HEIGHT) - row;
#pragma unroll
        for (int i = 0; i < HEIGHT / ROWS_AT_ONCE; ++i) {
            // Shares no bit with the thread's first row, so the swizzle of their sum is that of each,
            // exclusive-ored.
            const int below = Order::of(i * ROWS_AT_ONCE);
#pragma unroll
            for (int panel = 0; panel < DEPTH / 64; ++panel)
                cp_async_16((to ^ below % 8 * 16) + (panel * HEIGHT + below) * PANEL_BYTES, from + panel * PANEL_BYTES,
                            i * ROWS_AT_ONCE < rows && panel * 64 + column < width);
            from += jump;
        }
        return;
    }
#else
    constexpr int CHUNKS = DEPTH / CHUNK;
    if constexpr (LOADING_THREADS % CHUNKS == 0 && (CHUNKS & CHUNKS - 1) == 0 &&
                  HEIGHT % (LOADING_THREADS / CHUNKS) == 0) {
        // Each thread copies one column of rows that are a power of two apart.
        if (aligned) {
            constexpr int ROWS_AT_ONCE = LOADING_THREADS / CHUNKS;
            const int row = loading_thread() / CHUNKS, column = loading_thread() % CHUNKS * CHUNK;
            const unsigned to = shared_address(tile + place_of<HEIGHT, DEPTH>(Order::of(row), column));
            const char *from = reinterpret_cast<const char *>(origin + row * step + column);
            const long long jump = step * (ROWS_AT_ONCE * (int)sizeof(element));
            const int rows = column < width ? (int)min(end - first, (long long)HEIGHT) - row : 0;
#pragma unroll
            for (int i = 0; i < HEIGHT / ROWS_AT_ONCE; ++i) {
                const int below = Order::of(i * ROWS_AT_ONCE);
                // Past the last row the address is invalid, and not read.
                cp_async_16((to ^ turn_of_row(below) * (int)sizeof(element)) +
                                below * row_stride<DEPTH>() * (int)sizeof(element),
                            from, i * ROWS_AT_ONCE < rows);
                from += jump;
            }
            return;
        }
    }
#endif
    load_tile<HEIGHT, DEPTH, Order>(
        tile, [=](int row) { return first + row < end ? origin + row * step : (const element *)nullptr; }, width,
        tensor.stride[3], aligned, tensor.data);
}

// The same of a sequence's query rows, and of its keys where these are not in pages.
template <int HEIGHT, int DEPTH>
__device__ inline void load_query_rows(element *tile, const Tensor &tensor, const Sequence &sequence, long long b,
                                       long long head, long long first, long long end, int width, bool aligned) {
    load_rows<HEIGHT, DEPTH>(tile, tensor, b, head, query_row(sequence, first), query_row(sequence, end), width,
                             aligned);
}
template <int HEIGHT, int DEPTH, class Order>
__device__ inline void load_key_rows(element *tile, const Tensor &tensor, const Sequence &sequence, long long b,
                                     long long head, long long first, long long end, int width, bool aligned,
                                     int first_column = 0) {
    load_rows<HEIGHT, DEPTH, Order>(tile, tensor, b, head, key_row(sequence, first), key_row(sequence, end), width,
                                    aligned, first_column);
}

// Stores two neighbouring columns of a row of results.
__device__ inline void store_pair(element *row, int column, int width, long long inner, bool aligned, real low,
                                  real high) {
#if HALVES
    if (aligned && column + 1 < width) {
        *reinterpret_cast<unsigned *>(row + column) = packed(low, high);
        return;
    }
#endif
    if (column < width) row[column * inner] = rounded(low);
    if (column + 1 < width) row[(column + 1) * inner] = rounded(high);
}
