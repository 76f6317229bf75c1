// append.cpp - q/k norms, RoPE (Su et al., 2021), and the stores of K and V into the row's page.
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

static void append_row(const kv_op_append &op, int64_t row, char *base, int t) {
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
    const int64_t k_head = (int64_t)KV_PAGE * d * element_size(op.cache.k_dtype);
    const int64_t v_head = (int64_t)KV_PAGE * d * element_size(op.cache.v_dtype);
    for (int h = 0; h < n_k; h++) {
        store_k(base + h * k_head, k + (int64_t)h * d, t, d, op.cache.k_dtype);
        store_v(base + op.cache.v_offset + h * v_head, v + (int64_t)h * d, t, d, op.cache.v_dtype);
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
            append_row(op, row, (char *)op.cache.base + table.page[i] * op.cache.page_stride, pos % KV_PAGE);
        }
    });
    if (worker.thread == 0) state.appended += state.n_rows;
}

}  // namespace KV_NS
