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
            alignas(64) float of_part[CHUNK];
            const float *from = x + ch * CHUNK;
            if (parts > 1) {
                for (int c = 0; c < CHUNK; c += 16) store(of_part + c, c / width == part ? load(from + c) : splat(0));
                from = of_part;
            }
            block.q8_factor[(i * chunks + ch) * parts + part] = split_bytes(from, row, row + CHUNK);
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
    alignas(64) float scale[KV_MAX_QUANT_DIM], zero[KV_MAX_QUANT_DIM];
    alignas(64) float step[KV_MAX_QUANT_DIM / 2];         // of the byte where that of the high channel's code is 1
    alignas(64) int32_t high[KV_MAX_QUANT_DIM / 2], low[KV_MAX_QUANT_DIM / 2];
    alignas(64) uint8_t bits[KV_MAX_QUANT_DIM / 2];       // of the low channel

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
            const __m128i of_low = _mm_sub_epi8(_mm_set1_epi8(8), _mm_loadu_si128((const __m128i *)(split + i)));
            _mm_store_si128((__m128i *)(bits + i), of_low);
            _mm512_store_si512(step + i, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), _mm512_cvtepu8_epi32(of_low)), 23));
        }
    }
};

// p[index[lane]] of 64 floats in registers.
static inline f32x16 look_up(const f32x16 *p, const int32_t *index) {
    const __m512i i = _mm512_load_si512(index);
    const __m512 low = _mm512_permutex2var_ps(p[0].v, i, p[1].v), high = _mm512_permutex2var_ps(p[2].v, i, p[3].v);
    return {_mm512_mask_blend_ps(_mm512_test_epi32_mask(i, _mm512_set1_epi32(32)), low, high)};
}

// KV_Q4 of K: what the bytes of the pairs, whole, and then, from the middle of the chunks on, the codes in their lower bits are
// multiplied by for the queries [first, last). With t the step of a byte whose upper code counts as 1, x and y the query times
// the scales of both channels, x*upper + y*lower = x*t*byte + (y - x*t)*lower. k_zero: what each score has besides.
static void split_queries_q4(Block &block, const PairsOfK &page, int first, int last) {
    const int d = block.head_dim, chunks = chunks_of_k(KV_Q4, d), half = chunks * CHUNK / 2;
    alignas(64) float x[2 * KV_MAX_QUANT_DIM], scaled[KV_MAX_QUANT_DIM];
    if (d < chunks * CHUNK) memset(x, 0, sizeof(float) * (size_t)chunks * CHUNK);
    for (int i = first; i < last; i++) {
        const float *q = block.q + (int64_t)i * d;
        f32x16 zeros = splat(0);
        if (d == 64) {
            f32x16 product[4];
            for (int c = 0; c < 4; c++) {
                product[c] = load(q + 16 * c) * load(page.scale + 16 * c);
                zeros = fma(load(q + 16 * c), load(page.zero + 16 * c), zeros);
            }
            for (int j = 0; j < 32; j += 16) {
                const f32x16 whole = look_up(product, page.high + j) * load(page.step + j);
                store(x + j, whole);
                store(x + 32 + j, look_up(product, page.low + j) - whole);
            }
        } else {
            for (int c = 0; c < d; c += 16) {
                store(scaled + c, load(q + c) * load(page.scale + c));
                zeros = fma(load(q + c), load(page.zero + c), zeros);
            }
            for (int j = 0; j < d / 2; j += 16) {
                const __mmask16 there = d / 2 - j < 16 ? 0xff : 0xffff;
                const f32x16 whole = gather(scaled, page.high + j) * load(page.step + j);
                _mm512_store_ps(x + j, _mm512_maskz_mov_ps(there, whole.v));
                _mm512_storeu_ps(x + half + j, _mm512_maskz_mov_ps(there, (gather(scaled, page.low + j) - whole).v));
            }
        }
        block.k_zero[i] = sum(zeros);
        split_query(block, i, chunks, 1, x);
    }
}

