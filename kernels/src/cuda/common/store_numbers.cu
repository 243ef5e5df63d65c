// Stores numbers that the host passes by value, for the kernels behind this one on the stream. A captured
// graph keeps the arguments of its kernels, so it stores the numbers that it was captured with, and nothing
// on the host has to outlive the call.
// Needs: nothing.

// The argument of `attention_store_numbers`: 2 KB of numbers, of the 4 KB that a kernel's arguments may have.
struct StoreNumbers {
    long long *to;
    // How many of them there are.
    long long count;
    long long numbers[256];
};

static_assert(sizeof(StoreNumbers) == 2064, "the host's layout");

// One block.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_store_numbers(const StoreNumbers p) {
    for (int index = threadIdx.x; index < p.count; index += BLOCK) p.to[index] = p.numbers[index];
}
