// Tiles of 8-bit keys and values: bytes are copied as they are (cp.async), and widened to the dtype of
// queries into the tile that products read.
// Needs: fused/forward/scheduler.cuh, fused/shared_tiles.cuh, fused/fragments.cuh, fused/mma/fma.cuh,
// common/float8.cuh.
//
// Each thread widens the bytes that it copied, so no barrier stands between the two, and copies of the next
// tile are in flight while this one is computed.

#if EIGHT_BIT

// Bytes that a thread copies at once, and the copies of a tile.
constexpr int BYTES = 16;
template <int DEPTH>
__device__ constexpr int copies_of_tile() {
    return KEYS * DEPTH / BYTES;
}
template <int DEPTH>
__device__ constexpr int copies_of_thread() {
    return (copies_of_tile<DEPTH>() + LOADING_THREADS - 1) / LOADING_THREADS;
}

// Where the bytes of a tile are between their copy and their conversion.
template <int DEPTH>
struct Staged {
    uint4 of[copies_of_tile<DEPTH>()];
};

// The row and the first column of a copy. Where rows are long enough, eight threads have four pieces of two
// neighbouring rows, whose elements are in different banks of the tile.
struct CopyPlace {
    int row, column;
};
template <int DEPTH>
__device__ inline CopyPlace place_of_copy(int index) {
    constexpr int COPIES = DEPTH / BYTES, QUARTETS = COPIES / 4;
    if constexpr (COPIES % 4 == 0)
        return CopyPlace{index / 8 / QUARTETS * 2 + index / 4 % 2, (index / 8 % QUARTETS * 4 + index % 4) * BYTES};
    else
        return CopyPlace{index / COPIES, index % COPIES * BYTES};
}

// Whether a thread's copies have one column and rows that are a power of two apart, of which a warp asks for
// those in the same 32 at once.
template <int DEPTH>
__device__ constexpr int rows_at_once() {
    return LOADING_THREADS / (DEPTH / BYTES);
}
template <int DEPTH>
__device__ constexpr bool is_regular() {
    return DEPTH % 64 == 0 && LOADING_THREADS % (2 * (DEPTH / BYTES)) == 0 && rows_at_once<DEPTH>() <= 32 &&
           KEYS % rows_at_once<DEPTH>() == 0;
}

// Where values stand among bytes that products read: copies are exclusive-ored with this, so that threads
// that read eight rows apart read from different banks. Keys, and what is widened, stand in the order of
// copies.
template <bool SWIZZLES>
__device__ constexpr int turn_of_copy(int row) {
    return SWIZZLES ? row / 8 % 4 * 2 : 0;
}

