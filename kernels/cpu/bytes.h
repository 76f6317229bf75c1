// bytes.h - more of simd.h: bytes of sixteen words.
#pragma once
#include "lanes.h"

namespace KV_NS {

// shifted: a >> S. low_bits: a & mask. whole: words below 2^24 as floats. gather: p[index[lane]].
// interleave: even0 odd0 even1 odd1 ...
#if defined(__AVX512F__)
template <int S> static inline u32x16 shifted(u32x16 a) { return {_mm512_srli_epi32(a.v, S)}; }
static inline u32x16 low_bits(u32x16 a, uint32_t mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi32((int)mask))}; }
static inline f32x16 whole(u32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline f32x16 gather(const float *p, const int32_t *index) {
    return {_mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4)};
}
static inline void interleave(f32x16 even, f32x16 odd, f32x16 &low, f32x16 &high) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low.v = _mm512_permutex2var_ps(even.v, first, odd.v);
    high.v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd.v);
}
#elif defined(__AVX2__)
template <int S> static inline u32x16 shifted(u32x16 a) { return {_mm256_srli_epi32(a.lo, S), _mm256_srli_epi32(a.hi, S)}; }
static inline u32x16 low_bits(u32x16 a, uint32_t mask) {
    const __m256i m = _mm256_set1_epi32((int)mask);
    return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
static inline f32x16 whole(u32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
static inline f32x16 gather(const float *p, const int32_t *index) {
    return {_mm256_i32gather_ps(p, _mm256_loadu_si256((const __m256i *)index), 4),
            _mm256_i32gather_ps(p, _mm256_loadu_si256((const __m256i *)index + 1), 4)};
}
static inline void interleave_half(__m256 even, __m256 odd, f32x16 &out) {
    const __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
    out = {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
}
static inline void interleave(f32x16 even, f32x16 odd, f32x16 &low, f32x16 &high) {
    interleave_half(even.lo, odd.lo, low);
    interleave_half(even.hi, odd.hi, high);
}
#else
template <int S> static inline u32x16 shifted(u32x16 a) {
    for (int i = 0; i < 16; i++) a.v[i] >>= S;
    return a;
}
static inline u32x16 low_bits(u32x16 a, uint32_t mask) {
    for (int i = 0; i < 16; i++) a.v[i] &= mask;
    return a;
}
static inline f32x16 whole(u32x16 a) {
    f32x16 r;
    for (int i = 0; i < 16; i++) r.v[i] = (float)(int32_t)a.v[i];
    return r;
}
static inline f32x16 gather(const float *p, const int32_t *index) {
    f32x16 r;
    for (int i = 0; i < 16; i++) r.v[i] = p[index[i]];
    return r;
}
static inline void interleave(f32x16 even, f32x16 odd, f32x16 &low, f32x16 &high) {
    for (int i = 0; i < 8; i++) {
        low.v[2 * i] = even.v[i], low.v[2 * i + 1] = odd.v[i];
        high.v[2 * i] = even.v[8 + i], high.v[2 * i + 1] = odd.v[8 + i];
    }
}
#endif

}  // namespace KV_NS
