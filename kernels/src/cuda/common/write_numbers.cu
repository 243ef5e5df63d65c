// Writes numbers that the host passes by value to places of two arrays of integers: what a step of decoding
// changes in a block table and in lengths.
// Needs: nothing.

struct WrittenNumber {
    unsigned index;
    int number;
};

// The argument of `attention_write_numbers`, of the 4 KB that a kernel's arguments may have: the first
// `counts[0]` numbers are the first array's, so many behind them the second one's.
struct WriteNumbers {
    int *to[2];
    int counts[2];
    WrittenNumber numbers[480];
};

static_assert(sizeof(WriteNumbers) == 3864, "the host's layout");

// One block.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_write_numbers(const __grid_constant__ WriteNumbers p) {
    for (int index = threadIdx.x; index < p.counts[0] + p.counts[1]; index += BLOCK)
        p.to[index < p.counts[0] ? 0 : 1][p.numbers[index].index] = p.numbers[index].number;
}
