// int8_k.h - scores of queries against quantized K on AMX int8 tiles.
#pragma once
#include "int8_tiles.h"

namespace KV_NS {

// Where the codes of a KV_Q8 page's K lie as B tiles: chunk i of block b at codes + b*block + i*1024. `parts` stretches of
// each chunk have a factor of their own.
struct CodesOfK {
    const char *codes;
    int64_t block;
    int chunks, parts;
    const uint16_t *scale;                 // [8][units][16]
    int units;                             // parts that exist
};

// The row of query i (KV_Q8: of stretch i of all queries') in the A tiles [chunks][rows][64]: its high bytes; the low ones are in the next.
static inline int8_t *row_of(const Block &block, int ch, int i) { return block.q8 + (ch * block.q8_rows + i * 2) * (int64_t)CHUNK; }

static void split_queries_q8(Block &block) {
    const int d = block.head_dim, chunks = chunks_of_k(KV_Q8, d), parts = parts_of_k(KV_Q8, d);
    const int width = CHUNK / parts;
    alignas(64) float x[KV_MAX_QUANT_DIM] = {}, of_part[CHUNK];
    for (int i = 0; i < block.rows * block.group; i++) {
        memcpy(x, block.q + (int64_t)i * d, sizeof(float) * (size_t)d);
        for (int ch = 0; ch < chunks; ch++)
            for (int part = 0; part < parts; part++) {
                for (int c = 0; c < CHUNK; c += 16) store(of_part + c, c / width == part ? load(x + ch * CHUNK + c) : splat(0));
                const float top = kv::bits_f32(_mm512_reduce_max_epu32(magnitudes(of_part, CHUNK, _mm512_setzero_si512())));
                split_bytes<64>(of_part, _mm_cvtss_f32(ups_of(_mm_set1_ps(top))), row_of(block, ch, i * parts + part));
                block.q8_factor[(i * chunks + ch) * parts + part] = top * (1.f / 32512.f);
            }
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

// KV_Q4 of K: x[chunks][64], what the bytes of the pairs, whole, and then the codes in their lower bits are multiplied by for a
// query. With t the step of a byte whose upper code counts as 1, x and y the query times the scales of both channels,
// x*upper + y*lower = x*t*byte + (y - x*t)*lower. The lanes of zeros add up to what each score has besides.
static inline void spread_query(const float *q, const PairsOfK &page, int d, int chunks, int depth, float *x, f32x16 &zeros) {
    if (d == 64) {
        f32x16 product[4];
        for (int c = 0; c < 4; c++) {
            product[c] = load(q + 16 * c) * load(page.scale + 16 * c);
            zeros = fma(load(q + 16 * c), load(page.zero + 16 * c), zeros);
        }
        for (int j = 0; j < 32; j += 16) {
            const f32x16 whole = look_up(product, page.high + j) * load(page.step + j);
            store(x + j, whole);
            store(x + CHUNK + j, look_up(product, page.low + j) - whole);
        }
        return;
    }
    alignas(64) float scaled[KV_MAX_QUANT_DIM];
    for (int c = 0; c < d; c += 16) {
        store(scaled + c, load(q + c) * load(page.scale + c));
        zeros = fma(load(q + c), load(page.zero + c), zeros);
    }
    for (int ch = 0; ch < chunks / 2; ch++)
        for (int at = 0; at < depth; at += 16) {
            const int j = ch * depth + at, left = depth - at;
            const __mmask16 there = left < 16 ? (__mmask16)((1 << left) - 1) : 0xffff;      // the last may be padding
            const f32x16 whole = gather(scaled, page.high + j) * load(page.step + j);
            float *to = x + ch * CHUNK + at;
            _mm512_store_ps(to, _mm512_maskz_mov_ps(there, whole.v));
            _mm512_store_ps(to + chunks / 2 * CHUNK, _mm512_maskz_mov_ps(there, (gather(scaled, page.low + j) - whole).v));
        }
}

// The same, as bytes, for the queries [first, last), and k_zero.
static void split_queries_q4(Block &block, const PairsOfK &page, int first, int last, Ahead &ahead) {
    const int d = block.head_dim, chunks = chunks_of_k(KV_Q4, d), depth = depth_of_k(KV_Q4, d);
    alignas(64) float x[4][2 * KV_MAX_QUANT_DIM];          // [query][chunks][64], of which depth are used
    if (depth != 32 && depth != CHUNK) memset(x, 0, sizeof x);
    for (int i = first; i < last; i += 4) {
        const int n = last - i < 4 ? last - i : 4;
        f32x16 zeros[4];
        __m512i tops[4];
        for (int k = 0; k < 4; k++) zeros[k] = splat(0), tops[k] = _mm512_setzero_si512();
        for (int k = 0; k < n; k++) {
            ahead.lines(ahead.between);
            spread_query(block.q + (int64_t)(i + k) * d, page, d, chunks, depth, x[k], zeros[k]);
            for (int ch = 0; ch < chunks; ch++) tops[k] = magnitudes(x[k] + ch * CHUNK, depth, tops[k]);
        }
        const __m128 top = tops_of_four(tops);
        alignas(16) float up[4];
        _mm_store_ps(up, ups_of(top));
        _mm_storeu_ps(block.q8_factor + i, _mm_mul_ps(top, _mm_set1_ps(1.f / 32512.f)));
        _mm_storeu_ps(block.k_zero + i, sums_of_four(zeros));
        for (int k = 0; k < n; k++)
            for (int ch = 0; ch < chunks; ch++) {
                if (depth == 32) split_bytes<32>(x[k] + ch * CHUNK, up[k], row_of(block, ch, i + k));
                else split_bytes<64>(x[k] + ch * CHUNK, up[k], row_of(block, ch, i + k));
            }
    }
}

// The codes in the lower bits of the bytes of blocks [from, to).
static void cut_k_q4(const char *page, const PairsOfK &pairs, int d, int from, int to, char *out, Ahead &ahead) {
    const int quads = d / 8;
    const __m512i powers = _mm512_set4_epi32(0, 0, 0x80402010, 0x08040201), ones = _mm512_set1_epi8(1);
    for (int j = 0; j < quads; j++) {
        if (j % 2) ahead.lines(ahead.between);
        int32_t four;
        memcpy(&four, pairs.bits + 4 * j, 4);
        const __m512i lower = _mm512_sub_epi8(_mm512_shuffle_epi8(powers, _mm512_set1_epi32(four)), ones);   // 2^bits - 1
        for (int b = from; b < to; b++) {
            const int at = (b * quads + j) * 64;
            _mm512_store_si512(out + at, _mm512_and_si512(lower, _mm512_loadu_si512(page + at)));
        }
    }
}

// What both formats do with the blocks [from, to) in turn: products(b, c) stores the tiles of block b at c, scores(b, c) reads them.
// Tiles of several blocks are stored before the first is read again: a vector cannot be loaded from a tile that is still being stored.
template <class Products, class Scores>
static inline void by_blocks(const Block &block, int tiles, int from, int to, Ahead &ahead, Products products, Scores scores) {
    const int batch = tiles < TILES_AT_ONCE ? TILES_AT_ONCE / tiles : 1;
    for (int begin = from; begin < to; begin += batch) {
        const int end = begin + batch < to ? begin + batch : to;
        asm volatile("" ::: "memory");         // tile loads do not tell the compiler that they read memory
        int32_t *c = block.c32;
        for (int b = begin; b < end; b++, c += tiles * 256) {
            ahead.lines(ahead.of_block);
            products(b, c);
        }
        asm volatile("" ::: "memory");
        c = block.c32;
        for (int b = begin; b < end; b++, c += tiles * 256) scores(b, c);
    }
}

// s[i][16*b ..] = k_zero plus all products of the bytes at `whole` and the codes at `lower`, both [8][D/8][64], for the queries
// [first, last) and the blocks [from, to).
static void scores_q4(const Block &block, const char *whole, const char *lower, int from, int to, int first, int last, Ahead &ahead) {
    const int d = block.head_dim, m = first / 8, tiles = (last + 7) / 8 - m, half = chunks_of_k(KV_Q4, d) / 2;
    const int64_t of_block = d * 8, of_chunk = of_block / half, s_stride = block.s_stride;
    const int8_t *const a = row_of(block, 0, 8 * m), *const a_lower = row_of(block, half, 8 * m);
    if (tiles == 1 && half == 1) {             // two tiles hold all that K is multiplied by
        asm volatile("" ::: "memory");
        _tile_loadd(4, a, 64);
        _tile_loadd(5, a_lower, 64);
    }
    auto products = [&](int b, int32_t *c) {
        const char *of_whole = whole + b * of_block, *of_lower = lower + b * of_block;
        if (tiles == 1 && half == 1) {
            _tile_zero(0);
            _tile_loadd(6, of_whole, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(6, of_lower, 64);
            _tile_dpbsud(0, 5, 6);
            _tile_stored(0, c, 64);
            return;
        }
        for (int t = 0; t < tiles; t += 2, c += 512) {
            const bool two = t + 1 < tiles;
            _tile_zero(0);
            _tile_zero(1);
            for (int ch = 0; ch < 2 * half; ch++) {
                _tile_loadd(6, (ch < half ? of_whole + ch * of_chunk : of_lower + (ch - half) * of_chunk), 64);
                const int8_t *a_tile = row_of(block, ch, 8 * (m + t));
                _tile_loadd(4, a_tile, 64);
                _tile_dpbsud(0, 4, 6);
                if (!two) continue;
                _tile_loadd(5, a_tile + 1024, 64);
                _tile_dpbsud(1, 5, 6);
            }
            _tile_stored(0, c, 64);
            if (two) _tile_stored(1, c + 256, 64);
        }
    };
    auto scores = [&](int b, const int32_t *c) {
        const int32_t *row = c + (first - 8 * m) * 32;
        float *s = block.s + first * s_stride + 16 * b;
        for (int i = first; i < last; i++, row += 32, s += s_stride) store(s, fma(join(row), splat(block.q8_factor[i]), splat(block.k_zero[i])));
    };
    by_blocks(block, tiles, from, to, ahead, products, scores);
}

// The same for KV_Q8: products with each chunk and part apart, which have scales of their own.
template <int PARTS>
static void scores_q8(const Block &block, const CodesOfK &k, int from, int to, int first, int last, Ahead &ahead) {
    const int of_tile = 8 / PARTS, m = first / of_tile, tiles = (last + of_tile - 1) / of_tile - m, chunks = k.chunks, units = k.units;
    const int64_t a_step = block.q8_rows * CHUNK, s_stride = block.s_stride;
    const int8_t *const a = block.q8 + m * 1024;
    const bool same = tiles * chunks == 1;     // one tile holds all that K is multiplied by
    asm volatile("" ::: "memory");
    if (same) _tile_loadd(4, a, 64);
    auto products = [&](int b, int32_t *c) {
        for (int ch = 0; ch < chunks; ch++, c += tiles * 256) {
            _tile_loadd(6, k.codes + b * k.block + ch * 1024, 64);
            for (int t = 0; t < tiles; t += 2) {
                _tile_zero(0);
                if (!same) _tile_loadd(4, a + ch * a_step + t * 1024, 64);
                _tile_dpbssd(0, 4, 6);
                if (t + 1 < tiles) {
                    _tile_zero(1);
                    _tile_loadd(5, a + ch * a_step + t * 1024 + 1024, 64);
                    _tile_dpbssd(1, 5, 6);
                    _tile_stored(1, c + t * 256 + 256, 64);
                }
                _tile_stored(0, c + t * 256, 64);
            }
        }
    };
    auto scores = [&](int b, const int32_t *sums) {
        sums += (first - m * of_tile) * PARTS * 32;
        for (int ch = 0; ch < chunks; ch++, sums += tiles * 256) {
            f32x16 scale[PARTS];
            const int parts = units - ch * PARTS < PARTS ? units - ch * PARTS : PARTS;
            for (int part = 0; part < PARTS; part++)
                if (part < parts) scale[part] = load_f16(k.scale + (b * units + ch * PARTS + part) * 16);
            const int32_t *row = sums;
            const float *factor = block.q8_factor + (first * chunks + ch) * PARTS;
            float *s = block.s + first * s_stride + 16 * b;
            for (int i = first; i < last; i++, row += PARTS * 32, factor += chunks * PARTS, s += s_stride) {
                f32x16 sum = ch ? load(s) : splat(0);
                for (int part = 0; part < PARTS; part++) {
                    if (part >= parts) break;
                    sum = fma(join(row + part * 32) * scale[part], splat(factor[part]), sum);
                }
                store(s, sum);
            }
        }
    };
    by_blocks(block, tiles * chunks, from, to, ahead, products, scores);
}
static void scores_q8(const Block &block, const CodesOfK &k, int from, int to, int first, int last, Ahead &ahead) {
    if (k.parts == 2) scores_q8<2>(block, k, from, to, first, last, ahead);
    else scores_q8<4>(block, k, from, to, first, last, ahead);
}

}  // namespace KV_NS
