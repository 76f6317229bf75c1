// attend_quant.h - one page of a cache with quantized K, V or both, in floats: for CPUs without int8 tiles.
#pragma once
#include "quant_v.h"

namespace KV_NS {

// Scores of n queries in the blocks [from, to) of a piece.
static void scores_of(const Piece &piece, const PairedChannels &paired, int n, int from, int to, int d, const float *q, float *s,
                      int64_t s_stride, const char *ahead) {
    if (piece.dtype == KV_Q8 && kv_q8_group(d) == 32) {
        switch (n) {
#define KV_CASE(NQ) case NQ: return scores_q8<NQ, 32>(piece.data, d, from, to, q, d, s, s_stride, ahead);
            KV_COUNTS(KV_CASE)
#undef KV_CASE
        }
    } else if (piece.dtype == KV_Q8) {
        switch (n) {
#define KV_CASE(NQ) case NQ: return scores_q8<NQ, 16>(piece.data, d, from, to, q, d, s, s_stride, ahead);
            KV_COUNTS(KV_CASE)
#undef KV_CASE
        }
    } else if (piece.dtype == KV_Q4) {
        switch (n) {
#define KV_CASE(NQ) case NQ: return scores_q4<NQ>(paired, from, to, q, d, s, s_stride, ahead);
            KV_COUNTS(KV_CASE)
#undef KV_CASE
        }
    } else scores_exact(piece, n, from, to, d, q, s, s_stride, ahead);
}

// out = keep*out + weighted sums of V of the slots [low, high) of a piece; rotated: out is of rotated V.
static void sums_of(const Piece &piece, const ScalesOfV &scales, bool rotated, int n, int low, int high, int d, const float *p,
                    int64_t p_stride, float *out, const float *keep, const char *ahead) {
    if (piece.dtype == KV_Q8 && kv_q8_group(d) == 32) {
        switch (n) {
#define KV_CASE(NQ) case NQ: return sums_q8<NQ, 32>(scales, low, high, p, p_stride, out, d, keep, ahead);
            KV_COUNTS(KV_CASE)
#undef KV_CASE
        }
    } else if (piece.dtype == KV_Q8) {
        switch (n) {
#define KV_CASE(NQ) case NQ: return sums_q8<NQ, 16>(scales, low, high, p, p_stride, out, d, keep, ahead);
            KV_COUNTS(KV_CASE)
#undef KV_CASE
        }
    } else if (piece.dtype == KV_Q4) {
        switch (n) {
#define KV_CASE(NQ) case NQ: return sums_q4<NQ>(scales, low, high, p, p_stride, out, d, keep, ahead);
            KV_COUNTS(KV_CASE)
#undef KV_CASE
        }
    } else sums_exact(piece, rotated, n, low, high, d, p, p_stride, out, keep, ahead);
}

static void attend_pages_quant(Block &block, const kv_cache &cache, const kv_table &table, int page, int end, int kv_head,
                               Next next) {
    const int d = block.head_dim, group = block.group;
    const bool rotated = v_is_rotated(cache);
    static const float ones[TILE] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const Side side = has_side(cache) ? side_of(cache, table, kv_head, block.kv_heads, d) : Side();
    PairedChannels paired;
    ScalesOfV scales;
    for (; page < end; page++) {
        const Seen seen = seen_of(block, table.base[page]);
        if (seen.from == seen.to) continue;
        const Pieces k = pieces_of_k(block, cache, table, side, page, kv_head), v = pieces_of_v(block, cache, table, side, page, kv_head);
        const char *ahead = page + 1 < end ? k_of(cache, table.page[page + 1], kv_head, d) : next.k;
        if (k.piece[k.n - 1].dtype == KV_Q4) paired.read(k.piece[k.n - 1].data, d);
        if (v.piece[v.n - 1].dtype == KV_Q8) scales.read_q8(v.piece[v.n - 1].data, d);
        if (v.piece[v.n - 1].dtype == KV_Q4) scales.read_q4(v.piece[v.n - 1].data, d);
        for (int i = seen.from * group, n; i < seen.to * group; i += n) {
            n = pass_of(seen.to * group - i);
            const int low = seen.low_of(block, i / group), high = seen.high_of(block, (i + n - 1) / group);
            const int first_block = low / 16, last_block = (high + 15) / 16;
            const bool leads = i == seen.from * group;
            for (int j = 0; j < k.n; j++) {
                const Piece &piece = k.piece[j];
                const int from = piece.first > first_block ? piece.first : first_block;
                const int to = piece.last < last_block ? piece.last : last_block;
                if (from < to)
                    scores_of(piece, paired, n, from, to, d, block.q + (int64_t)i * d, block.s, block.s_stride,
                              leads ? v.piece[v.n - 1].data : nullptr);
            }
            float keep[TILE];
            for (int j = 0; j < n; j++) {
                const int r = (i + j) / group;
                const bool fresh = block.l[i + j] == 0;
                f32x16 sums;
                keep[j] = softmax_page(block.s + j * block.s_stride, seen.low_of(block, r), seen.high_of(block, r), first_block,
                                       last_block, block.softcap, block.m[i + j], sums);
                block.l[i + j] = block.l[i + j] * keep[j] + sum(sums);
                if (fresh) memset(block.o + (int64_t)(i + j) * d, 0, sizeof(float) * (size_t)d);
            }
            const float *keeps = keep;
            for (int j = 0; j < v.n; j++) {
                const Piece &piece = v.piece[j];
                const int from = 16 * piece.first > low ? 16 * piece.first : low, to = 16 * piece.last < high ? 16 * piece.last : high;
                if (from >= to) continue;
                sums_of(piece, scales, rotated, n, from, to, d, block.s, block.s_stride, block.o + (int64_t)i * d, keeps,
                        leads ? ahead : nullptr);
                keeps = ones;
            }
        }
    }
}

}  // namespace KV_NS
