// attend_amx.h - prompt attention over 16-bit pages on AMX tiles: the layouts of K and V are its B operand, bfloat16 as it
// lies, float16 after it is cut into two bfloat16 terms (value and remainder), which hold all of its bits. Queries and
// probabilities go in as two terms each, so that nothing but the order of additions differs from float32.
#pragma once
#include "half.h"

namespace KV_NS {

static bool tiles_fit(const kv_op_attend &op) {
    const int dtype = op.cache.k_dtype;
    return (dtype == KV_BF16 || dtype == KV_F16) && op.cache.v_dtype == dtype && op.head_dim % 32 == 0;
}

// out[16*M rows][16*N columns] = (a[0] + a[1]) (b[0] + b[1]) but for a[1] b[1], over `steps` steps of 32. Step i of a lies
// 64*i bytes on, its second term a_term; step i of b lies b_step*i on, or at `tail` when it is step tail_step; the next
// columns b_next on, the second term b_term, 0 for none.
struct Product {
    const char *a, *b, *tail;
    int64_t a_stride, a_term, b_stride, b_step, b_next, b_term;
    int from, to, tail_step;
};
template <int M, int N, bool TWO> static inline void multiply_tiles(const Product &p, float *out, int64_t out_stride) {
    asm volatile("" ::: "memory");             // tile loads do not tell the compiler that they read memory
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    const char *a = p.a + (int64_t)p.from * 64;
    for (int i = p.from; i < p.to; i++, a += 64) {
        const char *b = i == p.tail_step ? p.tail : p.b + i * p.b_step;
        _tile_loadd(6, b, p.b_stride);
        if constexpr (N == 2) _tile_loadd(7, b + p.b_next, p.b_stride);
        for (int term = 1; term >= 0; term--) {
            _tile_loadd(4, a + term * p.a_term, p.a_stride);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
            if constexpr (M == 2) {
                _tile_loadd(5, a + 16 * p.a_stride + term * p.a_term, p.a_stride);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (N == 2) _tile_dpbf16ps(3, 5, 7);
            }
        }
        if constexpr (TWO) {
            _tile_loadd(6, b + p.b_term, p.b_stride);
            if constexpr (N == 2) _tile_loadd(7, b + p.b_term + p.b_next, p.b_stride);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (N == 2) _tile_dpbf16ps(1, 4, 7);
            if constexpr (M == 2) _tile_dpbf16ps(2, 5, 6);
            if constexpr (M == 2 && N == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, out_stride * 4);
    if constexpr (N == 2) _tile_stored(1, out + 16, out_stride * 4);
    if constexpr (M == 2) _tile_stored(2, out + 16 * out_stride, out_stride * 4);
    if constexpr (M == 2 && N == 2) _tile_stored(3, out + 16 * out_stride + 16, out_stride * 4);
    asm volatile("" ::: "memory");
}

// Row tiles [m, m_end) times column tiles [n, n_end).
template <bool TWO> static void multiply_all(Product p, int m, int m_end, int n, int n_end, float *out, int64_t out_stride) {
    const char *a = p.a, *b = p.b, *tail = p.tail;
    for (; m < m_end; m += 2) {
        p.a = a + 16 * m * p.a_stride;
        for (int j = n; j < n_end; j += 2) {
            p.b = b + j * p.b_next;
            p.tail = tail + j * p.b_next;
            float *to = out + 16 * m * out_stride + 16 * j;
            if (m + 1 < m_end && j + 1 < n_end) multiply_tiles<2, 2, TWO>(p, to, out_stride);
            else if (m + 1 < m_end) multiply_tiles<2, 1, TWO>(p, to, out_stride);
            else if (j + 1 < n_end) multiply_tiles<1, 2, TWO>(p, to, out_stride);
            else multiply_tiles<1, 1, TWO>(p, to, out_stride);
        }
    }
}

// 32 floats as two terms of bfloat16.
static inline void split_terms(f32x16 a, f32x16 b, uint16_t *value, uint16_t *rest) {
    const __m512i v = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
    const __m512 a_v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)), 16));
    const __m512 b_v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1)), 16));
    _mm512_storeu_si512(value, v);
    _mm512_storeu_si512(rest, (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(b.v, b_v), _mm512_sub_ps(a.v, a_v)));
}

// One query's scores of slots [low, high) -> two-term probabilities of the slots of steps [from, to), zero where masked.
static inline float softmax_terms(const Block &block, int i, int low, int high, int from, int to, float &m, float &l) {
    float *s = block.s + (int64_t)i * block.s_stride;
    uint16_t *p = block.p16 + (int64_t)i * KV_PAGE;
    if (block.softcap > 0)
        for (int b = low / 16; b * 16 < high; b++) store(s + 16 * b, splat(block.softcap) * tanh(load(s + 16 * b)));
    f32x16 top = splat(m);
    for (int b = low / 16; b * 16 < high; b++) top = max(top, slots_inside(b, low, high, load(s + 16 * b), splat(LOWEST)));
    const float new_m = max(top);
    f32x16 sums = splat(0);
    for (int step = from; step < to; step++) {
        f32x16 x[2];
        for (int j = 0; j < 2; j++) {
            const int b = 2 * step + j;
            x[j] = splat(0);
            if (16 * b < high && 16 * b + 16 > low) {
                x[j] = slots_inside(b, low, high, exp_below(load(s + 16 * b) - splat(new_m)), splat(0));
                sums = sums + x[j];
            }
        }
        split_terms(x[0], x[1], p + 32 * step, p + block.p_term + 32 * step);
    }
    const float keep = l == 0 ? 0.f : first(exp(splat(m - new_m)));
    l = l * keep + sum(sums);
    m = new_m;
    return keep;
}

