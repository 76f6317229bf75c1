// number.cuh - 16-bit floats, small integers as floats, 128-bit loads.
#pragma once
#ifdef KVRUN_SIMT
#include "../simt/simt.h"
#else
#include <cstdint>
#include <cuda_fp16.h>
#endif

namespace kv {

static __device__ __forceinline__ float bf16_to_f32(uint32_t bits) { return __uint_as_float(bits << 16); }
static __device__ __forceinline__ float f16_to_f32(uint32_t bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }
static __device__ __forceinline__ uint32_t f16_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
// To nearest, ties to even; a NaN stays one.
static __device__ __forceinline__ uint32_t bf16_bits(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// The halves of a word: two numbers stored side by side.
struct Bf16 {
    static __device__ __forceinline__ float low(uint32_t word) { return __uint_as_float(word << 16); }
    static __device__ __forceinline__ float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
    static __device__ __forceinline__ uint32_t bits(float x) { return bf16_bits(x); }
};
struct F16 {
    static __device__ __forceinline__ float low(uint32_t word) { return f16_to_f32(word & 0xffff); }
    static __device__ __forceinline__ float high(uint32_t word) { return f16_to_f32(word >> 16); }
    static __device__ __forceinline__ uint32_t bits(float x) { return f16_bits(x); }
};

// Byte I of a word, less ZERO, as a float. A byte in the low bits of 2^23 is 2^23 + byte: cheaper than a conversion.
template <int I, int ZERO = 0> static __device__ __forceinline__ float unsigned_byte(uint32_t word) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7540 | I)) - (8388608.f + ZERO);
}
// A nibble c in bits 3 to 6 of byte I of a word, all others zero, as 8 + c/2, which takes no subtraction: for sums from which 8 times the
// sum of the factors is taken once.
template <int I> static __device__ __forceinline__ float nibble_from_8(uint32_t word) {
    return __uint_as_float(__byte_perm(word, 0x41000000u, 0x7044 | I << 8));
}
template <int I> static __device__ __forceinline__ float signed_byte(uint32_t word) { return unsigned_byte<I, 128>(word ^ 0x80808080u); }

static __device__ __forceinline__ uint4 load16(const void *p) { return *(const uint4 *)p; }
static __device__ __forceinline__ uint2 load8(const void *p) { return *(const uint2 *)p; }
template <int I> static __device__ __forceinline__ uint32_t word_of(const uint4 &v) {
    return I == 0 ? v.x : I == 1 ? v.y : I == 2 ? v.z : v.w;
}

}  // namespace kv
