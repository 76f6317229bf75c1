// attend.h - the inner part of attention: a block of queries against the pages of one part of the positions.
#pragma once
#include <initializer_list>

#include "kernels.h"
#include "lanes.h"
#include "pages.h"

namespace KV_NS {

static const float LOWEST = -1e30f;        // stands for minus infinity without making NaN of a difference

static inline float first(f32x16 a) {
    float t[16];
    store(t, a);
    return t[0];
}

// e^x for x <= 0, within 2e-7 of it for x > -10; NaN stays NaN. 2^r, |r| <= 1/2, by the polynomial of least relative error that is 1 at 0.
static inline f32x16 exp_below(f32x16 x) {
    x = max(splat(-87.f), x);
    const f32x16 magic = splat(12582912.f), log2e = splat(1.44269504f), t = fma(x, log2e, magic), r = fma(x, log2e, magic - t);
    f32x16 p = splat(1.3264727e-3f);
    p = fma(p, r, splat(9.6715127e-3f));
    p = fma(p, r, splat(5.5507337e-2f));
    p = fma(p, r, splat(2.4022242e-1f));
    p = fma(p, r, splat(6.9314698e-1f));
    return fma(p, r, splat(1.f)) * exp2_magic(t);
}

// Queries of consecutive rows of one sequence that share a KV head: row-major [rows][group].
struct Block {
    int group, rows, head_dim, window, kv_heads;
    int own;                               // base of the page that a KV_Q4 cache holds exact for these rows, else -1
    float softcap;
    bool split;                            // q8 holds q; for KV_Q8 of K on int8 tiles only
    const char *asked;                     // the V that was asked for already; for int8 tiles only
    const int32_t *pos;                    // [rows], ascending
    float *q;                              // [queries][head_dim], times scale (over softcap); rotated for KV_Q8
    float *s;                              // [queries of a pass][s_stride] scores, then probabilities
    int64_t s_stride;
    float *o, *m, *l;                      // the part: [queries][head_dim], [queries], [queries]
    float *total, *total_m, *total_l;      // all parts so far
    float *keep;                           // [queries]
    uint16_t *q16, *p16, *tail;            // two terms of q and of the probabilities, and a piece of V; for 16-bit tiles only
    uint16_t *terms;                       // two terms of the K, then of the V, of a KV_F16 page
    int64_t q_term, p_term, page_term;
    int8_t *q8, *p8;                       // bytes of q and of the probabilities; for int8 tiles only, as what follows
    int64_t q8_rows;
    float *q8_factor, *p8_factor, *k_zero;
    float *l16, *zero16;                   // lanes that add up to l, and [widths] to what V's zeros add to a stretch of o: [queries][16]
    int32_t *c32;
    char *k_codes, *v_codes;               // KV_Q4: the codes in the lower bits of K; those of V cut in two

