// append.cuh - a head of q, k or v of a row, by a warp: its norm, RoPE (Su et al., 2021) and the store of K and V into the row's page.
#pragma once
#include "encode.cuh"
#include "launch.cuh"
#include "pages.cuh"
#include "rotate.cuh"

namespace kv {

constexpr int kMaxHeadDim = 256;

// One head's x[dim] into slot t of a page of plain numbers.
static __device__ void store_plain(char *page, const float *x, int t, int dim, int dtype, bool is_v, int lane) {
    for (int c = lane; c < dim; c += 32) {
        const int64_t at = is_v ? kv_v_index(t, c, dim) : kv_k_index(t, c, dim);
        if (dtype == KV_F32) ((float *)page)[at] = x[c];
        else ((uint16_t *)page)[at] = (uint16_t)(dtype == KV_F16 ? f16_bits(x[c]) : bf16_bits(x[c]));
    }
}

// The same into a Q8 page. x is overwritten. A group of channels is a warp or half of one.
static __device__ void store_q8(char *page, float *x, int t, int dim, bool is_v, int lane) {
    for (int c = lane; c < dim; c += 32) x[c] = whole_bf16(bf16_bits(x[c]));
    rotate(x, dim, lane);
    const int group = kv_q8_group(dim);
    for (int from = 0; from < dim; from += 32) {
        const int c = from + lane;
        const float y = c < dim ? x[c] : 0.f;
        uint32_t top = __float_as_uint(y) & 0x7fffffff;          // without sign, floats are ordered as their bits are, NaN highest
        for (int with = group / 2; with > 0; with /= 2) {
            const uint32_t other = __shfl_xor_sync(kAllLanes, top, with);
            top = other > top ? other : top;
        }
        if (c >= dim) continue;
        const uint16_t scale = top < 0x7f800000 ? clamped_f16(__fdiv_rn(__uint_as_float(top), 127.f)) : kF16Nan;
        const float s = f16_to_f32(scale);
        const float code = s > 0 ? clamped_rint(__fdiv_rn(y, s), -127.f, 127.f) : 0.f;
        ((int8_t *)page)[is_v ? kv_v8_index(t, c) : kv_k8_index(t, c, dim)] = (int8_t)code;
        if (c % group == 0) {
            uint16_t *scales = (uint16_t *)(page + KV_PAGE * dim);
            scales[is_v ? c / group * KV_PAGE + t : (t / KV_LANES * (dim / group) + c / group) * KV_LANES + t % KV_LANES] = scale;
        }
    }
}

// x: [head_dim] of shared memory for the warp to use. A call, so that it takes no registers from a kernel that does more.
static __device__ KV_NOINLINE void append_head(const kv_op_append &op, kv_state *state, int row, int head, float *x) {
    const int lane = threadIdx.x % 32;
    const int d = op.head_dim;
    const bool is_q = head < op.heads, is_v = head >= op.heads + op.kv_heads;
    float *from = op.qkv + ((int64_t)row * (op.heads + 2 * op.kv_heads) + head) * d;
    float squares = 0;
    for (int c = lane; c < d; c += 32) {
        x[c] = from[c];
        squares = fmaf(x[c], x[c], squares);
    }
    if (!is_v) {
        if (op.qk_norm == KV_QK_HEAD) {
            const float inverse = 1 / sqrtf(warp_sum(squares) / d + op.eps);
            const float *w = is_q ? op.q_norm : op.k_norm;
            for (int c = lane; c < d; c += 32) x[c] = x[c] * inverse * (w[c] + op.w_offset);
        }
        __syncwarp();
        const int half = op.rope ? op.rope_dim / 2 : 0;
        const float *cosines = op.rope + (int64_t)row * op.rope_dim, *sines = cosines + half;
        for (int i = lane; i < half; i += 32) {
            const int first = op.interleaved ? 2 * i : i, second = op.interleaved ? 2 * i + 1 : i + half;
            const float a = x[first], b = x[second];
            x[first] = a * cosines[i] - b * sines[i];
            x[second] = b * cosines[i] + a * sines[i];
        }
    }
    __syncwarp();
    if (is_q) {
        for (int c = lane; c < d; c += 32) from[c] = x[c];
        return;
    }
    const int pos = state->pos[row], h = head - op.heads - (is_v ? op.kv_heads : 0);
    const kv_table &table = table_of(state, op.cache, state->seq[row]);
    const int i = last_page(table, pos);
    if (i < 0 || table.base[i] != pos / KV_PAGE * KV_PAGE) {      // the row's page is not in its table
        if (lane == 0) state->status = KV_BAD_PLAN;
        return;
    }
    const int dtype = is_v ? op.cache.v_dtype : op.cache.k_dtype, t = pos % KV_PAGE;
    if (dtype == KV_Q4) {
        const Side side(op.cache, table, h, op.kv_heads, d);
        store_plain(is_v ? side.v_open() : side.k_open(), x, t, d, KV_BF16, is_v, lane);
        return;
    }
    char *page = is_v ? v_of(op.cache, table.page[i], h, d) : k_of(op.cache, table.page[i], h, d);
    if (dtype == KV_Q8) store_q8(page, x, t, d, is_v, lane);
    else store_plain(page, x, t, d, dtype, is_v, lane);
}

}  // namespace kv
