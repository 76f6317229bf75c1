// int8_v.h - weighted sums of quantized V on AMX int8 tiles.
#pragma once
#include "int8_tiles.h"

namespace KV_NS {

// KV_Q4 of V: the nibbles of the slots [from, to), whole eights, as bytes [D/16][128/4][16][4].
static void cut_v_q4(const char *page, int d, int from, int to, char *out, Ahead &ahead) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int c = 0; c < d / 16; c++, ahead.lines(ahead.between))
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

// 64 products p*u, at most 32512 each, as bytes without a sign: 256*high + low.
static inline void split_products(const float *p, const float *u, int8_t *high, int8_t *low) {
    __m512i y[2];
    for (int i = 0; i < 2; i++, p += 32, u += 32) {
        const __m512i a = _mm512_cvtps_epi32((load(p) * load(u)).v), b = _mm512_cvtps_epi32((load(p + 16) * load(u + 16)).v);
        y[i] = _mm512_packs_epi32(a, b);
    }
    const __m512i byte = _mm512_set1_epi16(255);
    _mm512_storeu_si512(high, bytes_in_order(_mm512_srli_epi16(y[0], 8), _mm512_srli_epi16(y[1], 8), false));
    _mm512_storeu_si512(low, bytes_in_order(_mm512_and_si512(y[0], byte), _mm512_and_si512(y[1], byte), false));
}

// o = keep*o + weighted sums of the codes [D/16][128/4][16][4], and zero16 += those of the zeros, over the slots [from, stop), for the
// queries [first, last). `width` channels share a scale. Probabilities are at most 1; those of slots that a row does not see are 0 or anything.
template <bool Q4>
static void sums_int8(const Block &block, const Seen &seen, const char *codes, const uint16_t *scale, const uint16_t *zero, int width, int from,
                      int stop, int first, int last, Ahead &ahead) {
    const int d = block.head_dim, m = first / 8, m_end = (last + 7) / 8, half = from / CHUNK, half_end = (stop + CHUNK - 1) / CHUNK;
    const int64_t s_stride = block.s_stride;
    int8_t *const p8 = block.p8;
    float *const o_all = block.o, *const factors = block.p8_factor;
    const int64_t n = block.rows * block.group;
    const float *const keep = block.keep;
    // A row's result must not depend on the rows beside it, so where they see different slots each has its own factor.
    const bool alike = seen.low_of(block, seen.to - 1) <= from && seen.high_of(block, seen.from) >= stop;
    // Few queries: all channels in one go, so that no tile is read while it is being stored.
    const int tiles = m_end - m, at_once = tiles == 1 ? d : width;
    ScaledSlots slots;
    for (int begin = 0; begin < d; begin += at_once) {
        int8_t *to8 = p8;
        for (int g = begin, at = 0; g < begin + at_once; g += width, at += 8 * tiles, to8 += 16 * tiles * KV_PAGE, scale += KV_PAGE, zero += KV_PAGE) {
            int row = -1;
            for (int i = first; i < last; i++) {
                if (row < 0 || (!alike && i / block.group != row)) {
                    row = i / block.group;
                    const int low = seen.low_of(block, row), high = seen.high_of(block, row);
                    slots.read<Q4>(scale, zero, low > from ? low : from, high < stop ? high : stop);
                }
                ahead.lines(ahead.between);
                const float *p = block.s + i * s_stride;
                int8_t *to = to8 + 2 * (i - 8 * m) * KV_PAGE;
                float *const zero16 = block.zero16 + (g / width * n + i) * 16;
                f32x16 sum_zero = splat(0);
                for (int h = half; h < half_end; h++) {
                    alignas(64) float cut[CHUNK];
                    const float *p64 = p + h * CHUNK;
                    if (h * CHUNK < from || h * CHUNK + CHUNK > stop) {      // beyond, p may be anything
                        for (int b = 0; b < 4; b++) {
                            const int n = h * 4 + b;
                            const bool some = 16 * n < stop && 16 * n + 16 > from;
                            store(cut + 16 * b, some ? slots_inside(n, from, stop, load(p64 + 16 * b), splat(0)) : splat(0));
                        }
                        p64 = cut;
                    }
                    split_products(p64, slots.u + h * CHUNK, to + h * CHUNK, to + KV_PAGE + h * CHUNK);
                    if (Q4)
                        for (int b = 0; b < CHUNK; b += 16) sum_zero = fma(load(p64 + b), load(slots.zero + h * CHUNK + b), sum_zero);
                }
                factors[at + i - 8 * m] = slots.factor;
                if (Q4) store(zero16, load(zero16) + sum_zero);
            }
        }
        asm volatile("" ::: "memory");         // tile loads do not tell the compiler that they read memory
        int32_t *c32 = block.c32;
        const int8_t *a = p8;
        for (int g = begin; g < begin + at_once; g += width, a += 16 * tiles * KV_PAGE) {
            if (tiles == 1) {                  // two tiles hold all that V is multiplied by
                _tile_loadd(3, a + half * CHUNK, KV_PAGE);
                if (half_end - half == 2) _tile_loadd(1, a + half * CHUNK + CHUNK, KV_PAGE);
            }
            for (int c = g; c < g + width; c += 16) {
                ahead.lines(ahead.of_column);
                for (int t = 0; t < tiles; t++, c32 += 256) {
                    const char *b = codes + c * KV_PAGE;
                    _tile_zero(2);
                    for (int h = half; h < half_end; h++) {
                        _tile_loadd(7, b + h * 1024, 64);
                        if (tiles > 1) _tile_loadd(3, a + t * 16 * KV_PAGE + h * CHUNK, KV_PAGE);
                        if (tiles > 1 || h == half) _tile_dpbusd(2, 3, 7);
                        else _tile_dpbusd(2, 1, 7);
                    }
                    _tile_stored(2, c32, 64);
                }
            }
        }
        asm volatile("" ::: "memory");
        const int32_t *sums = block.c32 + (first - 8 * m) * 32;
        const float *factor = factors + first - 8 * m;
        for (int g = begin; g < begin + at_once; g += width, factor += 8 * tiles)
            for (int c = g; c < g + width; c += 16, sums += tiles * 256) {
                const int32_t *row = sums;
                float *o = o_all + (int64_t)first * d + c;
                for (int i = first; i < last; i++, o += d, row += 32) store(o, fma(join(row), splat(factor[i - first]), load(o) * splat(keep[i])));
            }
    }
}

}  // namespace KV_NS
