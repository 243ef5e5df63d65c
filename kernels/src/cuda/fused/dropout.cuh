// Dropout (docs/semantics.md, "Dropout"): one call of Philox draws for eight keys of a row.
// Needs: common/philox.cuh, fused/row.cuh.

// Bit i says whether key 8 * block + i of the row is kept.
__device__ inline unsigned kept_of_block(const Parameters &p, unsigned batch_head, unsigned t, unsigned block) {
    const uint4 words = philox4x32_10(make_uint4(block, t, batch_head, p.drop_offset), p.drop_key[0], p.drop_key[1]);
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
    unsigned kept = 0;
#pragma unroll
    for (int lane = 0; lane < 8; ++lane) {
        const unsigned drawn = lane % 2 ? word[lane / 2] >> 16 : word[lane / 2] & 0xffff;
        kept |= (drawn >= p.drop_threshold ? 1u : 0u) << lane;
    }
    return kept;
}

__device__ inline bool is_kept(const Parameters &p, const Row &row, int key) {
    return kept_of_block(p, row.batch_head, (unsigned)row.t, (unsigned)key / 8) >> (key % 8) & 1;
}

__device__ inline bool drops(const Parameters &p) { return HAS_DROPOUT && p.drop_threshold > 0; }

// What kept probabilities are multiplied by.
__device__ inline real keep_scale(const Parameters &p) { return HAS_DROPOUT ? (real)p.keep_scale : real(1); }
