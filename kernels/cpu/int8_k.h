// int8_k.h - scores of queries against quantized K on AMX int8 tiles.
#pragma once
#include "int8_tiles.h"

namespace KV_NS {

// Where the codes of a page's K lie as B tiles: chunk i of block b at codes + b*block + i*1024. `parts` stretches of
// each chunk have a factor of their own.
struct CodesOfK {
    const char *codes;
    int64_t block;
    int chunks, parts;
    const uint16_t *scale;                 // KV_Q8: [8][units][16]
    int units;                             // parts that exist
};

// x[chunks][64] -> the rows of query i in the A tiles [chunks][rows][64]: (i*parts + part)*2 holds high bytes, the next low ones.
static inline void split_query(Block &block, int i, int chunks, int parts, const float *x) {
    const int width = CHUNK / parts;
    for (int ch = 0; ch < chunks; ch++)
        for (int part = 0; part < parts; part++) {
            int8_t *row = block.q8 + (ch * block.q8_rows + (i * parts + part) * 2) * (int64_t)CHUNK;
            memset(row, 0, 2 * CHUNK);
            block.q8_factor[(i * chunks + ch) * parts + part] =
                split_bytes(x + ch * CHUNK + part * width, width, row + part * width, row + CHUNK + part * width);
        }
}

static void split_queries_q8(Block &block) {
    const int d = block.head_dim, chunks = chunks_of_k(KV_Q8, d), parts = parts_of_k(KV_Q8, d);
    alignas(64) float x[KV_MAX_QUANT_DIM] = {};
    for (int i = 0; i < block.rows * block.group; i++) {
        memcpy(x, block.q + (int64_t)i * d, sizeof(float) * (size_t)d);
        split_query(block, i, chunks, parts, x);
    }
}

// What a Q4 page of K says of its channels, as vectors.
struct PairsOfK {
    alignas(64) float scale[KV_MAX_QUANT_DIM], zero[KV_MAX_QUANT_DIM], down[KV_MAX_QUANT_DIM / 2];
    alignas(64) int32_t high[KV_MAX_QUANT_DIM / 2], low[KV_MAX_QUANT_DIM / 2];
    alignas(64) uint8_t mask[KV_MAX_QUANT_DIM / 2];       // the bits of the low channel

    void read(const char *page, int d) {
        const uint16_t *scales = (const uint16_t *)(page + KV_PAGE * d / 2);
        const uint8_t *chan = (const uint8_t *)(scales + 2 * d), *split = chan + d;
        for (int c = 0; c < d; c += 16) {
            store(scale + c, load_f16(scales + c));
            store(zero + c, load_f16(scales + d + c));
        }
        for (int i = 0; i < d / 2; i += 16) {              // the last eight may be padding: any byte is a channel below 256
            const __m512i pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(chan + 2 * i)));
            _mm512_store_si512(high + i, _mm512_and_si512(pair, _mm512_set1_epi32(255)));
            _mm512_store_si512(low + i, _mm512_srli_epi32(pair, 8));
            const __m512i bits = _mm512_sub_epi32(_mm512_set1_epi32(8), _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(split + i))));
            _mm512_store_si512(down + i, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), bits), 23));
            const __m512i masks = _mm512_sub_epi32(_mm512_sllv_epi32(_mm512_set1_epi32(1), bits), _mm512_set1_epi32(1));
            _mm_store_si128((__m128i *)(mask + i), _mm512_cvtepi32_epi8(masks));
        }
    }
};

// p[index[lane]] of a table of d floats.
static inline f32x16 look_up(const float *p, int d, const int32_t *index) {
    if (d != 64) return gather(p, index);
    const __m512i i = _mm512_load_si512(index);
    const __m512 low = _mm512_permutex2var_ps(_mm512_load_ps(p), i, _mm512_load_ps(p + 16));
    const __m512 high = _mm512_permutex2var_ps(_mm512_load_ps(p + 32), i, _mm512_load_ps(p + 48));
    return {_mm512_mask_blend_ps(_mm512_test_epi32_mask(i, _mm512_set1_epi32(32)), low, high)};
}

// KV_Q4 of K: the queries [first, last) times the scales of this page, in the order of its pairs: all channels in the upper
// bits of their bytes, then, from the middle of the chunks on, those in the lower bits. k_zero: what each score has besides.
static void split_queries_q4(Block &block, const PairsOfK &page, int first, int last) {
    const int d = block.head_dim, chunks = chunks_of_k(KV_Q4, d), parts = parts_of_k(KV_Q4, d), half = chunks * CHUNK / 2;
    alignas(64) float x[2 * KV_MAX_QUANT_DIM] = {}, scaled[KV_MAX_QUANT_DIM] = {};
    for (int i = first; i < last; i++) {
        const float *q = block.q + (int64_t)i * d;
        f32x16 zeros = splat(0);
        for (int c = 0; c < d; c += 16) {
            store(scaled + c, load(q + c) * load(page.scale + c));
            zeros = fma(load(q + c), load(page.zero + c), zeros);
        }
        block.k_zero[i] = sum(zeros);
        for (int j = 0; j < d / 2; j += 16) {
            const f32x16 high = look_up(scaled, d, page.high + j) * load(page.down + j), low = look_up(scaled, d, page.low + j);
            const __mmask16 there = d / 2 - j < 16 ? 0xff : 0xffff;
            _mm512_store_ps(x + j, _mm512_maskz_mov_ps(there, high.v));
            _mm512_storeu_ps(x + half + j, _mm512_maskz_mov_ps(there, low.v));
        }
        split_query(block, i, chunks, parts, x);
    }
}

