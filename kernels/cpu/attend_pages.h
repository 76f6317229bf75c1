// attend_pages.h - scores, softmax and weighted V of one page.
#pragma once
#include "half.h"

namespace KV_NS {

// How 32 stored numbers (16 pairs) become two vectors, how a pair of factors meets them, and how two sums of products
// become one sum per pair.
struct StoredBf16 {
    using T = uint16_t;
    static inline void load2(const T *p, f32x16 &a, f32x16 &b) { load_bf16_pairs(p, a, b); }
    static inline void drop_odd(f32x16 &, f32x16 &b) { b = splat(0); }
    static inline void multiply(const float *w, f32x16 a, f32x16 b, f32x16 &sum_a, f32x16 &sum_b) {
        sum_a = fma(splat(w[0]), a, sum_a);
        sum_b = fma(splat(w[1]), b, sum_b);
    }
    static inline f32x16 finish(f32x16 a, f32x16 b) { return a + b; }
    static inline float value(const T *p) { return kv::bf16_to_f32(*p); }
};
template <class Load> struct StoredInOrder : Load {
    using T = typename Load::T;
    static inline void load2(const T *p, f32x16 &a, f32x16 &b) { a = Load::load16(p), b = Load::load16(p + 16); }
    static inline void drop_odd(f32x16 &a, f32x16 &b) { a = even_lanes(a), b = even_lanes(b); }
    static inline void multiply(const float *w, f32x16 a, f32x16 b, f32x16 &sum_a, f32x16 &sum_b) {
        const f32x16 pair = splat_pair(w);
        sum_a = fma(pair, a, sum_a);
        sum_b = fma(pair, b, sum_b);
    }
    static inline f32x16 finish(f32x16 a, f32x16 b) { return add_neighbours(a, b); }
};
struct LoadF16 {
    using T = uint16_t;
    static inline f32x16 load16(const T *p) { return load_f16(p); }
    static inline float value(const T *p) { return kv::f16_to_f32(*p); }
};
struct LoadF32 {
    using T = float;
    static inline f32x16 load16(const T *p) { return load(p); }
    static inline float value(const T *p) { return *p; }
};
using StoredF16 = StoredInOrder<LoadF16>;
using StoredF32 = StoredInOrder<LoadF32>;

// out[q][16*b + lane] = keep[q]*out + sum over pairs j in [from, to) of w[q][2j], w[q][2j+1] times the pair of that
// lane in data[j*row + b*block]; `half` adds the even member alone of pair `to`. keep null: out is overwritten.
// K: pairs are channels, lanes tokens. V: pairs are tokens, lanes channels.
template <class F, int NQ, int NB>
static inline void pair_sums(const typename F::T *data, int64_t row, int64_t block, int from, int to, bool half,
                             const float *w, int64_t w_stride, float *out, int64_t out_stride, const float *keep,
                             const char *ahead) {
    f32x16 sum[NQ][NB][2];
#pragma GCC unroll 16
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) sum[q][b][0] = sum[q][b][1] = splat(0);
    for (int j = from; j < to; j++) {
        const typename F::T *p = data + j * row;
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            f32x16 x, y;
            F::load2(p + b * block, x, y);
            if (ahead) __builtin_prefetch(ahead, 0, 2), ahead += 32 * sizeof(typename F::T);
#pragma GCC unroll 16
            for (int q = 0; q < NQ; q++) F::multiply(w + q * w_stride + 2 * j, x, y, sum[q][b][0], sum[q][b][1]);
        }
    }
    if (half) {
        const typename F::T *p = data + to * row;
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            f32x16 x, y;
            F::load2(p + b * block, x, y);
            F::drop_odd(x, y);
#pragma GCC unroll 16
            for (int q = 0; q < NQ; q++) F::multiply(w + q * w_stride + 2 * to, x, y, sum[q][b][0], sum[q][b][1]);
        }
    }
