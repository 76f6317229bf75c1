// int8_tiles.h - floats as 16-bit integers of two signed bytes each, for products of bytes on AMX tiles. Scores are tile 0 (and 1,
// where tiles are not low) of queries in 4 and 5 and codes in 6, sums of V tile 2 of probabilities in 3 (and 1, where all fit into one
// tile) and codes in 7 (tile_config.h).
#pragma once
#include "quant_pages.h"
#include "tile_config.h"

namespace KV_NS {

// Signed 16-bit numbers in two registers, of four vectors of 32 bits whose lanes packing mixed, as bytes in order.
static inline __m512i bytes_in_order(__m512i a, __m512i b, bool sign) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, sign ? _mm512_packs_epi16(a, b) : _mm512_packus_epi16(a, b));
}

// The largest magnitudes of x[n] and of what `bits` holds, by lanes. As bits they are ordered as numbers, and NaN is the highest.
static inline __m512i magnitudes(const float *x, int n, __m512i bits) {
    for (int i = 0; i < n; i += 16)
        bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff)));
    return bits;
}

// The sums, or the largest as numbers without a sign, of the lanes of four vectors each: a third of the steps that one by one take.
static inline __m128 sums_of_four(const f32x16 *x) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0].v, x[1].v), _mm512_unpackhi_ps(x[0].v, x[1].v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2].v, x[3].v), _mm512_unpackhi_ps(x[2].v, x[3].v));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
static inline __m128 tops_of_four(const __m512i *x) {
    const __m512i ab = _mm512_max_epu32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const __m512i cd = _mm512_max_epu32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    const __m512i all = _mm512_max_epu32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_castsi128_ps(_mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

// What makes numbers of magnitude at most `top` 16-bit integers, 0 where all are 0. What is not finite makes them anything.
static inline __m128 ups_of(__m128 top) { return _mm_maskz_div_ps(_mm_cmp_ps_mask(top, _mm_setzero_ps(), _CMP_NEQ_UQ), _mm_set1_ps(32512.f), top); }

// up*x[WIDTH] = 256*high + low, both signed bytes: the high ones at `row`, the low ones 64 on; zeros up to 64. WIDTH is 32 or 64.
template <int WIDTH> static inline void split_bytes(const float *x, float up, int8_t *row) {
    const __m512 times = _mm512_set1_ps(up);
    __m512i h[2] = {}, l[2] = {};
    for (int i = 0; i < WIDTH / 32; i++, x += 32) {
        const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), times));
        const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), times)), y = _mm512_packs_epi32(a, b);
        h[i] = _mm512_srai_epi16(_mm512_add_epi16(y, _mm512_set1_epi16(128)), 8);
        l[i] = _mm512_sub_epi16(y, _mm512_slli_epi16(h[i], 8));
    }
    _mm512_storeu_si512(row, bytes_in_order(h[0], h[1], true));
    _mm512_storeu_si512(row + 64, bytes_in_order(l[0], l[1], true));
}

// Two rows of a product, of high and of low bytes, as one row of floats.
static inline f32x16 join(const int32_t *c) {
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(c), 8), _mm512_loadu_si512(c + 16)))};
}

// What is read after this, asked for a few lines at a time: a core can have only so many lines on the way, and the memory should never
// be idle. Where K and V of a page are little, those of the next are asked for all through the work on this one; else V of the same
// page while there are scores to compute, and K of the next during the sums, so that the first-level cache holds what is in use.
struct Ahead {
    struct Stretch { const char *at; int64_t lines; } stretch[3];
    int64_t of_block, of_column, between;  // lines to ask for at each block of scores, at each 16 columns of sums, and at other places
    bool near;                             // into the first-level cache
    int i = 0;

    static bool whole_page(int64_t k_bytes, int64_t v_bytes) { return k_bytes + v_bytes <= 12288; }
    // `mine`: V of this page, null where it was asked for before.
    Ahead(const char *mine, Next next, int64_t k_bytes, int64_t v_bytes, int head_dim) {
        const bool whole = whole_page(k_bytes, v_bytes);
        const int64_t k = (k_bytes + 63) / 64, v = (v_bytes + 63) / 64;
        stretch[0] = {mine, mine ? v : 0};
        stretch[1] = {next.k, next.k ? k : 0};
        stretch[2] = {next.v, next.v && whole ? v : 0};
        near = k_bytes <= 9216;
        between = whole ? (k + v) / 40 + 1 : 0;
        of_block = whole ? (k + v) / 32 + 1 : v / 8 + 1;
        of_column = whole ? of_block : k * 16 / head_dim + 1;
    }
    void lines(int64_t n) {
        for (; i < 3 && n > 0; i++) {
            Stretch &s = stretch[i];
            const int64_t here = n < s.lines ? n : s.lines;
            const char *const end = s.at + 64 * here;
            if (near)
                for (const char *p = s.at; p < end; p += 64) __builtin_prefetch(p, 0, 3);
            else
                for (const char *p = s.at; p < end; p += 64) __builtin_prefetch(p, 0, 2);
            s = {end, s.lines - here};
            n -= here;
            if (s.lines > 0) return;
        }
    }
    void rest() { lines(INT64_MAX); }
};

}  // namespace KV_NS
