// attend_int8.h - attention over quantized pages on AMX int8 tiles, for prompt and decode rows alike. The codes of K and V are
// the B operand as they lie (KV_Q4: with the lower bits of K once more, apart, and V cut in two). Queries and probabilities, with the
// scales of channels and tokens in them, become 16-bit integers of two bytes each, so a product is off by 2^-16 of its largest factor at most.
#pragma once
#include "int8_k.h"
#include "int8_v.h"

namespace KV_NS {

static void attend_pages_int8(Block &block, const kv_cache &cache, const kv_table &table, int page, int end, int kv_head, Next next) {
    const int d = block.head_dim, group = block.group;
    const bool rotated = v_is_rotated(cache);
    const Side side = has_side(cache) ? side_of(cache, table, kv_head, block.kv_heads, d) : Side();
    const int64_t k_bytes = kv_head_bytes(cache.k_dtype, d, 0), v_bytes = kv_head_bytes(cache.v_dtype, d, 1);
    PairsOfK pairs;
    if (cache.k_dtype == KV_Q8 && !block.split) split_queries_q8(block), block.split = true;
    // The sums of a part are kept by lanes, and added up at its end.
    const int64_t n = block.rows * group, zeros = cache.v_dtype == KV_Q4 ? d / kv_q4_group(d) * n : 0;
    memset(block.o, 0, sizeof(float) * (size_t)(n * d));
    memset(block.l16, 0, sizeof(float) * (size_t)(n * 16));
    memset(block.zero16, 0, sizeof(float) * (size_t)(zeros * 16));
    for (; page < end; page++) {
        const Seen seen = seen_of(block, table.base[page]);
        if (seen.from == seen.to) continue;
        const Pieces k = pieces_of_k(block, cache, table, side, page, kv_head), v = pieces_of_v(block, cache, table, side, page, kv_head);
        auto most_of = [](const Pieces &pieces) { return pieces.piece[pieces.n - 1].data; };
        Next then = next;
        if (page + 1 < end)
            then = {most_of(pieces_of_k(block, cache, table, side, page + 1, kv_head)), most_of(pieces_of_v(block, cache, table, side, page + 1, kv_head))};
        Ahead ahead(block.asked == most_of(v) ? nullptr : most_of(v), then, k_bytes, v_bytes, d);
        if (Ahead::whole_page(k_bytes, v_bytes)) block.asked = then.v;
        const int first = seen.from * group, last = seen.to * group, first_block = seen.low / 16, last_block = (seen.high + 15) / 16;
        for (int j = 0; j < k.n; j++) {
            const Piece &piece = k.piece[j];
            const int from = piece.first > first_block ? piece.first : first_block, to = piece.last < last_block ? piece.last : last_block;
            if (from >= to) continue;
            if (piece.dtype == KV_Q8) {
                const CodesOfK codes{piece.data, (int64_t)d * 16, chunks_of_k(KV_Q8, d), parts_of_k(KV_Q8, d),
                                     (const uint16_t *)(piece.data + KV_PAGE * d), d / kv_q8_group(d)};
                scores_q8(block, codes, from, to, first, last, ahead);
            } else if (piece.dtype == KV_Q4) {
                pairs.read(piece.data, d);
                cut_k_q4(piece.data, pairs, d, from, to, block.k_codes, ahead);
                split_queries_q4(block, pairs, first, last, ahead);
                scores_q4(block, piece.data, block.k_codes, from, to, first, last, ahead);
            } else {
                for (int i = first, n; i < last; i += n) {
                    n = pass_of(last - i);
                    scores_exact(piece, n, from, to, d, block.q + (int64_t)i * d, block.s + i * block.s_stride, block.s_stride, nullptr);
                }
            }
        }
        for (int j = 0; j < v.n; j++)
            if (v.piece[j].dtype == KV_Q4) cut_v_q4(v.piece[j].data, d, 16 * v.piece[j].first, 16 * v.piece[j].last, block.v_codes, ahead);
        const bool whole = block.softcap <= 0 && seen.low_of(block, seen.to - 1) == 0 && seen.high_of(block, seen.from) == KV_PAGE;
        if (whole)
            for (int i = first; i < last; i++) block.keep[i] = top_of_whole_page(block.s + i * block.s_stride, block.m[i]);
        for (int i = first; i < last; i++) {
            float *s = block.s + i * block.s_stride;
            float keep, *const l16 = block.l16 + 16 * i;
            f32x16 sums;
            if (whole) {
                sums = softmax_whole_page(s, block.keep[i]);
                keep = shrink(block.m[i], block.keep[i]);
                block.m[i] = block.keep[i];
            } else {
                keep = softmax_page(s, seen.low_of(block, i / group), seen.high_of(block, i / group), first_block, last_block, block.softcap,
                                    block.m[i], sums);
            }
            store(l16, fma(load(l16), splat(keep), sums));
            for (int64_t j = i; j < zeros; j += n) store(block.zero16 + 16 * j, load(block.zero16 + 16 * j) * splat(keep));
            block.keep[i] = keep;
            ahead.lines(ahead.between);
        }
        for (int j = 0; j < v.n; j++) {
            const Piece &piece = v.piece[j];
            const int from = 16 * piece.first > seen.low ? 16 * piece.first : seen.low, to = 16 * piece.last < seen.high ? 16 * piece.last : seen.high;
            if (from >= to) continue;
            if (piece.dtype == KV_Q8) {
                sums_int8<false>(block, seen, piece.data, (const uint16_t *)(piece.data + KV_PAGE * d), nullptr, kv_q8_group(d), from, to, first,
                                 last, ahead);
            } else if (piece.dtype == KV_Q4) {
                const uint16_t *scale = (const uint16_t *)(piece.data + KV_PAGE * d / 2);
                const int width = kv_q4_group(d);
                sums_int8<true>(block, seen, block.v_codes, scale, scale + d / width * KV_PAGE, width, from, to, first, last, ahead);
            } else {
                for (int i = first, n; i < last; i += n) {
                    n = pass_of(last - i);
                    const int low = seen.low_of(block, i / group), high = seen.high_of(block, (i + n - 1) / group);
                    const int begin = low > from ? low : from, stop = high < to ? high : to;
                    if (begin < stop)
                        sums_exact(piece, rotated, n, begin, stop, d, block.s + i * block.s_stride, block.s_stride, block.o + (int64_t)i * d,
                                block.keep + i, nullptr);
                    else                       // no slot of these rows, but what they had may shrink
                        for (int c = 0; c < n * d; c += 16)
                            store(block.o + (int64_t)i * d + c, load(block.o + (int64_t)i * d + c) * splat(block.keep[i + c / d]));
                }
            }
            for (int i = first; i < last; i++) block.keep[i] = 1;
        }
        ahead.rest();
    }
    for (int i = 0; i < n; i++) {
        block.l[i] = sum(load(block.l16 + 16 * i));
        float *o = block.o + (int64_t)i * d;
        for (int64_t j = i; j < zeros; j += n) {
            const f32x16 zero = splat(sum(load(block.zero16 + 16 * j)));
            for (const float *end = o + kv_q4_group(d); o < end; o += 16) store(o, load(o) + zero);
        }
    }
}

}  // namespace KV_NS
