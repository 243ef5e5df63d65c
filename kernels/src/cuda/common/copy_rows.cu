// Copies rows of two tensors, as the keys and values of tokens, to other rows: what is appended to a cache,
// and pages that a sequence gets a copy of. The host passes the places by value, so nothing there has to
// outlive the call.
// Needs: nothing.

// Rows `[heads, width]`, those of the source `inner` to an index of its first axis, of any strides in
// elements; those of the target lie one behind the other.
struct CopiedTensor {
    const char *from;
    char *to;
    long long from_stride[4];
    long long width;
};

// So many neighbouring rows, counted over the first two axes of either tensor.
struct RowRun {
    long long from, to, count;
};

// The argument of `attention_copy_rows`, of the 4 KB that a kernel's arguments may have.
struct CopyRows {
    CopiedTensor tensors[2];
    long long heads, inner;
    int element_size, count;
    RowRun runs[150];
};

static_assert(sizeof(CopiedTensor) == 56 && sizeof(CopyRows) == 3736, "the host's layout");

struct alignas(16) Chunk16 {
    unsigned words[4];
};

// Rows of `words` words, which `address_of` finds in the source, and which lie one behind the other in the
// target.
template <class Word, class AddressOf>
__device__ inline void copy_run(const CopyRows &p, const RowRun &run, long long words, char *to, AddressOf address_of) {
    const long long all = run.count * words, step = (long long)gridDim.y * BLOCK;
    Word *const target = reinterpret_cast<Word *>(to) + run.to * words;
    for (long long index = blockIdx.y * (long long)BLOCK + threadIdx.x; index < all; index += step) {
        const long long row = run.from + index / words;
        target[index] = *reinterpret_cast<const Word *>(address_of(row / p.inner, row % p.inner, index % words));
    }
}

// Element by element, of any strides.
template <class Word>
__device__ inline void copy_elements(const CopyRows &p, const RowRun &run, const CopiedTensor &tensor) {
    copy_run<Word>(p, run, p.heads * tensor.width, tensor.to, [&](long long outer, long long inner, long long word) {
        const long long *const stride = tensor.from_stride;
        const long long place = outer * stride[0] + inner * stride[1] + word / tensor.width * stride[2] +
                                word % tensor.width * stride[3];
        return tensor.from + place * (long long)sizeof(Word);
    });
}

// blockIdx.x is a run, blockIdx.y a part of it, and blockIdx.z a tensor.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_copy_rows(const __grid_constant__ CopyRows p) {
    const RowRun run = p.runs[blockIdx.x];
    const CopiedTensor &tensor = p.tensors[blockIdx.z];
    const long long *const stride = tensor.from_stride;
    const long long row_bytes = p.heads * tensor.width * p.element_size;
    const long long outer_bytes = stride[0] * p.element_size, inner_bytes = stride[1] * p.element_size;
    const bool in_one_piece = stride[3] == 1 && (stride[2] == tensor.width || p.heads == 1);
    const unsigned long long addresses = (unsigned long long)tensor.from | (unsigned long long)tensor.to;
    if (in_one_piece && ((addresses | row_bytes | outer_bytes | inner_bytes) & 15) == 0) {
        copy_run<Chunk16>(p, run, row_bytes / 16, tensor.to, [&](long long outer, long long inner, long long word) {
            return tensor.from + outer * outer_bytes + inner * inner_bytes + word * 16;
        });
        return;
    }
    switch (p.element_size) {
        case 1: copy_elements<unsigned char>(p, run, tensor); break;
        case 2: copy_elements<unsigned short>(p, run, tensor); break;
        case 4: copy_elements<unsigned>(p, run, tensor); break;
        default: copy_elements<unsigned long long>(p, run, tensor); break;
    }
}
