// simd.h - sixteen float lanes, the same on every instruction set: one AVX-512 register, two AVX2 ones, or an array.
// Compiled once per instruction set inside namespace KV_NS; everything is static, so that the linker never
// merges code of two instruction sets.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include "half.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define KV_INLINE inline __attribute__((always_inline))

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
// The same for 32 f16.
static inline void load_f16_pairs(const uint16_t *p, f32x16 &even, f32x16 &odd) {
    __m512i x = _mm512_loadu_si512(p);
    even.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x));
    odd.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}
// Sixteen 32-bit words: 4-bit digit S of each, less ZERO, as a float, and signed byte I of each times 2^24.
struct u32x16 { __m512i v; };
static inline u32x16 load_words(const void *p) { return {_mm512_loadu_si512(p)}; }
template <int S, int ZERO = 0> static inline f32x16 nibble(u32x16 a) {
    const __m512 value = _mm512_setr_ps(0 - ZERO, 1 - ZERO, 2 - ZERO, 3 - ZERO, 4 - ZERO, 5 - ZERO, 6 - ZERO, 7 - ZERO,
                                        8 - ZERO, 9 - ZERO, 10 - ZERO, 11 - ZERO, 12 - ZERO, 13 - ZERO, 14 - ZERO, 15 - ZERO);
    return {_mm512_permutexvar_ps(S ? _mm512_srli_epi32(a.v, 4 * S) : a.v, value)};  // looks at the low 4 bits alone
}
template <int I> static inline f32x16 byte_2p24(u32x16 a) {
    const __m128i top = _mm_setr_epi8(-1, -1, -1, I, -1, -1, -1, 4 + I, -1, -1, -1, 8 + I, -1, -1, -1, 12 + I);
    return {_mm512_cvtepi32_ps(_mm512_shuffle_epi8(a.v, _mm512_broadcast_i32x4(top)))};
}
// 2^n where t = n + 1.5*2^23: n then lies in the low bits of t.
static inline f32x16 exp2_magic(f32x16 t) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(t.v), _mm512_set1_epi32(127)), 23))};
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
static inline void load_f16_pairs(const uint16_t *p, f32x16 &even, f32x16 &odd) {
    // Per 16 halves: even members into the low, odd ones into the high half of each 128 bits, then those together.
    const __m256i part = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
                                          0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m256i a = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)p), part), 0xd8);
    __m256i b = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(p + 16)), part), 0xd8);
    even = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_castsi256_si128(b))};
    odd = {_mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(b, 1))};
}
struct u32x16 { __m256i lo, hi; };
static inline u32x16 load_words(const void *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
template <int S, int ZERO> static inline __m256 nibble(__m256i a) {
    if (S) a = _mm256_srli_epi32(a, 4 * S);
    if (S < 7) a = _mm256_and_si256(a, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(ZERO ? _mm256_sub_epi32(a, _mm256_set1_epi32(ZERO)) : a);
}
template <int S, int ZERO = 0> static inline f32x16 nibble(u32x16 a) { return {nibble<S, ZERO>(a.lo), nibble<S, ZERO>(a.hi)}; }
template <int I> static inline f32x16 byte_2p24(u32x16 a) {
    const __m256i top = _mm256_setr_epi8(-1, -1, -1, I, -1, -1, -1, 4 + I, -1, -1, -1, 8 + I, -1, -1, -1, 12 + I,
                                         -1, -1, -1, I, -1, -1, -1, 4 + I, -1, -1, -1, 8 + I, -1, -1, -1, 12 + I);
    return {_mm256_cvtepi32_ps(_mm256_shuffle_epi8(a.lo, top)), _mm256_cvtepi32_ps(_mm256_shuffle_epi8(a.hi, top))};
}
static inline __m256 exp2_magic(__m256 t) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(127)), 23));
}
static inline f32x16 exp2_magic(f32x16 t) { return {exp2_magic(t.lo), exp2_magic(t.hi)}; }

#else

