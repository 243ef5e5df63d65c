// Tiles of keys and values whose rows are in pages: which page each key is in, and copies of rows that are no
// neighbours. Where keys are not in pages, all of this is empty, and tiles are loaded as others are.
// Needs: fused/forward/scheduler.cuh, fused/shared_tiles.cuh.

// The pages of a tile's keys. Each warp has all of them, those of keys i, i + 32, .. in lane i, so that a
// warp reads an entry of the table once, whatever the size of pages is. Kernels ask for those of the next
// tile before they wait for this one, since copies need an entry before they can begin.
struct KeyPages {
#if LAYOUT == LAYOUT_PAGED
    static constexpr int PER_LANE = (KEYS + 31) / 32;
#if READS_BYTES
    // The entries as they are in the table, 0 for keys that do not exist: no instruction needs an entry
    // before copies do, a tile later.
    TableEntry entry[PER_LANE];
    // Which page of its sequence a key is in, and which row of that.
    unsigned index[PER_LANE], row[PER_LANE];
#else
    int page[PER_LANE];
#endif
#endif
};

// The pages of the keys from `first` on that exist; no entry of the table is read for others.
#if LAYOUT == LAYOUT_PAGED && READS_BYTES

__device__ inline void read_entries(const Parameters &p, const ForwardTile &tile, KeyPages &pages, int first) {
#pragma unroll
    for (int i = 0; i < KeyPages::PER_LANE; ++i) {
        const int key = first + 32 * i + (int)(threadIdx.x % 32);
        const bool exists = key < tile.sequence.keys && (KEYS % 32 == 0 || threadIdx.x % 32 < KEYS);
        pages.entry[i] = exists ? entry_of(p, tile.b, pages.index[i]) : TableEntry{0, 0};
    }
}

__device__ inline KeyPages pages_of(const Parameters &p, const ForwardTile &tile, int first) {
    KeyPages pages;
#pragma unroll
    for (int i = 0; i < KeyPages::PER_LANE; ++i) {
        const unsigned key = (unsigned)first + 32 * i + threadIdx.x % 32;
        pages.index[i] = key / (unsigned)p.page_size;
        pages.row[i] = key - pages.index[i] * (unsigned)p.page_size;
    }
    read_entries(p, tile, pages, first);
    return pages;
}

// From the keys of a tile to those of the next one, without a division.
struct PageStep {
    unsigned pages, rows;
};

__device__ inline PageStep page_step(const Parameters &p) {
    const unsigned pages = (unsigned)KEYS / (unsigned)p.page_size;
    return PageStep{computed_here(pages), computed_here((unsigned)KEYS - pages * (unsigned)p.page_size)};
}

// The pages of the keys from `first` on, KEYS behind those of `pages`.
__device__ inline KeyPages next_pages(const Parameters &p, const ForwardTile &tile, const PageStep &step,
                                      KeyPages pages, int first) {
#pragma unroll
    for (int i = 0; i < KeyPages::PER_LANE; ++i) {
        pages.index[i] += step.pages;
        pages.row[i] += step.rows;
        if (pages.row[i] >= (unsigned)p.page_size) {
            pages.row[i] -= (unsigned)p.page_size;
            ++pages.index[i];
        }
    }
    read_entries(p, tile, pages, first);
    return pages;
}

#else

__device__ inline KeyPages pages_of(const Parameters &p, const ForwardTile &tile, int first) {
    KeyPages pages;
#if LAYOUT == LAYOUT_PAGED
#pragma unroll
    for (int i = 0; i < KeyPages::PER_LANE; ++i) {
        const int key = first + 32 * i + (int)(threadIdx.x % 32);
        const bool exists = key < tile.sequence.keys && (KEYS % 32 == 0 || threadIdx.x % 32 < KEYS);
        pages.page[i] = exists ? (int)page_of(p, tile.b, (unsigned)key) : 0;
    }
#endif
    return pages;
}

#if READS_BYTES
struct PageStep {};
__device__ inline PageStep page_step(const Parameters &) { return PageStep{}; }
__device__ inline KeyPages next_pages(const Parameters &, const ForwardTile &, const PageStep &, KeyPages pages, int) {
    return pages;
}
#endif

#endif

#if LAYOUT == LAYOUT_PAGED

#if READS_BYTES

// Where the rows of a tile's keys begin in a tensor whose rows are aligned, counted in 16 bytes from the
// first row of the first page: 32 bits, which threads exchange at once. Held as pages are.
struct RowOffsets {
    int offset[KeyPages::PER_LANE];

    // In elements, which are bytes; `slot` is `row / 32`.
    __device__ inline long long of(int row, int slot) const {
        return (long long)__shfl_sync(~0u, offset[slot], row % 32) * 16;
    }
};

// Whether that is enough for all rows of a tensor. No stride of an aligned tensor is below 0 then.
__device__ inline bool has_short_offsets(const Parameters &p, const Tensor &tensor) {
    const unsigned long long end = (unsigned long long)p.pages * (unsigned long long)tensor.stride[0] +
                                   (unsigned long long)p.page_size * (unsigned long long)tensor.stride[1];
    return end >> 35 == 0 && (tensor.stride[0] | tensor.stride[1]) >= 0;
}

__device__ inline RowOffsets offsets_of(const Parameters &p, const Tensor &tensor, const KeyPages &pages, int) {
    RowOffsets offsets;
#pragma unroll
    for (int i = 0; i < KeyPages::PER_LANE; ++i)
        offsets.offset[i] = page_of_entry(p, pages.entry[i]) * (int)(tensor.stride[0] >> 4) +
                            (int)pages.row[i] * (int)(tensor.stride[1] >> 4);
    return offsets;
}