// Begins to copy a tile's rows where they are not aligned, or not regular. `row_at` gives the address of a
// row, or null for a row of zeros; columns from `width` on are zeros too. `there` is any address that may be
// read.
template <int DEPTH, bool SWIZZLES, class RowAt>
__device__ inline void stage_tile(Staged<DEPTH> &staged, RowAt row_at, int width, long long inner, bool aligned,
                                  const char *there) {
    constexpr int COPIES = copies_of_tile<DEPTH>();
#pragma unroll 1
    for (int index = loading_thread(); index < COPIES; index += LOADING_THREADS) {
        const CopyPlace place = place_of_copy<DEPTH>(index);
        const cached *const from = row_at(place.row);
        const int to = index ^ turn_of_copy<SWIZZLES>(place.row);
        if (aligned) {
            const bool inside = from && place.column < width;
            cp_async_16(shared_address(&staged.of[to]), inside ? (const void *)(from + place.column) : there, inside);
            continue;
        }
        unsigned words[BYTES / 4] = {};
#pragma unroll
        for (int i = 0; i < BYTES; ++i)
            if (from && place.column + i < width)
                words[i / 4] |= (unsigned)from[(place.column + i) * inner] << (8 * (i % 4));
        staged.of[to] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

// Begins to copy the keys, or the values, from `first` on that rows of the tile see, whose pages are given:
// `width` columns from `first_column` on. Others are zeros.
template <int DEPTH, bool SWIZZLES>
__device__ inline void stage_rows(const Parameters &p, Staged<DEPTH> &staged, const Tensor &tensor,
                                  const ForwardTile &tile, const KeyPages &pages, int first, int width, bool aligned,
                                  int first_column) {
    const int end = tile.to;
    const int own_thread = loading_thread();
    const CopyPlace own = place_of_copy<DEPTH>(own_thread);
    const unsigned to = shared_address(&staged.of[own_thread]);
    const int rows = own.column < width ? min(end - first, KEYS) - own.row : 0;
#if LAYOUT == LAYOUT_PAGED
    const cached *const origin = cached_at(tensor, 0, 0, tile.key_head) + first_column * tensor.stride[3];
    if constexpr (is_regular<DEPTH>()) {
        if (aligned && has_short_offsets(p, tensor)) {
            const RowOffsets offsets = offsets_of(p, tensor, pages, first);
#pragma unroll
            for (int i = 0; i < copies_of_thread<DEPTH>(); ++i) {
                const int below = i * rows_at_once<DEPTH>();
                // Past the last row the address is invalid, and not read.
                cp_async_16((to ^ turn_of_copy<SWIZZLES>(below) * BYTES) + i * LOADING_THREADS * BYTES,
                            origin + offsets.of(own.row + below, below / 32) + own.column, below < rows);
            }
            return;
        }
    }
    stage_tile<DEPTH, SWIZZLES>(
        staged,
        [&](int row) {
            const unsigned key = (unsigned)(first + row);
            if (first + row >= end) return (const cached *)nullptr;
            return cached_at(tensor, page_of(p, tile.b, key), key % (unsigned)p.page_size, tile.key_head) +
                   first_column * tensor.stride[3];
        },
        width, tensor.stride[3], aligned, tensor.data);
#else
    const cached *const origin =
        cached_at(tensor, tile.b, key_row(tile.sequence, first), tile.key_head) + first_column * tensor.stride[3];
    const long long step = tensor.stride[1];
    if constexpr (is_regular<DEPTH>()) {
        if (aligned) {
            const cached *from = origin + own.row * step + own.column;
            const long long jump = step * rows_at_once<DEPTH>();
#pragma unroll
            for (int i = 0; i < copies_of_thread<DEPTH>(); ++i) {
                // Past the last row the address is invalid, and not read.
                const int below = i * rows_at_once<DEPTH>();
                cp_async_16((to ^ turn_of_copy<SWIZZLES>(below) * BYTES) + i * LOADING_THREADS * BYTES, from,
                            below < rows);
                from += jump;
            }
            return;
        }
    }
    stage_tile<DEPTH, SWIZZLES>(
        staged, [=](int row) { return first + row < end ? origin + row * step : (const cached *)nullptr; }, width,
        tensor.stride[3], aligned, tensor.data);
#endif
}

// The elements that eight, four or two of 16 bytes are widened to, which are 16 bytes again: number `piece`
// of them.
#if HALVES
__device__ inline unsigned pair_of_f16(unsigned both) {
#if DTYPE == DTYPE_F16
    return both;
#else
    return packed(f16_to_float((unsigned short)both), f16_to_float((unsigned short)(both >> 16)));
#endif
}
__device__ inline uint4 widened_piece(const unsigned (&words)[BYTES / 4], int piece) {
    const unsigned low = words[2 * piece], high = words[2 * piece + 1];
    return make_uint4(
        pair_of_f16(f16_pair_of_bytes<EIGHT_BIT, false>(low)), pair_of_f16(f16_pair_of_bytes<EIGHT_BIT, true>(low)),
        pair_of_f16(f16_pair_of_bytes<EIGHT_BIT, false>(high)), pair_of_f16(f16_pair_of_bytes<EIGHT_BIT, true>(high)));
}
#elif DTYPE == DTYPE_F32
__device__ inline uint4 widened_piece(const unsigned (&words)[BYTES / 4], int piece) {
    const unsigned low = f16_pair_of_bytes<EIGHT_BIT, false>(words[piece]),
                   high = f16_pair_of_bytes<EIGHT_BIT, true>(words[piece]);
    const auto bits = [](unsigned half) { return __float_as_uint(f16_to_float((unsigned short)half)); };
    return make_uint4(bits(low), bits(low >> 16), bits(high), bits(high >> 16));
}
#else
__device__ inline uint4 widened_piece(const unsigned (&words)[BYTES / 4], int piece) {
    const unsigned both = piece % 2 ? f16_pair_of_bytes<EIGHT_BIT, true>(words[piece / 2])
                                    : f16_pair_of_bytes<EIGHT_BIT, false>(words[piece / 2]);
    const double low = f16_to_float((unsigned short)both), high = f16_to_float((unsigned short)(both >> 16));
    return make_uint4(__double2loint(low), __double2hiint(low), __double2loint(high), __double2hiint(high));
}
#endif

__device__ inline void store_piece(unsigned to, const uint4 &piece) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(piece.x), "r"(piece.y), "r"(piece.z),
                 "r"(piece.w)
                 : "memory");
}

// Widens what this thread has copied, once its copies are done (`cp_async_wait`).
template <int DEPTH>
__device__ inline void widen_tile(const Staged<DEPTH> &staged, element *tile) {
    constexpr int COPIES = copies_of_tile<DEPTH>(), PIECES = BYTES / CHUNK;
    const int own_thread = loading_thread();
    if constexpr (is_regular<DEPTH>()) {
        const CopyPlace own = place_of_copy<DEPTH>(own_thread);
        const unsigned to = shared_address(tile + place_of<KEYS, DEPTH>(KeysAcross::of(own.row), own.column));
#pragma unroll
        for (int i = 0; i < copies_of_thread<DEPTH>(); ++i) {
            const uint4 bytes = staged.of[i * LOADING_THREADS + own_thread];
            const unsigned words[BYTES / 4] = {bytes.x, bytes.y, bytes.z, bytes.w};
            // Shares no bit with the thread's first row, so the swizzle of their sum is that of each,
            // exclusive-ored.
            const int below = KeysAcross::of(i * rows_at_once<DEPTH>());
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
#if ON_WARPGROUPS
                const unsigned place = (to ^ below % 8 * 16 ^ piece * 16) + below * PANEL_BYTES;
#elif SPLITS
                const unsigned place = (to ^ turn_of_row(below) * (int)sizeof(element) ^ piece * 16) +
                                       below * row_stride<DEPTH>() * (int)sizeof(element);
#else
                const unsigned place = to + piece * 16 + below * row_stride<DEPTH>() * (int)sizeof(element);
#endif
                store_piece(place, widened_piece(words, piece));
            }
        }
    } else {
#pragma unroll 1
        for (int index = own_thread; index < COPIES; index += LOADING_THREADS) {
            const CopyPlace place = place_of_copy<DEPTH>(index);
            const uint4 bytes = staged.of[index];
            const unsigned words[BYTES / 4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece)
                store_piece(shared_address(
                                tile + place_of<KEYS, DEPTH>(KeysAcross::of(place.row), place.column + piece * CHUNK)),
                            widened_piece(words, piece));
        }
    }
}

#endif
