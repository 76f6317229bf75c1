// quant_pages.h - what attention needs of quantized pages whatever the instruction set: which parts of a page lie where, and
// the exact ones among them.
#pragma once
#include "bytes.h"
#include "rotate.h"

namespace KV_NS {

// Blocks of 16 slots [first, last) of a page, and where they lie as if the page began there.
struct Piece { const char *data; int dtype, first, last; };
struct Pieces { Piece piece[2]; int n; };

// KV_Q4: the rows' own page and the first slots of a sequence are exact (see kv_cache).
static inline Pieces pieces_of(int dtype, const char *page, const uint16_t *open, const uint16_t *sinks, bool own, bool oldest) {
    const int all = KV_PAGE / KV_LANES, exact = KV_SINKS / KV_LANES;
    if (dtype != KV_Q4) return {{{page, dtype, 0, all}, {}}, 1};
    if (own) return {{{(const char *)open, KV_BF16, 0, all}, {}}, 1};
    if (oldest) return {{{(const char *)sinks, KV_BF16, 0, exact}, {page, KV_Q4, exact, all}}, 2};
    return {{{page, KV_Q4, 0, all}, {}}, 1};
}

static inline Pieces pieces_of_k(const Block &block, const kv_cache &cache, const kv_table &table, const Side &side, int page, int kv_head) {
    return pieces_of(cache.k_dtype, k_of(cache, table.page[page], kv_head, block.head_dim), side.k_open, side.k_sinks,
                     table.base[page] == block.own, table.base[page] == 0);
}
static inline Pieces pieces_of_v(const Block &block, const kv_cache &cache, const kv_table &table, const Side &side, int page, int kv_head) {
    return pieces_of(cache.v_dtype, v_of(cache, table.page[page], kv_head, block.head_dim), side.v_open, side.v_sinks,
                     table.base[page] == block.own, table.base[page] == 0);
}

template <class F>
static void scores_stored(const Piece &piece, int n, int from, int to, int d, const float *q, float *s, int64_t s_stride, const char *ahead) {
    pass<F>(n, (const typename F::T *)piece.data + (int64_t)from * d * 16, (int64_t)32, (int64_t)d * 16, to - from, 0, d / 2, false,
            q, (int64_t)d, s + 16 * from, s_stride, (const float *)nullptr, ahead);
}

// Scores of n queries in the blocks [from, to) of a piece that is not quantized.
static void scores_exact(const Piece &piece, int n, int from, int to, int d, const float *q, float *s, int64_t s_stride, const char *ahead) {
    if (piece.dtype == KV_F32) scores_stored<StoredF32>(piece, n, from, to, d, q, s, s_stride, ahead);
    else if (piece.dtype == KV_F16) scores_stored<StoredF16>(piece, n, from, to, d, q, s, s_stride, ahead);
    else scores_stored<StoredBf16>(piece, n, from, to, d, q, s, s_stride, ahead);
}

template <class F>
static void sums_stored(const Piece &piece, int n, int low, int high, int d, const float *p, int64_t p_stride, float *out,
                        const float *keep, const char *ahead) {
    pass<F>(n, (const typename F::T *)piece.data, (int64_t)d * 2, (int64_t)32, d / 16, low / 2, high / 2, high % 2 != 0, p, p_stride,
            out, (int64_t)d, keep, ahead);
}

// out = keep*out + weighted sums of V of the slots [low, high) of a piece that is not quantized; rotated: out is of rotated V.
static void sums_exact(const Piece &piece, bool rotated, int n, int low, int high, int d, const float *p, int64_t p_stride, float *out,
                       const float *keep, const char *ahead) {
    if (rotated) {
        float exact[TILE * KV_MAX_QUANT_DIM];
        sums_stored<StoredBf16>(piece, n, low, high, d, p, p_stride, exact, nullptr, ahead);
        for (int j = 0; j < n; j++) {
            rotate(exact + j * d, d);
            for (int c = 0; c < d; c += 16) store(out + j * d + c, fma(load(out + j * d + c), splat(keep[j]), load(exact + j * d + c)));
        }
    } else if (piece.dtype == KV_F32) sums_stored<StoredF32>(piece, n, low, high, d, p, p_stride, out, keep, ahead);
    else if (piece.dtype == KV_F16) sums_stored<StoredF16>(piece, n, low, high, d, p, p_stride, out, keep, ahead);
    else sums_stored<StoredBf16>(piece, n, low, high, d, p, p_stride, out, keep, ahead);
}

}  // namespace KV_NS
