// int8_v.h - weighted sums of quantized V on AMX int8 tiles.
#pragma once
#include "int8_tiles.h"

namespace KV_NS {

// KV_Q4 of V: the nibbles of the slots [from, to), whole eights, as bytes [D/16][128/4][16][4].
static void cut_v_q4(const char *page, int d, int from, int to, char *out) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int c = 0; c < d / 16; c++)
        for (int o = from / 8; o < (to + 7) / 8; o++) {
            const __m512i x = _mm512_loadu_si512(page + (c * (KV_PAGE / 8) + o) * 64);
            char *at = out + (c * (KV_PAGE / 4) + 2 * o) * 64;
            _mm512_store_si512(at, _mm512_and_si512(x, mask));
            _mm512_store_si512(at + 64, _mm512_and_si512(_mm512_srli_epi16(x, 4), mask));
        }
}

// What the probabilities of the slots [low, high) are multiplied by, u = 32512*scale/top, and the slots' zeros; 0 elsewhere.
struct ScaledSlots {
    alignas(64) float u[KV_PAGE], zero[KV_PAGE];
    float factor;                          // top/32512; not finite where a scale is not

    template <bool Q4> void read(const uint16_t *scales, const uint16_t *zeros, int low, int high) {
        __m512i bits = _mm512_setzero_si512();
        for (int b = 0; b < KV_PAGE / 16; b++) {
            const bool some = 16 * b < high && 16 * b + 16 > low;
            const f32x16 x = some ? slots_inside(b, low, high, load_f16(scales + 16 * b), splat(0)) : splat(0);
            bits = _mm512_max_epu32(bits, _mm512_castps_si512(x.v));
            store(u + 16 * b, x);
            if (Q4) store(zero + 16 * b, some ? slots_inside(b, low, high, load_f16(zeros + 16 * b), splat(0)) : splat(0));
        }
        const float top = kv::bits_f32(_mm512_reduce_max_epu32(bits));
        const f32x16 up = splat(top > 0 ? 32512.f / top : 0.f);
        for (int b = 0; b < KV_PAGE / 16; b++) store(u + 16 * b, load(u + 16 * b) * up);
        factor = top * (1.f / 32512.f);
    }
};

// 64 products p*u, at most 32512 each, as bytes: 256*high + low.
static inline void split_products(const float *p, const float *u, int8_t *high, int8_t *low) {
    // Packing mixes fours of the four vectors; this puts them in order again.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i h[2], l[2];
    for (int i = 0; i < 2; i++, p += 32, u += 32) {
        const __m512i a = _mm512_cvtps_epi32((load(p) * load(u)).v), b = _mm512_cvtps_epi32((load(p + 16) * load(u + 16)).v);
        const __m512i y = _mm512_packs_epi32(a, b);
        h[i] = _mm512_srai_epi16(_mm512_add_epi16(y, _mm512_set1_epi16(128)), 8);
        l[i] = _mm512_sub_epi16(y, _mm512_slli_epi16(h[i], 8));
    }
    _mm512_storeu_si512(high, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(h[0], h[1])));
    _mm512_storeu_si512(low, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(l[0], l[1])));
}

// o = keep*o + weighted sums of the codes [D/16][128/4][16][4] over the slots [from, to), for the queries [first, last). `width`
// channels share a scale. Probabilities are at most 1; those of slots that a row does not see are 0 or anything.
template <bool Q4>
static void sums_int8(const Block &block, const Seen &seen, const char *codes, const uint16_t *scale, const uint16_t *zero, int width, int from,
                      int to, int first, int last, const Next &next) {
    const int d = block.head_dim, m = first / 8, m_end = (last + 7) / 8, half = from / CHUNK, half_end = (to + CHUNK - 1) / CHUNK;
    const int64_t step = next.bytes * 16 / d, s_stride = block.s_stride;
    int8_t *const p8 = block.p8;
    int32_t *const c32 = block.c32;
    float *const o_all = block.o, *const factors = block.p8_factor, *const zeros = block.p8_zero;
    const float *const keep = block.keep;
    // A row's result must not depend on the rows beside it, so where they see different slots each has its own factor.
    const bool alike = seen.low_of(block, seen.to - 1) <= from && seen.high_of(block, seen.from) >= to;
    ScaledSlots slots;
    for (int g = 0; g < d; g += width, scale += KV_PAGE, zero += KV_PAGE) {
        int row = -1;
        for (int i = first; i < last; i++) {
            if (row < 0 || (!alike && i / block.group != row)) {
                row = i / block.group;
                const int low = seen.low_of(block, row), high = seen.high_of(block, row);
                slots.read<Q4>(scale, zero, low > from ? low : from, high < to ? high : to);
            }
            const float *p = block.s + i * s_stride;
            f32x16 sum_zero = splat(0);
            for (int h = half; h < half_end; h++) {
                alignas(64) float cut[CHUNK];
                const float *p64 = p + h * CHUNK;
                if (h * CHUNK < from || h * CHUNK + CHUNK > to) {          // beyond, p may be anything
                    for (int b = 0; b < 4; b++) {
                        const int at = h * 4 + b;
                        const bool some = 16 * at < to && 16 * at + 16 > from;
                        store(cut + 16 * b, some ? slots_inside(at, from, to, load(p64 + 16 * b), splat(0)) : splat(0));
                    }
                    p64 = cut;
                }
                split_products(p64, slots.u + h * CHUNK, p8 + (2 * i) * KV_PAGE + h * CHUNK, p8 + (2 * i + 1) * KV_PAGE + h * CHUNK);
                if (Q4)
                    for (int b = 0; b < CHUNK; b += 16) sum_zero = fma(load(p64 + b), load(slots.zero + h * CHUNK + b), sum_zero);
            }
            factors[i] = slots.factor;
            if (Q4) zeros[i] = sum(sum_zero);
        }
        for (int c = g; c < g + width; c += 16) {
            next.fetch(c / 16 * step, (c / 16 + 1) * step);
            for (int t = m; t < m_end; t++) {
                asm volatile("" ::: "memory");
                _tile_zero(0);
                for (int h = half; h < half_end; h++) {
                    _tile_loadd(6, codes + c * KV_PAGE + h * 1024, 64);
                    _tile_loadd(4, p8 + t * 16 * KV_PAGE + h * CHUNK, KV_PAGE);
                    multiply_bytes_0<Q4>();
                }
                _tile_stored(0, c32 + (t - m) * 256, 64);
                asm volatile("" ::: "memory");
                const int begin = first > 8 * t ? first : 8 * t, end = last < 8 * t + 8 ? last : 8 * t + 8;
                const int32_t *sums = c32 + (t - m) * 256 + (begin - 8 * t) * 32;
                float *o = o_all + (int64_t)begin * d + c;
                for (int i = begin; i < end; i++, o += d, sums += 32) {
                    const f32x16 x = fma(join(sums), splat(factors[i]), load(o) * splat(keep[i]));
                    store(o, Q4 ? x + splat(zeros[i]) : x);
                }
            }
        }
    }
}

}  // namespace KV_NS