#pragma GCC unroll 16
    for (int q = 0; q < NQ; q++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            float *to16 = out + q * out_stride + 16 * b;
            const f32x16 s = F::finish(sum[q][b][0], sum[q][b][1]);
            store(to16, keep ? fma(load(to16), splat(keep[q]), s) : s);
        }
}

// The same for any number of blocks.
template <class F, int NQ, int NB>
static void all_blocks(const typename F::T *data, int64_t row, int64_t block, int blocks, int from, int to, bool half,
                       const float *w, int64_t w_stride, float *out, int64_t out_stride, const float *keep,
                       const char *ahead) {
    int b = 0;
    const int64_t line = 32 * sizeof(typename F::T);
    for (; b + NB <= blocks; b += NB, out += 16 * NB, ahead += ahead ? NB * (to - from) * line : 0)
        pair_sums<F, NQ, NB>(data + b * block, row, block, from, to, half, w, w_stride, out, out_stride, keep, ahead);
    for (; b < blocks; b++, out += 16, ahead += ahead ? (to - from) * line : 0)
        pair_sums<F, NQ, 1>(data + b * block, row, block, from, to, half, w, w_stride, out, out_stride, keep, ahead);
}

// Queries that one pass takes of n left, and how many blocks at once: what fits the registers.
#if defined(__AVX512F__)
static inline int pass_of(int n) {
    static const int8_t best[TILE + 1] = {0, 1, 2, 3, 4, 3, 6, 4, 8, 6, 6, 8, 12};
    return best[n < TILE ? n : TILE];
}
#define KV_PASSES(X) X(1, 2) X(2, 2) X(3, 2) X(4, 2) X(6, 2) X(8, 1) X(12, 1)
#else
static inline int pass_of(int n) { return n < 3 ? n : 3; }
#define KV_PASSES(X) X(1, 2) X(2, 1) X(3, 1)
#endif

template <class F, class... Args> static inline void pass(int n, Args... args) {
    switch (n) {
#define KV_PASS(NQ, NB) case NQ: return all_blocks<F, NQ, NB>(args...);
        KV_PASSES(KV_PASS)
#undef KV_PASS
    }
}

// By how much what was summed under the maximum m before shrinks.
static inline float shrink(float m, float new_m) { return m == new_m ? 1.f : m == LOWEST ? 0.f : first(exp(splat(m - new_m))); }

// softmax_page where all slots of the page are seen, in two halves, for queries in turn to wait less: the new maximum, then the rest,
// which returns lanes that add up to the page's sum.
static inline float top_of_whole_page(const float *s, float m) {
    f32x16 x[KV_PAGE / 16];
    for (int b = 0; b < KV_PAGE / 16; b++) x[b] = load(s + 16 * b);
    for (int n = KV_PAGE / 32; n > 0; n /= 2)
        for (int b = 0; b < n; b++) x[b] = max(x[b], x[b + n]);
    return max(max(splat(m), x[0]));
}
static inline f32x16 softmax_whole_page(float *s, float new_m) {
    f32x16 sums[2] = {splat(0), splat(0)};
    for (int b = 0; b < KV_PAGE / 16; b++) {
        const f32x16 p = exp_below(load(s + 16 * b) - splat(new_m));
        sums[b % 2] = sums[b % 2] + p;
        store(s + 16 * b, p);
    }
    return sums[0] + sums[1];
}

