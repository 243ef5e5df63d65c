// Codes of dtypes, conversions between them, and elements of tensors whose dtype is known at run time only.
//
// Needs: nothing.
//
// No header of the toolkit is included: where these sources are compiled, at run time, there may be none.

// A function that one kernel does not use, another one does.
#pragma nv_diag_suppress 177

#define DTYPE_F64 0
#define DTYPE_F32 1
#define DTYPE_F16 2
#define DTYPE_BF16 3
// Decided at run time.
#define DTYPE_ANY 4
// Of integers alone.
#define DTYPE_I32 5
#define DTYPE_U32 6
#define DTYPE_I64 7
// Of keys and values beside queries of another dtype alone (common/float8.cuh).
#define DTYPE_F8E4M3 8
#define DTYPE_F8E5M2 9

__device__ inline float f16_to_float(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ inline float bf16_to_float(unsigned short x) { return __int_as_float((int)x << 16); }

__device__ inline unsigned short float_to_f16(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ inline unsigned short float_to_bf16(float x) {
    unsigned short y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Rounded to odd, so that rounding once more, to a half, is as rounding once.
__device__ inline float narrowed(double x) {
    const float towards_zero = __double2float_rz(x);
    const bool exact = (double)towards_zero == x || !(fabs(x) < 3.0e38);
    return exact ? (float)x : __int_as_float(__float_as_int(towards_zero) | 1);
}

__device__ inline float narrowed(float x) { return x; }

// The element at this index of a tensor of this dtype.
template <class Real>
__device__ inline Real load_as(const void *data, int dtype, long long index) {
    switch (dtype) {
        case DTYPE_F64: return (Real) static_cast<const double *>(data)[index];
        case DTYPE_F32: return static_cast<const float *>(data)[index];
        case DTYPE_F16: return f16_to_float(static_cast<const unsigned short *>(data)[index]);
        default: return bf16_to_float(static_cast<const unsigned short *>(data)[index]);
    }
}

// Rounded once, to nearest, ties to even.
template <class Real>
__device__ inline void store(void *data, int dtype, long long index, Real x) {
    switch (dtype) {
        case DTYPE_F64: static_cast<double *>(data)[index] = x; break;
        case DTYPE_F32: static_cast<float *>(data)[index] = (float)x; break;
        case DTYPE_F16: static_cast<unsigned short *>(data)[index] = float_to_f16(narrowed(x)); break;
        default: static_cast<unsigned short *>(data)[index] = float_to_bf16(narrowed(x)); break;
    }
}
