// lanes.h - more of simd.h: comparisons, neighbouring lanes, parts of a vector.
#pragma once
#include "simd.h"

namespace KV_NS {

// select_less: a < b ? x : y lane by lane (y where one is NaN). splat_pair: p[0], p[1], p[0], p[1], ...
// add_neighbours: a0+a1, a2+a3, ..., b0+b1, ... even_lanes: a and b with every odd lane zero, NaN or not.
#if defined(__AVX512F__)
static inline f32x16 select_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
static inline f32x16 splat_pair(const float *p) {
    double d;
    memcpy(&d, p, 8);
    return {_mm512_castpd_ps(_mm512_set1_pd(d))};
}
static inline f32x16 add_neighbours(f32x16 a, f32x16 b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_add_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
}
static inline f32x16 even_lanes(f32x16 a) { return {_mm512_maskz_mov_ps(0x5555, a.v)}; }
#elif defined(__AVX2__)
static inline f32x16 select_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
    return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
static inline f32x16 splat_pair(const float *p) {
    double d;
    memcpy(&d, p, 8);
    __m256 pair = _mm256_castpd_ps(_mm256_set1_pd(d));
    return {pair, pair};
}
static inline __m256 add_neighbours_of(__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(a, b)), 0xd8));
}
static inline f32x16 add_neighbours(f32x16 a, f32x16 b) {
    return {add_neighbours_of(a.lo, a.hi), add_neighbours_of(b.lo, b.hi)};
}
static inline f32x16 even_lanes(f32x16 a) {
    __m256 zero = _mm256_setzero_ps();
    return {_mm256_blend_ps(zero, a.lo, 0x55), _mm256_blend_ps(zero, a.hi, 0x55)};
}
#else
static inline f32x16 select_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
    f32x16 r;
    for (int i = 0; i < 16; i++) r.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
    return r;
}
static inline f32x16 splat_pair(const float *p) {
    f32x16 r;
    for (int i = 0; i < 16; i++) r.v[i] = p[i % 2];
    return r;
}
static inline f32x16 add_neighbours(f32x16 a, f32x16 b) {
    f32x16 r;
    for (int i = 0; i < 8; i++) {
        r.v[i] = a.v[2 * i] + a.v[2 * i + 1];
        r.v[8 + i] = b.v[2 * i] + b.v[2 * i + 1];
    }
    return r;
}
static inline f32x16 even_lanes(f32x16 a) {
    f32x16 r;
    for (int i = 0; i < 16; i++) r.v[i] = i % 2 ? 0 : a.v[i];
    return r;
}
#endif

// Loads and stores of the first n < 16 lanes; the others read as zero.
static inline f32x16 load_part(const float *p, int n) {
    float t[16] = {};
    for (int i = 0; i < n; i++) t[i] = p[i];
    return load(t);
}
static inline void store_part(float *p, f32x16 a, int n) {
    float t[16];
    store(t, a);
    for (int i = 0; i < n; i++) p[i] = t[i];
}

}  // namespace KV_NS