    void start() {
        for (int i = 0; i < rows * group; i++) m[i] = LOWEST, l[i] = 0;
    }
};

static const int TILE = 12;                // most queries of one pass of the vector kernel
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define KV_TILES 1
#else
#define KV_TILES 0
#endif
static const bool TILES = KV_TILES;

// What an int8 tile sums over, in bytes of K: KV_Q8 has chunks of 64 channels (the last may be padding), cut into parts that
// have a factor each; KV_Q4 has chunks of pairs of channels, and as many again of the codes in their lower bits, under one factor.
static inline int chunks_of_k(int dtype, int d) { return dtype == KV_Q8 ? (d + 63) / 64 : 2 * ((d + 127) / 128); }
static inline int depth_of_k(int dtype, int d) { return dtype == KV_Q4 ? d / chunks_of_k(KV_Q4, d) : 64; }
static inline int parts_of_k(int dtype, int d) { return dtype == KV_Q8 ? 64 / kv_q8_group(d) : 1; }

// Channels of V that share a scale, and how many tiles of sums there are before they are read.
static inline int width_of_v(int dtype, int d) { return dtype == KV_Q4 ? kv_q4_group(d) : kv_q8_group(d); }
static const int TILES_AT_ONCE = 8;
static const int CHUNK = 64;               // what one int8 tile sums over: channels of K, tokens of V

static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

static inline bool is_quantized(int dtype) { return dtype == KV_Q8 || dtype == KV_Q4; }
static inline bool is_quantized(const kv_cache &cache) { return is_quantized(cache.k_dtype) || is_quantized(cache.v_dtype); }

// Lays a block out from `at` on; returns the floats that it takes.
static inline int64_t block_in(Block &b, float *at, int queries, int head_dim, const kv_cache &cache) {
    const bool int8 = TILES && is_quantized(cache), bits16 = TILES && !int8 && cache.k_dtype != KV_F32;
    const int64_t n = padded(queries), matrix = n * head_dim;
    float *const begin = at;
    auto take = [&](int64_t floats) {
        float *p = at;
        at += padded(floats);
        return p;
    };
    b.s_stride = TILES && head_dim > KV_PAGE ? head_dim : KV_PAGE;
    b.q = take(matrix);
    b.o = take(matrix);
    b.total = take(matrix);
    b.s = take((TILES && n > TILE ? n : TILE) * b.s_stride);
    b.m = take(n);
    b.l = take(n);
    b.total_m = take(n);
    b.total_l = take(n);
    b.keep = take(n);
    b.q_term = matrix;
    b.p_term = n * KV_PAGE;
    b.page_term = (int64_t)KV_PAGE * head_dim;
    b.q16 = (uint16_t *)take(bits16 ? matrix : 0);
    b.p16 = (uint16_t *)take(bits16 ? b.p_term : 0);
    b.tail = (uint16_t *)take(bits16 ? 16 * head_dim : 0);
    b.terms = (uint16_t *)take(bits16 && cache.k_dtype == KV_F16 ? b.page_term : 0);
    if (int8) {
        const int chunks = chunks_of_k(cache.k_dtype, head_dim), parts = parts_of_k(cache.k_dtype, head_dim);
        const int width = width_of_v(cache.v_dtype, head_dim), widths = head_dim / width;
        // Sums of V: those of all widths at once for the queries of one tile, else those of one width.
        const int64_t rows = n > 8 * widths ? n : 8 * widths;
        int64_t tiles = TILES_AT_ONCE;
        const int64_t of_k = n * parts / 8 * (cache.k_dtype == KV_Q8 ? chunks : 1);
        for (const int64_t needed : {of_k, n / 8 * (width / 16), (int64_t)head_dim / 16})
            if (tiles < needed) tiles = needed;
        b.q8_rows = n * parts * 2;
        b.q8 = (int8_t *)take(chunks * b.q8_rows * 16);
        b.q8_factor = take(n * chunks * parts);
        b.p8 = (int8_t *)take(rows * 2 * KV_PAGE / 4);
        b.p8_factor = take(rows);
        b.k_zero = take(n + 4);                // four are written at once
        b.l16 = take(n * 16);
        b.zero16 = take(cache.v_dtype == KV_Q4 ? widths * n * 16 : 0);
        b.c32 = (int32_t *)take(tiles * 256);
        b.k_codes = (char *)take(cache.k_dtype == KV_Q4 ? KV_PAGE * head_dim / 8 : 0);
        b.v_codes = (char *)take(cache.v_dtype == KV_Q4 ? KV_PAGE * head_dim / 4 : 0);
    }
    return at - begin;
}
static inline int64_t block_floats(int queries, int head_dim, const kv_cache &cache) {
    Block b;
    return block_in(b, nullptr, queries, head_dim, cache);
}

// The rows of a block that see some slot of a page, and the slots that any of them sees.
struct Seen {
    int base, from, to, low, high;

    int low_of(const Block &b, int row) const {
        const int low = b.window ? b.pos[row] - b.window + 1 - base : 0;
        return low > 0 ? low : 0;
    }
    int high_of(const Block &b, int row) const {
        const int high = b.pos[row] - base + 1;
        return high < KV_PAGE ? high : KV_PAGE;
    }
};
static inline Seen seen_of(const Block &b, int base) {
    Seen seen{base, 0, b.rows, 0, 0};
    while (seen.from < seen.to && b.pos[seen.from] < base) seen.from++;
    while (b.window && seen.to > seen.from && b.pos[seen.to - 1] - b.window + 1 > base + KV_PAGE - 1) seen.to--;
    if (seen.from < seen.to) seen.low = seen.low_of(b, seen.from), seen.high = seen.high_of(b, seen.to - 1);
    return seen;
}

// x in the lanes of block b of a page that are slots in [low, high), otherwise `other`.
static inline f32x16 slots_inside(int b, int low, int high, f32x16 x, f32x16 other) {
    if (16 * b >= low && 16 * b + 16 <= high) return x;
    static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const f32x16 t = load(lanes) + splat((float)(16 * b));
    return select_less(t, splat((float)low), other, select_less(t, splat((float)high), x, other));
}

// Where K and V lie that will be read next; null where nothing will.
struct Next { const char *k, *v; };
static inline Next next_of(const kv_cache &cache, int page, int kv_head, int head_dim) {
    return {k_of(cache, page, kv_head, head_dim), v_of(cache, page, kv_head, head_dim)};
}

// Adds pages [page, end) of the table to the block's part. next: what is to be asked for meanwhile.
using Pages = void (*)(Block &, const kv_cache &, const kv_table &, int page, int end, int kv_head, Next next);

// Sums of V are of rotated V then, and rotated back at the end.
static inline bool v_is_rotated(const kv_cache &cache) { return is_quantized(cache.v_dtype); }

}  // namespace KV_NS

#include "attend_pages.h"
#if KV_TILES
#include "attend_amx.h"
#include "attend_int8.h"
#else
#include "attend_quant.h"
#endif
