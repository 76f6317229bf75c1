// linear_gated.cu - decode rows' norm, gate and up projections, and gated activation as one kernel.
#include "act.cuh"
#include "linear.cuh"

namespace kv {

// A block takes 16 rows of the gate and the 16 rows of up beside them; one half of its warps each.
template <class Tile, int ROWS>
static __global__ void __launch_bounds__(32 * kMaxWarps, 1) gated(kv_op_norm norm, kv_op_linear op, kv_op_act act, const kv_state *state) {
    __shared__ float part[kMaxWarps][ROWS][16], inverse[ROWS];
    const int warp = threadIdx.x / 32, half = blockDim.x / 64, is_up = warp / half;
    Stream<Tile, ROWS> stream(op.w, blockIdx.x + is_up * (act.dim / KV_LANES), threadIdx.x % 32, warp % half, half);
    int row0, rows;
    if (!products_of<ROWS>(stream, op, state, NormedRows{norm, inverse}, part, row0, rows)) return;
    for (int i = threadIdx.x; i < 16 * ROWS; i += blockDim.x) {
        const int r = i / 16, column = blockIdx.x * KV_LANES + i % 16;
        if (row0 + r >= rows) continue;
        float both[2];
#pragma unroll
        for (int up = 0; up < 2; up++) {
            float y = sum_of<ROWS>(part, up * half, (up + 1) * half, r, i % 16) * inverse[r];
            if (op.bias) y += op.bias[up * act.dim + column];
            both[up] = op.scale * y;
            op.out[(int64_t)(row0 + r) * op.w.n + up * act.dim + column] = both[up];
        }
        act.out[(int64_t)(row0 + r) * act.dim + column] = activation(act.kind, both[0]) * both[1];
    }
}

template <class Tile> static cudaError_t launch_as(const kv_op_norm &norm, const kv_op_linear &op, const kv_op_act &act, const Launch &l) {
    const int blocks = act.dim / KV_LANES, threads = 64 * warps_of(2 * blocks, tiles_of<Tile>(op.w), kMaxWarps / 2);
    return launch_rows(gated<Tile, 1>, gated<Tile, kManyRows>, blocks, l.rows(op.rows), threads, l, norm, op, act, (const kv_state *)l.state);
}

cudaError_t launch_gated(const kv_op_norm &norm, const kv_op_linear &op, const kv_op_act &act, const Launch &l) {
    KV_OF_FORMAT(op.w.dtype, launch_as, norm, op, act, l);
}

}  // namespace kv
