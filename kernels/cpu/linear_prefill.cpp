// linear_prefill.cpp - many rows in float32: a panel of weight rows is widened once and used for all activations.
// Every product is summed over the columns in order, so a row's result does not depend on the other rows.
#include "linear.h"

namespace KV_NS {

// Register tile: ROWS activation rows times BLOCKS weight blocks.
#if defined(__AVX512F__)
static constexpr int ROWS = 12, BLOCKS = 2;
#elif defined(__AVX2__)
static constexpr int ROWS = 6, BLOCKS = 1;
#else
static constexpr int ROWS = 2, BLOCKS = 1;
#endif

static int64_t panel_bytes(const kv_op_linear &op) { return (int64_t)op.w.k * KV_LANES * BLOCKS * sizeof(float); }

int64_t linear_vector_scratch(const kv_op_linear &op, int, int threads) { return threads * panel_bytes(op); }

// panel[column][blocks][16] from `blocks` weight blocks.
template <class W> static void widen(const uint8_t *data, int64_t groups, int blocks, float *panel) {
    int64_t stride = blocks * KV_LANES;
    for (int b = 0; b < blocks; b++) {
        float *to = panel + b * KV_LANES;
        for (int64_t g = 0; g < groups; g++, data += W::UNIT, to += KV_GROUP * stride) {
            for (int64_t line = 0; line < W::UNIT; line += 64) KV_PREFETCH(data + 4096 + line);
            f32x16 step = splat(1.f), min = splat(0.f);
            if constexpr (W::SCALED) step = W::step(data);
            if constexpr (W::MIN) min = W::min(data);
            W::pairs(data, [&](int c, f32x16 even, f32x16 odd) __attribute__((always_inline)) {
                if constexpr (W::MIN) { even = fma(even, step, min); odd = fma(odd, step, min); }
                else if constexpr (W::SCALED) { even = even * step; odd = odd * step; }
                store(to + c * stride, even);
                store(to + (c + 1) * stride, odd);
            });
        }
    }
}

template <int R, int B> static __attribute__((noinline)) void tile(const kv_op_linear &op, const float *panel, int64_t block, int64_t row) {
    int64_t k = op.w.k;
    const float *x = op.x + row * k;
    f32x16 y[R][B];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) y[r][b] = splat(0.f);
    for (int64_t c = 0; c < k; c++, panel += B * KV_LANES) {
        f32x16 w[B];
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) w[b] = load(panel + b * KV_LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            f32x16 a = splat(x[r * k + c]);
#pragma GCC unroll 2
            for (int b = 0; b < B; b++) y[r][b] = fma(a, w[b], y[r][b]);
        }
    }
    float out[R * B * KV_LANES];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int b = 0; b < B; b++) store(out + (r * B + b) * KV_LANES, y[r][b]);
    linear_finish(op, row, R, block, B, out, B * KV_LANES);
}

template <int B> static void multiply(const kv_op_linear &op, const float *panel, int64_t block, int64_t rows) {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS) tile<ROWS, B>(op, panel, block, row);
    if constexpr (ROWS > 4) for (; row + 4 <= rows; row += 4) tile<4, B>(op, panel, block, row);
    for (; row < rows; row++) tile<1, B>(op, panel, block, row);
}

void linear_vector(const kv_op_linear &op, int rows, kv::Worker &worker) {
    int64_t groups = op.w.k / KV_GROUP, blocks = blocks_of(op.w);
    float *panel = (float *)(worker.scratch + worker.thread * panel_bytes(op));
    worker.split((blocks + BLOCKS - 1) / BLOCKS, 1, [&](int64_t p, int64_t) {
        int64_t block = p * BLOCKS;
        int count = blocks - block < BLOCKS ? (int)(blocks - block) : BLOCKS;
        with_format(op.w.dtype, [&](auto format) {
            using W = decltype(format);
            widen<W>((const uint8_t *)op.w.data + block * groups * W::UNIT, groups, count, panel);
        });
        if constexpr (BLOCKS == 2) if (count == 2) return multiply<2>(op, panel, block, rows);
        multiply<1>(op, panel, block, rows);
    });
}

}  // namespace KV_NS