// The queries as two terms; rows up to the next multiple of 16 are zero.
static void split_queries(Block &block) {
    const int64_t d = block.head_dim, n = (int64_t)block.rows * block.group;
    for (int64_t i = 0; i < padded(n) * d; i += 32) {
        const bool there = i < n * d;
        split_terms(there ? load(block.q + i) : splat(0), there ? load(block.q + i + 16) : splat(0), block.q16 + i,
                    block.q16 + block.q_term + i);
    }
}

// 32 float16 as two terms of bfloat16, `odd` false: with zeros in the place of the odd ones.
static inline void cut_f16(const uint16_t *from, bool odd, uint16_t *value, uint16_t *rest) {
    const __m512i all = _mm512_loadu_si512(from), x = odd ? all : _mm512_and_si512(all, _mm512_set1_epi32(0xffff));
    split_terms({_mm512_cvtph_ps(_mm512_castsi512_si256(x))}, {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1))}, value, rest);
}

// Numbers [from, to) of a page's K or V into block.terms.
static void cut_page(const Block &block, const char *page, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i += 32) cut_f16((const uint16_t *)page + i, true, block.terms + i, block.terms + block.page_term + i);
}

static void zero_terms(const Block &block, int64_t from, int64_t to) {
    memset(block.terms + from, 0, sizeof(uint16_t) * (size_t)(to - from));
    memset(block.terms + block.page_term + from, 0, sizeof(uint16_t) * (size_t)(to - from));
}

template <bool F16>
static void attend_pages_tiles(Block &block, const kv_cache &cache, const kv_table &table, int page, int end, int kv_head,
                               Next) {
    const int d = block.head_dim, group = block.group;
    const int64_t term = F16 ? block.page_term * 2 : 0;
    split_queries(block);
    for (; page < end; page++) {
        const Seen seen = seen_of(block, table.base[page]);
        if (seen.from == seen.to) continue;
        const int first_query = seen.from * group, last_query = seen.to * group;
        const int m = first_query / 16, m_end = (last_query + 15) / 16, first_block = seen.low / 16, last_block = (seen.high + 15) / 16;
        const char *k = k_of(cache, table.page[page], kv_head, d), *v = v_of(cache, table.page[page], kv_head, d);
        if (F16) cut_page(block, k, first_block * 16 * d, last_block * 16 * d), k = (const char *)block.terms;
        const Product scores{(const char *)block.q16, k, nullptr, d * 2, block.q_term * 2, 64, 1024, d * 32, term, 0, d / 32, -1};
        multiply_all<F16>(scores, m, m_end, first_block, last_block, block.s, block.s_stride);
        const int step = seen.low / 32, step_end = (seen.high + 31) / 32;
        for (int i = first_query; i < last_query; i++) {
            const int row = i / group;
            if (block.l[i] == 0) memset(block.o + (int64_t)i * d, 0, sizeof(float) * (size_t)d);
            block.keep[i] = softmax_terms(block, i, seen.low_of(block, row), seen.high_of(block, row), step, step_end,
                                          block.m[i], block.l[i]);
        }
        // A step whose last slots hold anything gets zeros there: in what is cut anyway, or in a copy.
        const int cut = seen.high % 32;
        if (F16) {
            const int pairs = seen.high / 2;
            int64_t to = (int64_t)pairs * 2 * d;
            cut_page(block, v, (int64_t)step * 32 * d, to);
            if (seen.high % 2)
                for (const int64_t pair = to; to < pair + 2 * d; to += 32)
                    cut_f16((const uint16_t *)v + to, false, block.terms + to, block.terms + block.page_term + to);
            zero_terms(block, to, (int64_t)step_end * 32 * d);
            v = (const char *)block.terms;
        } else if (cut) {
            memset(block.tail, 0, (size_t)d * 64);
            memcpy(block.tail, v + (int64_t)(step_end - 1) * d * 64, (size_t)(cut / 2) * d * 4);
            if (cut % 2)
                for (int c = 0; c < d; c++)
                    block.tail[(cut / 2) * d * 2 + 2 * c] = ((const uint16_t *)v)[kv_v_index(seen.high - 1, c, d)];
        }
        const Product sums{(const char *)block.p16, v, (const char *)block.tail, KV_PAGE * 2, block.p_term * 2, d * 4, d * 64, 64,
                           term, step, step_end, !F16 && cut ? step_end - 1 : -1};
        multiply_all<F16>(sums, m, m_end, 0, d / 16, block.s, block.s_stride);
        for (int i = first_query; i < last_query; i++) {
            float *o = block.o + (int64_t)i * d;
            const float *s = block.s + (int64_t)i * block.s_stride;
            for (int c = 0; c < d; c += 16) store(o + c, fma(load(o + c), splat(block.keep[i]), load(s + c)));
        }
    }
}

}  // namespace KV_NS
