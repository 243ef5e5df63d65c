// Intervals of rows or keys for cuDNN's helper kernels.
// Needs: nothing.

// The rows or keys from `first` to before `end`.
struct Interval {
    int first, end;
};

// An interval for each batch row.
struct Intervals {
    // The first and the end of each, [B, 2]; null if `first` and `end` are those of all batch rows.
    const int *of;
    int first, end;
};

__device__ inline Interval interval_of(const Intervals &intervals, long long b) {
    if (intervals.of == nullptr) return {intervals.first, intervals.end};
    return {intervals.of[2 * b], intervals.of[2 * b + 1]};
}

__device__ inline bool contains(const Interval &interval, long long position) {
    return position >= interval.first && position < interval.end;
}