// The bytes of blocks [from, to) cut into upper and lower codes, the upper ones times 2^(bits of the lower).
static void cut_k_q4(const char *page, const PairsOfK &pairs, int d, int from, int to, char *out) {
    const int quads = d / 8, chunks = chunks_of_k(KV_Q4, d), half = chunks * 8;
    for (int j = 0; j < quads; j++) {
        int32_t four;
        memcpy(&four, pairs.mask + 4 * j, 4);
        const __m512i mask = _mm512_set1_epi32(four);
        for (int b = from; b < to; b++) {
            const __m512i x = _mm512_loadu_si512(page + (b * quads + j) * 64);
            char *to_block = out + b * chunks * 1024;
            _mm512_store_si512(to_block + j * 64, _mm512_andnot_si512(mask, x));
            _mm512_store_si512(to_block + (half + j) * 64, _mm512_and_si512(mask, x));
        }
    }
}

// s[i][16*b ..] for the queries [first, last) and the blocks [from, to): k_zero (KV_Q4) plus all products.
template <bool Q4, int PARTS>
static void scores_int8(const Block &block, const CodesOfK &k, int from, int to, int first, int last, const Next &next) {
    const int of_tile = 8 / PARTS, m = first / of_tile, m_end = (last + of_tile - 1) / of_tile, chunks = k.chunks, units = k.units;
    const int64_t step = next.bytes / (to - from), a_step = block.q8_rows * CHUNK, s_stride = block.s_stride;
    int32_t *const c32 = block.c32;
    const int32_t *const c_first = c32 + (first - m * of_tile) * PARTS * 32;
    for (int b = from; b < to; b++) {
        next.fetch((b - from) * step, (b - from + 1) * step);
        for (int ch = 0; ch < chunks; ch++) {
            asm volatile("" ::: "memory");     // tile loads do not tell the compiler that they read memory
            const int8_t *a = block.q8 + ch * a_step;
            _tile_loadd(6, k.codes + b * k.block + ch * 1024, 64);
            for (int t = m; t < m_end; t += 2) {
                _tile_zero(0);
                _tile_loadd(4, a + t * 1024, 64);
                multiply_bytes_0<Q4>();
                if (t + 1 < m_end) {
                    _tile_zero(1);
                    _tile_loadd(5, a + t * 1024 + 1024, 64);
                    multiply_bytes_1<Q4>();
                    _tile_stored(1, c32 + (t + 1 - m) * 256, 64);
                }
                _tile_stored(0, c32 + (t - m) * 256, 64);
            }
            asm volatile("" ::: "memory");
            f32x16 scale[PARTS];
            const int parts = units - ch * PARTS < PARTS ? units - ch * PARTS : PARTS;
            if (!Q4)
                for (int part = 0; part < PARTS; part++)
                    if (part < parts) scale[part] = load_f16(k.scale + (b * units + ch * PARTS + part) * 16);
            const int32_t *c = c_first;
            const float *factor = block.q8_factor + (first * chunks + ch) * PARTS;
            float *s = block.s + first * s_stride + 16 * b;
            for (int i = first; i < last; i++, c += PARTS * 32, factor += chunks * PARTS, s += s_stride) {
                f32x16 sum = ch ? load(s) : Q4 ? splat(block.k_zero[i]) : splat(0);
                for (int part = 0; part < PARTS; part++) {
                    if (part >= parts) break;
                    const f32x16 x = join(c + part * 32);
                    sum = Q4 ? fma(x, splat(factor[part]), sum) : fma(x * scale[part], splat(factor[part]), sum);
                }
                store(s, sum);
            }
        }
    }
}
static void scores_int8(const Block &block, const CodesOfK &k, bool q4, int from, int to, int first, int last, const Next &next) {
    if (q4 && k.parts == 2) scores_int8<true, 2>(block, k, from, to, first, last, next);
    else if (q4) scores_int8<true, 1>(block, k, from, to, first, last, next);
    else if (k.parts == 2) scores_int8<false, 2>(block, k, from, to, first, last, next);
    else scores_int8<false, 4>(block, k, from, to, first, last, next);
}

}  // namespace KV_NS
