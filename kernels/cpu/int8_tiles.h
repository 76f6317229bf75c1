// int8_tiles.h - floats as 16-bit integers of two signed bytes each, and products of bytes on AMX tiles. Scores are
// tiles 0 and 1 of queries in 4 and 5, sums of V tile 2 of probabilities in 3, and codes are in 6 and 7 (tile_config.h).
#pragma once
#include "quant_pages.h"
#include "tile_config.h"

namespace KV_NS {

// Signed 16-bit numbers in two registers, of four vectors of 32 bits whose lanes packing mixed, as bytes in order.
static inline __m512i bytes_in_order(__m512i a, __m512i b, bool sign) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, sign ? _mm512_packs_epi16(a, b) : _mm512_packus_epi16(a, b));
}

// x[64] = factor*(256*high + low), both signed; returns the factor. What is not finite makes the factor so.
static inline float split_bytes(const float *x, int8_t *high, int8_t *low) {
    __m512i bits = _mm512_setzero_si512();
    for (int i = 0; i < 64; i += 16)       // as bits, absolute values are ordered as numbers and NaN is the highest
        bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff)));
    const float top = kv::bits_f32(_mm512_reduce_max_epu32(bits));
    const __m512 up = _mm512_set1_ps(top > 0 ? 32512.f / top : 0.f);
    __m512i h[2], l[2];
    for (int i = 0; i < 2; i++, x += 32) {
        const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), up));
        const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), up)), y = _mm512_packs_epi32(a, b);
        h[i] = _mm512_srai_epi16(_mm512_add_epi16(y, _mm512_set1_epi16(128)), 8);
        l[i] = _mm512_sub_epi16(y, _mm512_slli_epi16(h[i], 8));
    }
    _mm512_storeu_si512(high, bytes_in_order(h[0], h[1], true));
    _mm512_storeu_si512(low, bytes_in_order(l[0], l[1], true));
    return top * (1.f / 32512.f);
}

// Two rows of a product, of high and of low bytes, as one row of floats.
static inline f32x16 join(const int32_t *c) {
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(c), 8), _mm512_loadu_si512(c + 16)))};
}

// c += a b for tiles 0 += 4 * 6 and 1 += 5 * 6; a is signed, b unsigned or signed.
template <bool UNSIGNED> static inline void multiply_bytes_0() {
    if constexpr (UNSIGNED) _tile_dpbsud(0, 4, 6);
    else _tile_dpbssd(0, 4, 6);
}
template <bool UNSIGNED> static inline void multiply_bytes_1() {
    if constexpr (UNSIGNED) _tile_dpbsud(1, 5, 6);
    else _tile_dpbssd(1, 5, 6);
}

// What is read after this; asked for piece by piece meanwhile, into the first-level cache when little enough to stay there.
struct Next {
    const char *data = nullptr;
    int64_t bytes = 0;

    void fetch(int64_t from, int64_t to) const {
        if (!data) return;
        if (bytes <= 9216)
            for (int64_t i = from; i < to; i += 64) __builtin_prefetch(data + i, 0, 3);
        else
            for (int64_t i = from; i < to; i += 64) __builtin_prefetch(data + i, 0, 2);
    }
};

}  // namespace KV_NS
