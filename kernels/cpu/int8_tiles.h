// int8_tiles.h - floats as 16-bit integers of two signed bytes each, and products of bytes on AMX tiles. The configuration is
// that of all AMX kernels: eight tiles of 16 rows of 64 bytes.
#pragma once
#include "quant_pages.h"

namespace KV_NS {

static const int CHUNK = 64;               // what one tile sums over: channels of K, tokens of V

// x[n] = factor*(256*high + low), n a multiple of 16; returns the factor. What is not finite makes the factor so.
static inline float split_bytes(const float *x, int n, int8_t *high, int8_t *low) {
    __m512i bits = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 16)        // as bits, absolute values are ordered as numbers and NaN is the highest
        bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi32(0x7fffffff)));
    const float top = kv::bits_f32(_mm512_reduce_max_epu32(bits));
    const __m512 up = _mm512_set1_ps(top > 0 ? 32512.f / top : 0.f);
    for (int i = 0; i < n; i += 16) {
        const __m512i y = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), up));
        const __m512i h = _mm512_srai_epi32(_mm512_add_epi32(y, _mm512_set1_epi32(128)), 8);
        _mm_storeu_si128((__m128i *)(high + i), _mm512_cvtepi32_epi8(h));
        _mm_storeu_si128((__m128i *)(low + i), _mm512_cvtepi32_epi8(_mm512_sub_epi32(y, _mm512_slli_epi32(h, 8))));
    }
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
    const char *data;
    int64_t bytes;

    void fetch(int64_t from, int64_t to) const {
        if (!data) return;
        if (bytes <= 9216)
            for (int64_t i = from; i < to; i += 64) __builtin_prefetch(data + i, 0, 3);
        else
            for (int64_t i = from; i < to; i += 64) __builtin_prefetch(data + i, 0, 2);
    }
};

}  // namespace KV_NS