// Turns one query's scores of the slots [low, high) of a page into probabilities relative to the new maximum, zero in the other
// slots of blocks [first, last), and the lanes of `sums` into what adds up to theirs; returns by how much what was summed before shrinks.
static inline float softmax_page(float *s, int low, int high, int first_block, int last_block, float softcap, float &m, f32x16 &sums) {
    if (low == 0 && high == KV_PAGE && softcap <= 0) {
        const float new_m = top_of_whole_page(s, m), keep = shrink(m, new_m);
        sums = softmax_whole_page(s, new_m);
        m = new_m;
        return keep;
    }
    f32x16 top = splat(m);
    for (int b = low / 16; b * 16 < high; b++) {
        f32x16 x = load(s + 16 * b);
        if (softcap > 0) {
            x = splat(softcap) * tanh(x);
            store(s + 16 * b, x);
        }
        top = max(top, slots_inside(b, low, high, x, splat(LOWEST)));
    }
    const float new_m = max(top);
    sums = splat(0);
    for (int b = first_block; b < last_block; b++) {
        f32x16 p = splat(0);
        if (16 * b < high && 16 * b + 16 > low) {
            p = slots_inside(b, low, high, exp_below(load(s + 16 * b) - splat(new_m)), splat(0));
            sums = sums + p;
        }
        store(s + 16 * b, p);
    }
    const float keep = shrink(m, new_m);
    m = new_m;
    return keep;
}

// Channels past the last whole 16 of a head.
template <class F>
static void odd_channels(const typename F::T *v, int dim, int from_channel, int low, int high, const float *p, float *out, float keep) {
    for (int c = from_channel; c < dim; c++) {
        float s = 0;
        for (int t = low; t < high; t++) s += p[t] * F::value(v + kv_v_index(t, c, dim));
        out[c] = out[c] * keep + s;
    }
}

template <class K, class V>
static void attend_pages(Block &block, const kv_cache &cache, const kv_table &table, int page, int end, int kv_head,
                         Next next) {
    const int d = block.head_dim, group = block.group, blocks_v = d / 16;
    for (; page < end; page++) {
        const Seen seen = seen_of(block, table.base[page]);
        if (seen.from == seen.to) continue;
        const int from = seen.from, to = seen.to;
        const auto *k = (const typename K::T *)k_of(cache, table.page[page], kv_head, d);
        const auto *v = (const typename V::T *)v_of(cache, table.page[page], kv_head, d);
        const char *ahead = page + 1 < end ? k_of(cache, table.page[page + 1], kv_head, d) : next.k;
        for (int i = from * group, n; i < to * group; i += n) {
            n = pass_of(to * group - i);
            const int low = seen.low_of(block, i / group), high = seen.high_of(block, (i + n - 1) / group);
            const int first_block = low / 16, last_block = (high + 15) / 16;
            const bool leads = i == from * group;     // the first pass brings the lines, so it asks for those to come
            pass<K>(n, k + (int64_t)first_block * d * 16, (int64_t)32, (int64_t)d * 16, last_block - first_block, 0, d / 2, false,
                    (const float *)block.q + (int64_t)i * d, (int64_t)d, block.s + 16 * first_block, block.s_stride,
                    (const float *)nullptr, leads ? (const char *)v : nullptr);
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
            pass<V>(n, v, (int64_t)d * 2, (int64_t)32, blocks_v, low / 2, high / 2, high % 2 != 0, (const float *)block.s,
                    block.s_stride, block.o + (int64_t)i * d, (int64_t)d, (const float *)keep, leads ? ahead : nullptr);
            if (blocks_v * 16 < d)
                for (int j = 0; j < n; j++)
                    odd_channels<V>(v, d, blocks_v * 16, low, high, block.s + j * block.s_stride, block.o + (int64_t)(i + j) * d, keep[j]);
        }
    }
}

template <class K> static Pages pages_for_v(int v_dtype) {
    return v_dtype == KV_F32 ? attend_pages<K, StoredF32> : v_dtype == KV_F16 ? attend_pages<K, StoredF16> : attend_pages<K, StoredBf16>;
}
static Pages pages_for(int k_dtype, int v_dtype) {
    return k_dtype == KV_F32 ? pages_for_v<StoredF32>(v_dtype)
         : k_dtype == KV_F16 ? pages_for_v<StoredF16>(v_dtype) : pages_for_v<StoredBf16>(v_dtype);
}

}  // namespace KV_NS
