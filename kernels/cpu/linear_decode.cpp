// linear_decode.cpp - few rows: bound by reading the weights once. 16 weight rows sit in the lanes, so nothing is added
// across lanes; a row's sums are formed in the same order whatever the number of rows or threads.
#include "linear.h"

namespace KV_NS {

static constexpr int ROWS = 64;        // activation rows of one pass over the weights
static constexpr int64_t AHEAD = 4096; // bytes that the prefetch runs ahead

#if defined(__AVX512F__)
static constexpr int TILE = 8;         // activation rows that share a widened weight in registers
#elif defined(__AVX2__)
static constexpr int TILE = 2;
#else
static constexpr int TILE = 1;
#endif

int64_t linear_decode_scratch(const kv_op_linear &op, int threads) {
    return threads * align64((int64_t)ROWS * (op.w.k / KV_GROUP) * sizeof(float));
}

// y[r] = sum over columns of the block's weights times x[r]; sums[r][g]: x[r] summed over the columns of group g.
template <class W, int R> static KV_INLINE void dot(const uint8_t *block, int64_t groups, const float *x, int64_t k,
                                                    const float *sums, float *y) {
    const f32x16 zero = splat(0.f);
    f32x16 total[R], even[R], odd[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) total[r] = even[r] = odd[r] = zero;
    for (int64_t g = 0; g < groups; g++, block += W::UNIT, x += KV_GROUP) {
        for (int64_t b = 0; b < W::UNIT; b += 64) KV_PREFETCH(block + AHEAD + b);
        if constexpr (W::SCALED) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) even[r] = odd[r] = zero;
        }
        W::pairs(block, [&](int c, f32x16 a, f32x16 b) __attribute__((always_inline)) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                even[r] = fma(a, splat(x[r * k + c]), even[r]);
                odd[r] = fma(b, splat(x[r * k + c + 1]), odd[r]);
            }
        });
        if constexpr (W::SCALED) {
            f32x16 step = W::step(block);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) total[r] = fma(step, even[r] + odd[r], total[r]);
        }
        if constexpr (W::MIN) {
            f32x16 min = W::min(block);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) total[r] = fma(min, splat(sums[r * groups + g]), total[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(y + r * KV_LANES, W::SCALED ? total[r] : even[r] + odd[r]);
}

struct Pass {
    const kv_op_linear &op;
    int64_t row, k, groups;            // first activation row of this pass
    const float *x, *sums;
};

template <class W, int R> static __attribute__((noinline)) void tile(const Pass &pass, const uint8_t *block, int64_t b, int r) {
    float y[R * KV_LANES];
    dot<W, R>(block, pass.groups, pass.x + r * pass.k, pass.k, pass.sums + r * pass.groups, y);
    linear_finish(pass.op, pass.row + r, R, b, 1, y, KV_LANES);
}

template <class W> static void decode(const kv_op_linear &op, int rows, kv::Worker &worker) {
    int64_t k = op.w.k, groups = k / KV_GROUP, blocks = blocks_of(op.w), block_bytes = groups * W::UNIT;
    float *sums = (float *)(worker.scratch + worker.thread * align64(ROWS * groups * (int64_t)sizeof(float)));
    // Ranges long enough to stream, short enough to end together.
    int64_t grain = blocks / (6 * worker.threads), most = 98304 / block_bytes;
    if (grain > most) grain = most;
    if (grain < 1) grain = 1;
    for (int64_t row = 0; row < rows; row += ROWS) {
        int count = rows - row < ROWS ? (int)(rows - row) : ROWS;
        Pass pass{op, row, k, groups, op.x + row * k, sums};
        if (W::MIN)
            for (int64_t g = 0; g < count * groups; g++)
                sums[g] = sum(load(pass.x + g * KV_GROUP) + load(pass.x + g * KV_GROUP + 16));
        worker.split(blocks, grain, [&](int64_t begin, int64_t end) {
            const uint8_t *block = (const uint8_t *)op.w.data + begin * block_bytes;
            for (int64_t b = 0; b < AHEAD; b += 64) KV_PREFETCH(block + b);
            for (int64_t b = begin; b < end; b++, block += block_bytes) {
                int r = 0;
                if constexpr (TILE >= 8) for (; r + 8 <= count; r += 8) tile<W, 8>(pass, block, b, r);
                if constexpr (TILE >= 4) for (; r + 4 <= count; r += 4) tile<W, 4>(pass, block, b, r);
                if constexpr (TILE >= 2) for (; r + 2 <= count; r += 2) tile<W, 2>(pass, block, b, r);
                for (; r < count; r++) tile<W, 1>(pass, block, b, r);
            }
        });
    }
}

void linear_decode(const kv_op_linear &op, int rows, kv::Worker &worker) {
    with_format(op.w.dtype, [&](auto format) { decode<decltype(format)>(op, rows, worker); });
}

}  // namespace KV_NS
