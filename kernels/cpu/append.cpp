// append.cpp - q/k norms, RoPE (Su et al., 2021), the stores of K and V into the row's page, and the quantization of
// pages that became full.
#include "encode.h"
#include "half.h"
#include "kernels.h"
#include "pages.h"
#include "rms.h"

namespace KV_NS {

static void scale_by(float *x, const float *w, int dim, float factor, float offset) {
    int i = 0;
    for (; i + 16 <= dim; i += 16) store(x + i, load(x + i) * splat(factor) * (load(w + i) + splat(offset)));
    for (; i < dim; i++) x[i] = x[i] * factor * (w[i] + offset);
}

static void rotate_halves(float *x, const float *c, const float *s, int half) {
    int i = 0;
    for (; i + 16 <= half; i += 16) {
        f32x16 a = load(x + i), b = load(x + half + i), cosine = load(c + i), sine = load(s + i);
        store(x + i, a * cosine - b * sine);
        store(x + half + i, b * cosine + a * sine);
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * c[i] - b * s[i];
        x[half + i] = b * c[i] + a * s[i];
    }
}

static void rotate_neighbours(float *x, const float *c, const float *s, int half) {
    for (int i = 0; i < half; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * c[i] - b * s[i];
        x[2 * i + 1] = b * c[i] + a * s[i];
    }
}

// x[dim] rounded to 16 bits.
static void narrow(uint16_t *out, const float *x, int dim, int dtype) {
    if (dtype == KV_F16)
        for (int i = 0; i < dim; i++) out[i] = kv::f32_to_f16(x[i]);
    else
        for (int i = 0; i < dim; i++) out[i] = kv::f32_to_bf16(x[i]);
}

// One head's K (V) of one token into slot t of a page.
static void store_k(char *page, const float *x, int t, int dim, int dtype) {
    if (dtype == KV_F32) {
        float *p = (float *)page + kv_k_index(t, 0, dim);
        for (int c = 0; c < dim; c += 2, p += 2 * KV_LANES) memcpy(p, x + c, 8);
        return;
    }
    uint16_t *p = (uint16_t *)page + kv_k_index(t, 0, dim), part[64];
    for (int from = 0; from < dim; from += 64) {
        const int n = dim - from < 64 ? dim - from : 64;
        narrow(part, x + from, n, dtype);
        for (int c = 0; c < n; c += 2, p += 2 * KV_LANES) memcpy(p, part + c, 4);
    }
}
static void store_v(char *page, const float *x, int t, int dim, int dtype) {
    if (dtype == KV_F32) {
        float *p = (float *)page + kv_v_index(t, 0, dim);
        for (int c = 0; c < dim; c++) p[2 * c] = x[c];
        return;
    }
    uint16_t *p = (uint16_t *)page + kv_v_index(t, 0, dim), part[64];
    for (int from = 0; from < dim; from += 64, p += 128) {
        const int n = dim - from < 64 ? dim - from : 64;
        narrow(part, x + from, n, dtype);
        for (int c = 0; c < n; c++) p[2 * c] = part[c];
    }
}

static void append_row(const kv_op_append &op, int64_t row, const kv_table &table, int page, int t) {
    const int d = op.head_dim, n_q = op.heads, n_k = op.kv_heads;
    float *q = op.qkv + row * (int64_t)(n_q + 2 * n_k) * d, *k = q + (int64_t)n_q * d, *v = k + (int64_t)n_k * d;
    if (op.qk_norm == KV_QK_WHOLE) {
        scale_by(q, op.q_norm, n_q * d, rms_factor(q, n_q * d, op.eps), op.w_offset);
        scale_by(k, op.k_norm, n_k * d, rms_factor(k, n_k * d, op.eps), op.w_offset);
    }
    const int half = op.rope_dim / 2;
    const float *c = op.rope ? op.rope + row * 2 * half : nullptr;
    for (int h = 0; h < n_q + n_k; h++) {
        float *x = q + (int64_t)h * d;
        if (op.qk_norm == KV_QK_HEAD) scale_by(x, h < n_q ? op.q_norm : op.k_norm, d, rms_factor(x, d, op.eps), op.w_offset);
        if (c && op.interleaved) rotate_neighbours(x, c, c + half, half);
        else if (c) rotate_halves(x, c, c + half, half);
    }
    for (int h = 0; h < n_k; h++) {
        const float *k_row = k + (int64_t)h * d, *v_row = v + (int64_t)h * d;
        char *k_page = k_of(op.cache, page, h, d), *v_page = v_of(op.cache, page, h, d);
        Side side;
        if (has_side(op.cache)) side = side_of(op.cache, table, h, n_k, d);
        if (op.cache.k_dtype == KV_Q8) store_k_q8(k_page, k_row, t, d);
        else if (side.k_open) store_k((char *)side.k_open, k_row, t, d, KV_BF16);
        else store_k(k_page, k_row, t, d, op.cache.k_dtype);
        if (op.cache.v_dtype == KV_Q8) store_v_q8(v_page, v_row, t, d);
        else if (side.v_open) store_v((char *)side.v_open, v_row, t, d, KV_BF16);
        else store_v(v_page, v_row, t, d, op.cache.v_dtype);
    }
}

// After all rows of a sequence are in its open page: sums q^2, and quantizes the page when its last slot was filled.
static void close_page(const kv_op_append &op, const kv_state &state, const kv_table &table, int seq, int h) {
    const int d = op.head_dim, group = op.heads / op.kv_heads;
    const Side side = side_of(op.cache, table, h, op.kv_heads, d);
    int64_t last = -1;
    for (int64_t row = 0; row < state.n_rows; row++) {
        if (state.seq[row] != seq) continue;
        last = row;
        const float *q = op.qkv + (row * (op.heads + 2 * op.kv_heads) + (int64_t)h * group) * d;
        if (side.qsq) add_squares(side.qsq, q, group, d, state.pos[row] % KV_PAGE == 0);
    }
    if (last < 0 || state.pos[last] % KV_PAGE != KV_PAGE - 1) return;
    const int i = last_page(table, state.pos[last]), sinks = table.base[i] == 0 ? KV_SINKS : 0;
    const size_t sink_bytes = sizeof(uint16_t) * KV_SINKS * (size_t)d;      // the first block of K, the first pairs of V
    if (side.k_open) {
        if (sinks) memcpy(side.k_sinks, side.k_open, sink_bytes);
        encode_k_q4(k_of(op.cache, table.page[i], h, d), side.k_open, side.qsq, d, sinks);
    }
    if (side.v_open) {
        if (sinks) memcpy(side.v_sinks, side.v_open, sink_bytes);
        encode_v_q4(v_of(op.cache, table.page[i], h, d), side.v_open, d);
    }
}

void append(const kv_op_append &op, kv_state &state, kv::Worker &worker) {
    const kv_table *tables = state.table + (int64_t)op.cache.group * state.n_seqs;
    // Ranges of 16 rows, so that two threads rarely write lanes of one K block.
    worker.split(state.n_rows, KV_LANES, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const kv_table &table = tables[state.seq[row]];
            const int pos = state.pos[row], i = last_page(table, pos);
            if (i < 0 || table.base[i] != pos / KV_PAGE * KV_PAGE) {
                __atomic_store_n(&state.status, (int32_t)KV_BAD_PLAN, __ATOMIC_RELAXED);
                continue;
            }
            append_row(op, row, table, table.page[i], pos % KV_PAGE);
        }
    });
    if (has_side(op.cache)) {
        worker.barrier();
        if (__atomic_load_n(&state.status, __ATOMIC_RELAXED) != KV_BAD_PLAN)
            worker.split((int64_t)state.n_seqs * op.kv_heads, 1, [&](int64_t item, int64_t) {
                const int seq = (int)(item / op.kv_heads);
                close_page(op, state, tables[seq], seq, (int)(item % op.kv_heads));
            });
    }
    if (worker.thread == 0) state.appended += state.n_rows;
}

}  // namespace KV_NS
