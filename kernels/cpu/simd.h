// simd.h - sixteen float lanes, the same on every instruction set: one AVX-512 register, two AVX2 ones, or an array.
// Compiled once per instruction set inside namespace KV_NS; everything is static, so that the linker never
// merges code of two instruction sets.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace KV_NS {

#if defined(__AVX512F__)

struct f32x16 { __m512 v; };
static inline f32x16 load(const float *p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float *p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
static inline f32x16 splat(float a) { return {_mm512_set1_ps(a)}; }
static inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a*b + c
static inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline float sum(f32x16 a) { return _mm512_reduce_add_ps(a.v); }
static inline float max(f32x16 a) { return _mm512_reduce_max_ps(a.v); }
// 32 bf16 at p, as pairs side by side: the 16 first and the 16 second members.
static inline void load_bf16_pairs(const uint16_t *p, f32x16 &even, f32x16 &odd) {
    __m512i x = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
}
static inline f32x16 load_f16(const uint16_t *p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))};
}

#elif defined(__AVX2__)

struct f32x16 { __m256 lo, hi; };
static inline f32x16 load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float *p, f32x16 a) { _mm256_storeu_ps(p, a.lo); _mm256_storeu_ps(p + 8, a.hi); }
static inline f32x16 splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
static inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
static inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
static inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
static inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
static inline f32x16 max(f32x16 a, f32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
static inline f32x16 min(f32x16 a, f32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
static inline float sum(f32x16 a) {
    __m256 s = _mm256_add_ps(a.lo, a.hi);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
static inline float max(f32x16 a) {
    __m256 s = _mm256_max_ps(a.lo, a.hi);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
static inline void load_bf16_pairs(const uint16_t *p, f32x16 &even, f32x16 &odd) {
    __m256i a = _mm256_loadu_si256((const __m256i *)p), b = _mm256_loadu_si256((const __m256i *)(p + 16));
    __m256i high = _mm256_set1_epi32((int)0xffff0000);
    even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
    odd = {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))};
}
static inline f32x16 load_f16(const uint16_t *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

#else

struct f32x16 { float v[16]; };
#define KV_EACH(expr) f32x16 r; for (int i = 0; i < 16; i++) r.v[i] = (expr); return r
static inline f32x16 load(const float *p) { KV_EACH(p[i]); }
static inline void store(float *p, f32x16 a) { for (int i = 0; i < 16; i++) p[i] = a.v[i]; }
static inline f32x16 splat(float a) { KV_EACH(a); }
static inline f32x16 operator+(f32x16 a, f32x16 b) { KV_EACH(a.v[i] + b.v[i]); }
static inline f32x16 operator-(f32x16 a, f32x16 b) { KV_EACH(a.v[i] - b.v[i]); }
static inline f32x16 operator*(f32x16 a, f32x16 b) { KV_EACH(a.v[i] * b.v[i]); }
static inline f32x16 operator/(f32x16 a, f32x16 b) { KV_EACH(a.v[i] / b.v[i]); }
static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { KV_EACH(a.v[i] * b.v[i] + c.v[i]); }
static inline f32x16 max(f32x16 a, f32x16 b) { KV_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline f32x16 min(f32x16 a, f32x16 b) { KV_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline float sum(f32x16 a) { float s = 0; for (int i = 0; i < 16; i++) s += a.v[i]; return s; }
static inline float max(f32x16 a) { float m = a.v[0]; for (int i = 1; i < 16; i++) m = a.v[i] > m ? a.v[i] : m; return m; }
static inline float bits_to_f32(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
static inline void load_bf16_pairs(const uint16_t *p, f32x16 &even, f32x16 &odd) {
    for (int i = 0; i < 16; i++) {
        even.v[i] = bits_to_f32((uint32_t)p[2 * i] << 16);
        odd.v[i] = bits_to_f32((uint32_t)p[2 * i + 1] << 16);
    }
}
static inline float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, mag = (uint32_t)(h & 0x7fff) << 13;
    if ((h & 0x7c00) == 0x7c00) return bits_to_f32(sign | 0x7f800000u | mag);
    return bits_to_f32(sign | 0) + (sign ? -1.f : 1.f) * (bits_to_f32(mag) * bits_to_f32(0x77800000u));  // * 2^112
}
static inline f32x16 load_f16(const uint16_t *p) { KV_EACH(f16_to_f32(p[i])); }
#undef KV_EACH

#endif

}  // namespace KV_NS
