// rotate.h - the orthonormal Walsh-Hadamard transform of a head, to the bit as page.h states it.
#pragma once
#include "lanes.h"

namespace KV_NS {

// Butterflies of stride H inside 16 lanes: a + b below, a - b above.
#if defined(__AVX512F__)
template <int H> static inline f32x16 butterfly(f32x16 x) {
    const __m512 y = H == 1 ? _mm512_permute_ps(x.v, 0xb1) : H == 2 ? _mm512_permute_ps(x.v, 0x4e)
                   : H == 4 ? _mm512_shuffle_f32x4(x.v, x.v, 0xb1) : _mm512_shuffle_f32x4(x.v, x.v, 0x4e);
    const __mmask16 upper = H == 1 ? 0xaaaa : H == 2 ? 0xcccc : H == 4 ? 0xf0f0 : 0xff00;
    return {_mm512_mask_sub_ps(_mm512_add_ps(x.v, y), upper, y, x.v)};
}
#elif defined(__AVX2__)
template <int H> static inline __m256 butterfly(__m256 x) {
    const __m256 y = H == 1 ? _mm256_permute_ps(x, 0xb1) : H == 2 ? _mm256_permute_ps(x, 0x4e) : _mm256_permute2f128_ps(x, x, 1);
    return _mm256_blend_ps(_mm256_add_ps(x, y), _mm256_sub_ps(y, x), H == 1 ? 0xaa : H == 2 ? 0xcc : 0xf0);
}
template <int H> static inline f32x16 butterfly(f32x16 x) {
    if constexpr (H == 8) return {_mm256_add_ps(x.lo, x.hi), _mm256_sub_ps(x.lo, x.hi)};
    else return {butterfly<H>(x.lo), butterfly<H>(x.hi)};
}
#else
template <int H> static inline f32x16 butterfly(f32x16 x) {
    f32x16 r;
    for (int i = 0; i < 16; i++) r.v[i] = i & H ? x.v[i ^ H] - x.v[i] : x.v[i] + x.v[i ^ H];
    return r;
}
#endif

// x[dim], dim a multiple of 16, in place; its own inverse.
static inline void rotate(float *x, int dim) {
    const int block = dim & -dim;
    const float norm = (float)(1 / sqrt((double)block));
    for (float *end = x + dim; x < end; x += block) {
        const f32x16 scale = splat(block == 16 ? norm : 1);
        for (int i = 0; i < block; i += 16) store(x + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(x + i))))) * scale);
        for (int h = 16; h < block; h *= 2) {
            const f32x16 scale = splat(2 * h == block ? norm : 1);
            for (int i = 0; i < block; i += 2 * h)
                for (int j = i; j < i + h; j += 16) {
                    const f32x16 a = load(x + j), b = load(x + j + h);
                    store(x + j, (a + b) * scale);
                    store(x + j + h, (a - b) * scale);
                }
        }
    }
}

}  // namespace KV_NS
