// Integers that a call has in device memory: lengths, offsets, and the seed and offset of a dropout.
// Needs: common/dtypes.cuh.

// The address of the integer at index 0, or null where the call has none in device memory; the stride in
// elements; and DTYPE_I32, DTYPE_U32 or DTYPE_I64.
struct Integers {
    const void *data;
    long long stride;
    int dtype;
};

static_assert(sizeof(Integers) == 24, "the host's layout");

// The integer `place` elements behind the first one, sign-extended. Nothing writes to the integers while the
// kernel runs.
__device__ inline long long integer_behind(const Integers &from, long long place) {
    switch (from.dtype) {
        case DTYPE_I32: return __ldg(static_cast<const int *>(from.data) + place);
        case DTYPE_U32: return __ldg(static_cast<const unsigned *>(from.data) + place);
        default: return __ldg(static_cast<const long long *>(from.data) + place);
    }
}

__device__ inline long long integer_at(const Integers &from, long long index) {
    return integer_behind(from, index * from.stride);
}

// Those at an index and behind it. Both are asked for before either is needed.
struct TwoIntegers {
    long long first, second;
};

template <class Word>
__device__ inline TwoIntegers two_integers(const void *data, long long place, long long stride) {
    const Word *const first = static_cast<const Word *>(data) + place;
    return TwoIntegers{(long long)__ldg(first), (long long)__ldg(first + stride)};
}

__device__ inline TwoIntegers integers_at(const Integers &from, long long index) {
    const long long place = index * from.stride;
    switch (from.dtype) {
        case DTYPE_I32: return two_integers<int>(from.data, place, from.stride);
        case DTYPE_U32: return two_integers<unsigned>(from.data, place, from.stride);
        default: return two_integers<long long>(from.data, place, from.stride);
    }
}
