// linear.cu - y = x W^T + bias and what follows, for few rows.
#include "linear.cuh"

namespace kv {

template <class Tile, int ROWS>
static __global__ void __launch_bounds__(32 * kMaxWarps, 1) linear(kv_op_linear op, const kv_state *state) {
    __shared__ float part[kMaxWarps][ROWS][16];
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    Stream<Tile, ROWS> stream(op.w, blockIdx.x, threadIdx.x % 32, warp, warps);
    int row0, rows;
    if (!products_of<ROWS>(stream, op, state, PlainRows{op.x}, part, row0, rows)) return;
    for (int i = threadIdx.x; i < 16 * ROWS; i += blockDim.x) {
        const int r = i / 16, column = blockIdx.x * KV_LANES + i % 16;
        if (row0 + r >= rows || column >= op.w.n) continue;
        float y = sum_of<ROWS>(part, 0, warps, r, i % 16);
        if (op.bias) y += op.bias[column];
        float *out = op.out + (int64_t)(row0 + r) * op.w.n + column;
        float scale = op.scale;
        if (op.softcap > 0) {
            y = tanhf(scale * y / op.softcap);
            scale = op.softcap;
        }
        *out = op.accumulate ? fmaf(scale, y, *out) : scale * y;
    }
}

template <class Tile> static cudaError_t launch_as(const kv_op_linear &op, const Launch &l) {
    const int blocks = (op.w.n + KV_LANES - 1) / KV_LANES, threads = 32 * warps_of(blocks, tiles_of<Tile>(op.w));
    return launch_rows(linear<Tile, 1>, linear<Tile, kManyRows>, blocks, l.rows(op.rows), threads, l, op, (const kv_state *)l.state);
}

cudaError_t launch_linear(const kv_op_linear &op, const Launch &l) { KV_OF_FORMAT(op.w.dtype, launch_as, op, l); }

}  // namespace kv