// The bytes of blocks [from, to), and the codes in their lower bits.
static CodesOfK cut_k_q4(const char *page, const PairsOfK &pairs, int d, int from, int to, char *out) {
    const int quads = d / 8, chunks = chunks_of_k(KV_Q4, d), half = chunks * 8;
    const __m512i powers = _mm512_set4_epi32(0, 0, 0x80402010, 0x08040201), ones = _mm512_set1_epi8(1);
    for (int j = 0; j < quads; j++) {
        int32_t four;
        memcpy(&four, pairs.bits + 4 * j, 4);
        const __m512i lower = _mm512_sub_epi8(_mm512_shuffle_epi8(powers, _mm512_set1_epi32(four)), ones);   // 2^bits - 1
        for (int b = from; b < to; b++) {
            const __m512i x = _mm512_loadu_si512(page + (b * quads + j) * 64);
            char *to_block = out + b * chunks * 1024;
            _mm512_store_si512(to_block + j * 64, x);
            _mm512_store_si512(to_block + (half + j) * 64, _mm512_and_si512(lower, x));
        }
    }
    return {out, chunks * 1024, chunks, 1, nullptr, chunks};
}

// s[i][16*b ..] for the queries [first, last) and the blocks [from, to): k_zero (KV_Q4) plus all products. Tiles of several
// blocks are stored before the first is read again: a vector cannot be loaded from a tile that is still being stored.
template <bool Q4, int PARTS>
static void scores_int8(const Block &block, const CodesOfK &k, int from, int to, int first, int last, const Next &next) {
    const int of_tile = 8 / PARTS, m = first / of_tile, tiles = (last + of_tile - 1) / of_tile - m, chunks = k.chunks, units = k.units;
    const int batch = tiles * chunks < TILES_AT_ONCE ? TILES_AT_ONCE / (tiles * chunks) : 1;
    const int64_t step = next.bytes / (to - from), a_step = block.q8_rows * CHUNK, s_stride = block.s_stride;
    const int8_t *const a = block.q8 + m * 1024;
    int32_t *const c32 = block.c32;
    const bool same = tiles * chunks == 1;     // one tile holds all that K is multiplied by
    asm volatile("" ::: "memory");
    if (same) _tile_loadd(4, a, 64);
    for (int begin = from; begin < to; begin += batch) {
        const int end = begin + batch < to ? begin + batch : to;
        asm volatile("" ::: "memory");         // tile loads do not tell the compiler that they read memory
        int32_t *c = c32;
        for (int b = begin; b < end; b++) {
            next.fetch((b - from) * step, (b - from + 1) * step);
            for (int ch = 0; ch < chunks; ch++, c += tiles * 256) {
                _tile_loadd(6, k.codes + b * k.block + ch * 1024, 64);
                for (int t = 0; t < tiles; t += 2) {
                    _tile_zero(0);
                    if (!same) _tile_loadd(4, a + ch * a_step + t * 1024, 64);
                    multiply_bytes_0<Q4>();
                    if (t + 1 < tiles) {
                        _tile_zero(1);
                        _tile_loadd(5, a + ch * a_step + t * 1024 + 1024, 64);
                        multiply_bytes_1<Q4>();
                        _tile_stored(1, c + t * 256 + 256, 64);
                    }
                    _tile_stored(0, c + t * 256, 64);
                }
            }
        }
        asm volatile("" ::: "memory");
        const int32_t *sums = c32 + (first - m * of_tile) * PARTS * 32;
        for (int b = begin; b < end; b++)
            for (int ch = 0; ch < chunks; ch++, sums += tiles * 256) {
                f32x16 scale[PARTS];
                const int parts = units - ch * PARTS < PARTS ? units - ch * PARTS : PARTS;
                if (!Q4)
                    for (int part = 0; part < PARTS; part++)
                        if (part < parts) scale[part] = load_f16(k.scale + (b * units + ch * PARTS + part) * 16);
                const int32_t *row = sums;
                const float *factor = block.q8_factor + (first * chunks + ch) * PARTS;
                float *s = block.s + first * s_stride + 16 * b;
                for (int i = first; i < last; i++, row += PARTS * 32, factor += chunks * PARTS, s += s_stride) {
                    f32x16 sum = ch ? load(s) : Q4 ? splat(block.k_zero[i]) : splat(0);
                    for (int part = 0; part < PARTS; part++) {
                        if (part >= parts) break;
                        const f32x16 x = join(row + part * 32);
                        sum = Q4 ? fma(x, splat(factor[part]), sum) : fma(x * scale[part], splat(factor[part]), sum);
                    }
                    store(s, sum);
                }
            }
    }
}
static void scores_int8(const Block &block, const CodesOfK &k, bool q4, int from, int to, int first, int last, const Next &next) {
    if (q4) scores_int8<true, 1>(block, k, from, to, first, last, next);
    else if (k.parts == 2) scores_int8<false, 2>(block, k, from, to, first, last, next);
    else scores_int8<false, 4>(block, k, from, to, first, last, next);
}

}  // namespace KV_NS
