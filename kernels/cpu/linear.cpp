// linear.cpp - y = x W^T: choice of arithmetic and what follows the product.
#include "linear.h"

namespace KV_NS {

void linear(const kv_op_linear &op, const kv_state &state, kv::Worker &worker) {
    int rows = kv::rows_of(op.rows, state);
    if (rows <= 0) return;
    if (state.prefill) linear_prefill(op, rows, worker);
    else linear_decode(op, rows, worker);
}

int64_t linear_scratch(const kv_op_linear &op, int max_rows, int threads) {
    int64_t decode = linear_decode_scratch(op, threads), prefill = linear_prefill_scratch(op, max_rows, threads);
    return decode > prefill ? decode : prefill;
}

static void finish16(const kv_op_linear &op, f32x16 y, const float *bias, float *out) {
    if (bias) y = y + load(bias);
    f32x16 factor = splat(op.scale);
    if (op.softcap > 0) {
        y = tanh(y * factor / splat(op.softcap));
        factor = splat(op.softcap);
    }
    store(out, op.accumulate ? fma(factor, y, load(out)) : factor * y);
}

// One copy, never inlined: a row must round alike wherever it is finished.
__attribute__((noinline)) void linear_finish(const kv_op_linear &op, int64_t row, int64_t block, const f32x16 &y) {
    int64_t column = block * KV_LANES, left = op.w.n - column;
    float *out = op.out + row * op.w.n + column;
    const float *bias = op.bias ? op.bias + column : nullptr;
    if (left >= KV_LANES) return finish16(op, y, bias, out);
    float part[KV_LANES] = {}, part_bias[KV_LANES] = {};
    if (op.accumulate) memcpy(part, out, left * sizeof(float));
    if (bias) memcpy(part_bias, bias, left * sizeof(float));
    finish16(op, y, bias ? part_bias : nullptr, part);
    memcpy(out, part, left * sizeof(float));
}

}  // namespace KV_NS
