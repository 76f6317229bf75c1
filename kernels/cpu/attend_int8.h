// attend_int8.h - attention over quantized pages on AMX int8 tiles, for prompt and decode rows alike. The codes of K and V are
// the B operand as they lie (KV_Q4 after its bytes are cut in two). Queries and probabilities, with the scales of channels
// and tokens in them, become 16-bit integers of two bytes each, so a product is off by 2^-16 of its largest factor at most.
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

template <bool UNSIGNED> static inline void multiply_bytes_0() {
    if constexpr (UNSIGNED) _tile_dpbsud(0, 4, 6);
    else _tile_dpbssd(0, 4, 6);
}
template <bool UNSIGNED> static inline void multiply_bytes_1() {
    if constexpr (UNSIGNED) _tile_dpbsud(1, 5, 6);
    else _tile_dpbssd(1, 5, 6);
}

// Asks for the bytes [from, to) of what comes next: near, when little enough to stay there.
static inline void fetch(const char *next, int64_t from, int64_t to, bool near) {
    if (!next) return;
    if (near)
        for (int64_t i = from; i < to; i += 64) __builtin_prefetch(next + i, 0, 3);
    else
        for (int64_t i = from; i < to; i += 64) __builtin_prefetch(next + i, 0, 2);
}
struct Next { const char *data; int64_t bytes; bool near() const { return bytes <= 9216; } };

// s[i][16*b ..] for the queries [first, last) and the blocks [from, to): k_zero (KV_Q4) plus all products.
template <bool Q4, int PARTS>
static void scores_int8(const Block &block, const CodesOfK &k, int from, int to, int first, int last, const Next &next) {
    const int of_tile = 8 / PARTS, m = first / of_tile, m_end = (last + of_tile - 1) / of_tile, chunks = k.chunks, units = k.units;
    const int64_t step = next.bytes / (to - from), a_step = block.q8_rows * CHUNK, s_stride = block.s_stride;
    int32_t *const c32 = block.c32;
    const int32_t *const c_first = c32 + (first - m * of_tile) * PARTS * 32;
    for (int b = from; b < to; b++) {
        fetch(next.data, (b - from) * step, (b - from + 1) * step, next.near());
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
            fetch(next.data, c / 16 * step, (c / 16 + 1) * step, next.near());
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

static void attend_pages_int8(Block &block, const kv_cache &cache, const kv_table &table, int page, int end, int kv_head, const char *next_k) {
    const int d = block.head_dim, group = block.group;
    const bool rotated = v_is_rotated(cache);
    const Side side = has_side(cache) ? side_of(cache, table, kv_head, block.kv_heads, d) : Side();
    const int64_t k_bytes = kv_head_bytes(cache.k_dtype, d, 0), v_bytes = kv_head_bytes(cache.v_dtype, d, 1);
    PairsOfK pairs;
    if (cache.k_dtype == KV_Q8) split_queries_q8(block);
    for (; page < end; page++) {
        const Seen seen = seen_of(block, table.base[page]);
        if (seen.from == seen.to) continue;
        const Pieces k = pieces_of_k(block, cache, table, side, page, kv_head), v = pieces_of_v(block, cache, table, side, page, kv_head);
        const char *ahead = page + 1 < end ? k_of(cache, table.page[page + 1], kv_head, d) : next_k;
        const int first = seen.from * group, last = seen.to * group, first_block = seen.low / 16, last_block = (seen.high + 15) / 16;
        for (int j = 0; j < k.n; j++) {
            const Piece &piece = k.piece[j];
            const int from = piece.first > first_block ? piece.first : first_block, to = piece.last < last_block ? piece.last : last_block;
            if (from >= to) continue;
            const Next next{v.piece[v.n - 1].data, v_bytes};
            if (piece.dtype == KV_Q8) {
                const CodesOfK codes{piece.data, (int64_t)d * 16, chunks_of_k(KV_Q8, d), parts_of_k(KV_Q8, d),
                                     (const uint16_t *)(piece.data + KV_PAGE * d), d / kv_q8_group(d)};
                scores_int8(block, codes, false, from, to, first, last, next);
            } else if (piece.dtype == KV_Q4) {
                pairs.read(piece.data, d);
                split_queries_q4(block, pairs, first, last);
                cut_k_q4(piece.data, pairs, d, from, to, block.codes);
                const int chunks = chunks_of_k(KV_Q4, d), parts = parts_of_k(KV_Q4, d);
                const CodesOfK codes{block.codes, chunks * 1024, chunks, parts, nullptr, chunks * parts};
                scores_int8(block, codes, true, from, to, first, last, next);
            } else {
                for (int i = first, n; i < last; i += n) {
                    n = pass_of(last - i);
                    scores_exact(piece, n, from, to, d, block.q + (int64_t)i * d, block.s + i * block.s_stride, block.s_stride, next.data);
                }
            }
        }
        for (int i = first; i < last; i++) {
            const bool fresh = block.l[i] == 0;
            block.keep[i] = softmax_page(block.s + i * block.s_stride, seen.low_of(block, i / group), seen.high_of(block, i / group),
                                         first_block, last_block, block.softcap, block.m[i], block.l[i]);
            if (fresh) memset(block.o + (int64_t)i * d, 0, sizeof(float) * (size_t)d);
        }
        const Next next{ahead, k_bytes};
        for (int j = 0; j < v.n; j++) {
            const Piece &piece = v.piece[j];
            const int from = 16 * piece.first > seen.low ? 16 * piece.first : seen.low, to = 16 * piece.last < seen.high ? 16 * piece.last : seen.high;
            if (from >= to) continue;
            if (piece.dtype == KV_Q8) {
                sums_int8<false>(block, seen, piece.data, (const uint16_t *)(piece.data + KV_PAGE * d), nullptr, kv_q8_group(d), from, to, first,
                                 last, next);
            } else if (piece.dtype == KV_Q4) {
                const uint16_t *scale = (const uint16_t *)(piece.data + KV_PAGE * d / 2);
                const int width = kv_q4_group(d);
                cut_v_q4(piece.data, d, from, to, block.codes);
                sums_int8<true>(block, seen, block.codes, scale, scale + d / width * KV_PAGE, width, from, to, first, last, next);
            } else {
                for (int i = first, n; i < last; i += n) {
                    n = pass_of(last - i);
                    const int low = seen.low_of(block, i / group), high = seen.high_of(block, (i + n - 1) / group);
                    const int begin = low > from ? low : from, stop = high < to ? high : to;
                    if (begin < stop)
                        sums_exact(piece, rotated, n, begin, stop, d, block.s + i * block.s_stride, block.s_stride, block.o + (int64_t)i * d,
                                block.keep + i, ahead);
                    else                       // no slot of these rows, but what they had may shrink
                        for (int c = 0; c < n * d; c += 16)
                            store(block.o + (int64_t)i * d + c, load(block.o + (int64_t)i * d + c) * splat(block.keep[i + c / d]));
                }
            }
            for (int i = first; i < last; i++) block.keep[i] = 1;
        }
    }
}

}  // namespace KV_NS
