// Strides of the tensors of cuDNN's helper kernels.
// Needs: nothing.

// The strides, in elements, of a tensor whose first axes are batch row, position and head.
struct RowStrides {
    long long batch, position, head;
};

__device__ inline long long row_offset(const RowStrides &strides, long long b, long long position, long long head) {
    return b * strides.batch + position * strides.position + head * strides.head;
}