struct f32x16 { float v[16]; };
static inline float bits_to_f32(uint32_t b) { return kv::bits_f32(b); }
#define KV_EACH(expr) f32x16 r; for (int i = 0; i < 16; i++) r.v[i] = (expr); return r
static inline f32x16 load(const float *p) { KV_EACH(p[i]); }
static inline void store(float *p, f32x16 a) { for (int i = 0; i < 16; i++) p[i] = a.v[i]; }
static inline f32x16 splat(float a) { KV_EACH(a); }
static inline f32x16 operator+(f32x16 a, f32x16 b) { KV_EACH(a.v[i] + b.v[i]); }
static inline f32x16 operator-(f32x16 a, f32x16 b) { KV_EACH(a.v[i] - b.v[i]); }
static inline f32x16 operator*(f32x16 a, f32x16 b) { KV_EACH(a.v[i] * b.v[i]); }
static inline f32x16 operator/(f32x16 a, f32x16 b) { KV_EACH(a.v[i] / b.v[i]); }
static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { KV_EACH(a.v[i] * b.v[i] + c.v[i]); }
static inline f32x16 max(f32x16 a, f32x16 b) { KV_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }  // NaN: b, as x86 has it
static inline f32x16 min(f32x16 a, f32x16 b) { KV_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline float sum(f32x16 a) { float s = 0; for (int i = 0; i < 16; i++) s += a.v[i]; return s; }
static inline float max(f32x16 a) { float m = a.v[0]; for (int i = 1; i < 16; i++) m = a.v[i] > m ? a.v[i] : m; return m; }
static inline void load_bf16_pairs(const uint16_t *p, f32x16 &even, f32x16 &odd) {
    for (int i = 0; i < 16; i++) {
        even.v[i] = kv::bf16_to_f32(p[2 * i]);
        odd.v[i] = kv::bf16_to_f32(p[2 * i + 1]);
    }
}
static inline f32x16 load_f16(const uint16_t *p) { KV_EACH(kv::f16_to_f32(p[i])); }
static inline void load_f16_pairs(const uint16_t *p, f32x16 &even, f32x16 &odd) {
    for (int i = 0; i < 16; i++) {
        even.v[i] = kv::f16_to_f32(p[2 * i]);
        odd.v[i] = kv::f16_to_f32(p[2 * i + 1]);
    }
}
struct u32x16 { uint32_t v[16]; };
static inline u32x16 load_words(const void *p) { u32x16 a; memcpy(a.v, p, 64); return a; }
template <int S, int ZERO = 0> static inline f32x16 nibble(u32x16 a) { KV_EACH((float)((int32_t)(a.v[i] >> 4 * S & 15) - ZERO)); }
template <int I> static inline f32x16 byte_2p24(u32x16 a) { KV_EACH((float)(int32_t)(a.v[i] << (24 - 8 * I) & 0xff000000)); }
static inline f32x16 exp2_magic(f32x16 t) { KV_EACH(kv::bits_f32((kv::f32_bits(t.v[i]) + 127) << 23)); }
#undef KV_EACH

#endif

// e^x = s*(1 + p) with s a power of two; x is clamped to [-87.3, 88.3], NaN stays NaN in p.
// Polynomial and splitting of ln 2 from Cephes expf.
static inline void exp_parts(f32x16 x, f32x16 &s, f32x16 &p) {
    x = max(splat(-87.3f), min(splat(88.3f), x));
    const f32x16 magic = splat(12582912.f);
    f32x16 t = fma(x, splat(1.44269504f), magic), n = t - magic;
    f32x16 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    f32x16 q = splat(1.9875691500e-4f);
    q = fma(q, r, splat(1.3981999507e-3f));
    q = fma(q, r, splat(8.3334519073e-3f));
    q = fma(q, r, splat(4.1665795894e-2f));
    q = fma(q, r, splat(1.6666665459e-1f));
    q = fma(q, r, splat(5.0000001201e-1f));
    p = fma(q, r * r, r);
    s = exp2_magic(t);
}
static inline f32x16 exp(f32x16 x) {  // 1 ulp or two
    f32x16 s, p;
    exp_parts(x, s, p);
    return fma(s, p, s);
}
static inline f32x16 tanh(f32x16 x) {  // (e^2x - 1) / (e^2x + 1), exact near zero too
    f32x16 s, p;
    exp_parts(min(splat(40.f), x + x), s, p);  // tanh(20) is 1 in float32; no overflow in the quotient
    f32x16 m = fma(s, p, s - splat(1.f));
    return m / (m + splat(2.f));
}

}  // namespace KV_NS
