// linear.cpp - y = x W^T: choice of arithmetic and what follows the product.
#include "linear.h"

namespace KV_NS {

#if defined(__AMX_TILE__)
// Tiles hold bfloat16, to which weights of float32 and float16 would lose bits.
static bool fits_tiles(const kv_op_linear &op, const kv_state &state) {
    return state.prefill && op.w.dtype != KV_F32 && op.w.dtype != KV_F16;
}
#endif

void linear(const kv_op_linear &op, const kv_state &state, kv::Worker &worker) {
    int rows = kv::rows_of(op.rows, state);
    if (rows <= 0) return;
    if (!state.prefill) return linear_decode(op, rows, worker);
#if defined(__AMX_TILE__)
    if (fits_tiles(op, state)) return linear_tiles(op, nullptr, rows, worker);
#endif
    linear_vector(op, rows, worker);
}

bool linear_act(const kv_op_linear &op, const kv_op_act &act, const kv_state &state, kv::Worker &worker) {
#if defined(__AMX_TILE__)
    const bool plain = !op.bias && !op.accumulate && op.scale == 1 && op.softcap <= 0 && op.rows == KV_ROWS_ALL;
    if (fits_tiles(op, state) && plain && act.x == op.out && op.w.n == 2 * act.dim && act.dim % KV_LANES == 0) {
        linear_tiles(op, &act, state.n_rows, worker);
        return true;
    }
#else
    (void)op, (void)act, (void)state, (void)worker;
#endif
    return false;
}

int64_t linear_scratch(const kv_op_linear &op, int max_rows, int threads) {
    // Of every path, so that it is known before the format of the weights is.
    int64_t most = linear_decode_scratch(op, threads), vector = linear_vector_scratch(op, max_rows, threads);
    if (vector > most) most = vector;
#if defined(__AMX_TILE__)
    int64_t tiles = linear_tiles_scratch(op, max_rows, threads);
    if (tiles > most) most = tiles;
#endif
    return most;
}

static KV_INLINE void finish16(const kv_op_linear &op, const float *y, const float *bias, float *out) {
    f32x16 z = load(y), factor = splat(op.scale);
    if (bias) z = z + load(bias);
    if (op.softcap > 0) {
        z = tanh(z * factor / splat(op.softcap));
        factor = splat(op.softcap);
    }
    store(out, op.accumulate ? fma(factor, z, load(out)) : factor * z);
}

// One copy, never inlined: a row must round alike wherever it is finished.
__attribute__((noinline)) void linear_finish(const kv_op_linear &op, int64_t row, int64_t rows, int64_t block, int64_t blocks,
                                             const float *y, int64_t stride) {
    const int64_t n = op.w.n;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t column = (block + b) * KV_LANES, left = n - column;
            const float *z = y + r * stride + b * KV_LANES, *bias = op.bias ? op.bias + column : nullptr;
            float *out = op.out + (row + r) * n + column;
            if (left >= KV_LANES) {
                finish16(op, z, bias, out);
                continue;
            }
            float part[KV_LANES] = {}, part_bias[KV_LANES] = {};
            if (op.accumulate) memcpy(part, out, left * sizeof(float));
            if (bias) memcpy(part_bias, bias, left * sizeof(float));
            finish16(op, z, bias ? part_bias : nullptr, part);
            memcpy(out, part, left * sizeof(float));
        }
}

}  // namespace KV_NS
