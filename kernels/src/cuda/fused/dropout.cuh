// Dropout (docs/semantics.md, "Dropout"): one call of Philox draws for eight keys of a row.
// Needs: common/philox.cuh, fused/row.cuh.

__device__ inline bool drops(const Parameters &p) { return HAS_DROPOUT && p.drop_threshold > 0; }

// What a call draws its bits from.
struct DropoutWords {
    unsigned key[2], offset;
};

// The words of the call, from device memory where they are there. Kernels read them once, before their loops.
__device__ inline DropoutWords dropout_words(const Parameters &p) {
    DropoutWords words{};
    if constexpr (HAS_DROPOUT) {
        words = DropoutWords{{p.drop_key[0], p.drop_key[1]}, p.drop_offset};
        if (p.dropout_seed.data) {
            const unsigned long long seed = (unsigned long long)integer_at(p.dropout_seed, 0);
            words.key[0] = (unsigned)seed;
            words.key[1] = (unsigned)(seed >> 32);
        }
        if (p.dropout_offset.data) words.offset = (unsigned)integer_at(p.dropout_offset, 0);
    }
    return words;
}

// Bit i says whether key 8 * block + i of the row is kept.
__device__ inline unsigned kept_of_block(const Parameters &p, const DropoutWords &dropout, unsigned batch_head,
                                         unsigned t, unsigned block) {
    // Computed anew for each block: out of the loops, the keys of ten rounds would take twenty registers.
    const unsigned key0 = computed_here(dropout.key[0]), key1 = computed_here(dropout.key[1]);
    const uint4 words = philox4x32_10(make_uint4(block, t, batch_head, dropout.offset), key0, key1);
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
    unsigned kept = 0;
#pragma unroll
    for (int lane = 0; lane < 8; ++lane) {
        const unsigned drawn = lane % 2 ? word[lane / 2] >> 16 : word[lane / 2] & 0xffff;
        kept |= (drawn >= p.drop_threshold ? 1u : 0u) << lane;
    }
    return kept;
}

__device__ inline bool is_kept(const Parameters &p, const DropoutWords &dropout, const Row &row, int key) {
    return kept_of_block(p, dropout, row.batch_head, (unsigned)row.t, (unsigned)key / 8) >> (key % 8) & 1;
}

// What kept probabilities are multiplied by.
__device__ inline real keep_scale(const Parameters &p) { return HAS_DROPOUT ? (real)p.keep_scale : real(1); }
