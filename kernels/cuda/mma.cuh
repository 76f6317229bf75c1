// mma.cuh - the tensor cores' m16n8k16 product, and numbers as its operands. g = lane/4, t = lane%4:
//   A (16 rows x 16 k)   a[0]: row g, k 2t, 2t+1   a[1]: row g+8   a[2]: row g, k 2t+8, 2t+9   a[3]: row g+8
//   B (16 k x 8 columns) b[0]: k 2t, 2t+1 of column g   b[1]: k 2t+8, 2t+9
//   D (16 x 8)           d[0], d[1]: row g, columns 2t, 2t+1   d[2], d[3]: row g+8
#pragma once
#include "number.cuh"

namespace kv {

// Two floats as a word of two 16-bit ones, x low; d += A B.
#ifdef KVRUN_SIMT
template <class H> static inline uint32_t pack2(float x, float y) { return H::bits(x) | H::bits(y) << 16; }
template <class H> static inline void mma(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    simt::mma_m16n8k16(d, a, b, [](uint16_t bits) { return H::low(bits); });
}
static inline uint32_t half2_minus(uint32_t a, uint32_t b) { return pack2<F16>(F16::low(a) - F16::low(b), F16::high(a) - F16::high(b)); }
#else
template <class H> static __device__ __forceinline__ uint32_t pack2(float x, float y);
template <> __device__ __forceinline__ uint32_t pack2<F16>(float x, float y) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
    return r;
}
template <> __device__ __forceinline__ uint32_t pack2<Bf16>(float x, float y) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
    return r;
}
#define KV_MMA(kind)                                                                                                        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." kind "." kind ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class H> static __device__ __forceinline__ void mma(float *d, const uint32_t *a, uint32_t b0, uint32_t b1);
template <> __device__ __forceinline__ void mma<F16>(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) { KV_MMA("f16"); }
template <> __device__ __forceinline__ void mma<Bf16>(float *d, const uint32_t *a, uint32_t b0, uint32_t b1) { KV_MMA("bf16"); }
#undef KV_MMA
static __device__ __forceinline__ uint32_t half2_minus(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
#endif

// A operand from floats. TERMS 2: what the first rounding loses is a second operand, so that about twice the bits count. HALF: it is the
// second half of one operand instead, rows 8 to 15, so that one product does both for eight rows; their sums are added in the end.
template <class H, int TERMS, bool HALF> struct OperandA {
    static_assert(!HALF || TERMS == 2, "halves are two terms");
    static constexpr int kOperands = HALF ? 1 : TERMS;
    uint32_t a[kOperands][4];

    // i: as a[] above. HALF: rows g alone, i even.
    __device__ __forceinline__ void set(int i, float x, float y) {
        if (HALF && i % 2) return;
        a[0][i] = pack2<H>(x, y);
        if (TERMS == 2) a[kOperands - 1][HALF ? i + 1 : i] = rest_of(a[0][i], x, y);
    }
    // The second term of x and y, of which `first` is the other.
    static __device__ __forceinline__ uint32_t rest_of(uint32_t first, float x, float y) { return pack2<H>(x - H::low(first), y - H::high(first)); }
    __device__ __forceinline__ void multiply(float *d, uint32_t b0, uint32_t b1) const {
#pragma unroll
        for (int i = 0; i < kOperands; i++) mma<H>(d, a[i], b0, b1);
    }
};
// Adds the terms' sums up, where they are apart.
template <bool HALF> static __device__ __forceinline__ void add_terms(float *d) {
    if (HALF) d[0] += d[2], d[1] += d[3], d[2] = d[3] = 0;
}

// Bytes 0, 1 (2, 3) of a word as two halves, exactly: a byte in the low bits of 1024 is 1024 + byte.
static __device__ __forceinline__ uint32_t unsigned_halves(uint32_t word, bool upper) {
    return half2_minus(__byte_perm(word, 0x64646464u, upper ? 0x4342 : 0x4140), 0x64006400u);
}
static __device__ __forceinline__ uint32_t signed_halves(uint32_t word, bool upper) {
    return half2_minus(__byte_perm(word ^ 0x80808080u, 0x64646464u, upper ? 0x4342 : 0x4140), 0x64806480u);
}

// A power of two that brings numbers up to `most` near 1; 1 where there is none.
static __device__ __forceinline__ float power_near_one(float most) {
    const uint32_t exponent = __float_as_uint(most) >> 23 & 0xff;
    return exponent < 1 || exponent > 253 ? 1.f : __uint_as_float((254 - exponent) << 23);
}

}  // namespace kv
