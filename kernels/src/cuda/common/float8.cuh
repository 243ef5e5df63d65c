// Numbers of 8 bits: e4m3 (e4m3fn, which has no infinities) and e5m2. Each is a number of f16, and so of
// every wider dtype: what they are widened to is exact.
// Needs: common/dtypes.cuh.

// The two low bytes, or the two high ones, of four as f16 in one register, the first in the low half. NaN
// stays NaN.
template <int FORMAT, bool HIGH>
__device__ inline unsigned f16_pair_of_bytes(unsigned four) {
    static_assert(FORMAT == DTYPE_F8E4M3 || FORMAT == DTYPE_F8E5M2, "the formats of 8 bits");
    if constexpr (FORMAT == DTYPE_F8E5M2) {
        // The upper byte of f16.
        return __byte_perm(four, 0, HIGH ? 0x3424 : 0x1404);
    } else {
#if __CUDA_ARCH__ >= 890
        // Halves of a register are operands of the instruction.
        unsigned both;
        if constexpr (HIGH)
            asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high; }"
                : "=r"(both)
                : "r"(four));
        else
            asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }"
                : "=r"(both)
                : "r"(four));
        return both;
#else
        const unsigned two = __byte_perm(four, 0, HIGH ? 0x3424 : 0x1404);
        const unsigned magnitudes = two & 0x7f007f00;
        // With exponent and fraction in the places of f16's, a byte counts 2^8 times less: f16's bias is 15,
        // e4m3's is 7. Subnormal numbers of the one are those of the other.
        unsigned both;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(both) : "r"(magnitudes >> 1), "r"(0x5c005c00));
        // 0x7f is NaN: a carry into the bit of the sign tells, and fills the 15 bits below it.
        const unsigned nan = (magnitudes + 0x01000100) & 0x80008000;
        return both | (nan - (nan >> 15)) | (two & 0x80008000);
#endif
    }
}

// One byte.
template <int FORMAT>
__device__ inline float byte_to_float(unsigned char byte) {
    return f16_to_float((unsigned short)f16_pair_of_bytes<FORMAT, false>(byte));
}