#else

// Where the rows of a tile's keys begin in a tensor, counted in elements from the first row of the first
// page: held as pages are. Every thread of a warp asks together, for rows of its own.
struct RowOffsets {
    long long offset[KeyPages::PER_LANE];

    // `slot` is `row / 32`, for callers that know it when they are compiled.
    __device__ inline long long of(int row, int slot) const { return __shfl_sync(~0u, offset[slot], row % 32); }
    __device__ inline long long of(int row) const {
        long long found = of(row, 0);
#pragma unroll
        for (int slot = 1; slot < KeyPages::PER_LANE; ++slot) {
            const long long other = of(row, slot);
            if (row / 32 == slot) found = other;
        }
        return found;
    }
};

// Offsets in 64 bits are enough for every tensor.
__device__ inline bool has_short_offsets(const Parameters &, const Tensor &) { return true; }

__device__ inline RowOffsets offsets_of(const Parameters &p, const Tensor &tensor, const KeyPages &pages, int first) {
    RowOffsets offsets;
#pragma unroll
    for (int i = 0; i < KeyPages::PER_LANE; ++i) {
        const unsigned key = (unsigned)first + 32 * i + threadIdx.x % 32;
        offsets.offset[i] = pages.page[i] * tensor.stride[0] + key % (unsigned)p.page_size * tensor.stride[1];
    }
    return offsets;
}

#endif

#if !EIGHT_BIT

// Keys from `first` to before `end`, as load_rows has them. By whole warps.
template <int DEPTH>
__device__ inline void load_pages(const Parameters &p, element *tile, const Tensor &tensor, const KeyPages &pages,
                                  long long b, long long head, int first, int end, int width, bool aligned,
                                  int first_column) {
    const RowOffsets offsets = offsets_of(p, tensor, pages, first);
    const element *const origin = at(tensor, 0, 0, head) + first_column * tensor.stride[3];
#if ON_WARPGROUPS
    if (aligned) {
        // As in load_rows: eight threads copy a row of a panel.
        constexpr int ROWS_AT_ONCE = LOADING_THREADS / 8;
        static_assert(KEYS % ROWS_AT_ONCE == 0 && ROWS_AT_ONCE <= 32 && 32 % ROWS_AT_ONCE == 0, "rows of one slot");
        const int row = loading_thread() / 8, column = loading_thread() % 8 * CHUNK;
        const unsigned to = shared_address(tile + place_of<KEYS, DEPTH>(KeysAcross::of(row), column));
        const int rows = min(end - first, KEYS) - row;
#pragma unroll
        for (int i = 0; i < KEYS / ROWS_AT_ONCE; ++i) {
            const int below = KeysAcross::of(i * ROWS_AT_ONCE);
            const element *const from = origin + offsets.of(row + i * ROWS_AT_ONCE, i * ROWS_AT_ONCE / 32) + column;
#pragma unroll
            for (int panel = 0; panel < DEPTH / 64; ++panel)
                cp_async_16((to ^ below % 8 * 16) + (panel * KEYS + below) * PANEL_BYTES, from + panel * 64,
                            i * ROWS_AT_ONCE < rows && panel * 64 + column < width);
        }
        return;
    }
#else
    constexpr int CHUNKS = DEPTH / CHUNK;
    if constexpr (LOADING_THREADS % CHUNKS == 0 && (CHUNKS & CHUNKS - 1) == 0 && LOADING_THREADS / CHUNKS <= 32 &&
                  KEYS % (LOADING_THREADS / CHUNKS) == 0) {
        // As in load_rows: each thread copies one column of rows that are a power of two apart.
        if (aligned) {
            constexpr int ROWS_AT_ONCE = LOADING_THREADS / CHUNKS;
            const int row = loading_thread() / CHUNKS, column = loading_thread() % CHUNKS * CHUNK;
            const unsigned to = shared_address(tile + place_of<KEYS, DEPTH>(KeysAcross::of(row), column));
            const int rows = column < width ? min(end - first, KEYS) - row : 0;
#pragma unroll
            for (int i = 0; i < KEYS / ROWS_AT_ONCE; ++i) {
                const int below = KeysAcross::of(i * ROWS_AT_ONCE);
                const element *const from = origin + offsets.of(row + i * ROWS_AT_ONCE, i * ROWS_AT_ONCE / 32);
                cp_async_16((to ^ turn_of_row(below) * (int)sizeof(element)) +
                                below * row_stride<DEPTH>() * (int)sizeof(element),
                            from + column, i * ROWS_AT_ONCE < rows);
            }
            return;
        }
    }
#endif
    if constexpr (KEYS * (DEPTH / CHUNK) % LOADING_THREADS == 0) {
        // Every thread has as many chunks, so warps stay together.
        load_tile<KEYS, DEPTH, KeysAcross>(
            tile,
            [&](int row) {
                const long long offset = offsets.of(row);
                return first + row < end ? origin + offset : (const element *)nullptr;
            },
            width, tensor.stride[3], aligned, tensor.data);
    } else {
        load_tile<KEYS, DEPTH, KeysAcross>(
            tile,
            [&](int row) {
                const unsigned key = (unsigned)(first + row);
                if (first + row >= end) return (const element *)nullptr;
                return (const element *)(at(tensor, page_of(p, b, key), key % (unsigned)p.page_size, head) +
                                         first_column * tensor.stride[3]);
            },
            width, tensor.stride[3], aligned, tensor.data);
    }
}

#endif

#endif
