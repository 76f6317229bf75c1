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
    stream.ask();
    begin_kernel();
    const int rows = rows_of(op.rows, state), row0 = blockIdx.y * ROWS;
    if (row0 >= rows) return;
    norm_rows<ROWS>(norm, row0, rows, inverse);
    NormedRow x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[r] = {norm.x + (int64_t)(row0 + r < rows ? row0 + r : row0) * op.w.k, norm.w, norm.w_offset};
    stream.products(x, part[warp]);
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * ROWS; i += blockDim.x) {
        const int r = i / 16, column = blockIdx.x * KV_LANES + i % 16;
        if (row0 + r >= rows) continue;
        float both[2];
#pragma unroll
        for (int up = 0; up < 2; up++) {
            float y = 0;
            for (int from = 0; from < half; from++) y += part[up * half + from][r][i % 16];
            y *= inverse[r];
            if (op.bias) y += op.bias[up * act.dim + column];
            both[up] = op.scale * y;
            op.out[(int64_t)(row0 + r) * op.w.n + up * act.dim + column] = both[up];
        }
        act.out[(int64_t)(row0 + r) * act.dim + column] = activation(act.kind, both[0]) * both[1];
    }
}

template <class Tile> static cudaError_t launch_as(const kv_op_norm &norm, const kv_op_linear &op, const kv_op_act &act, const Launch &l) {
    const int blocks = act.dim / KV_LANES, rows = l.rows(op.rows), tiles = (op.w.k + Tile::kColumns - 1) / Tile::kColumns;
    const int threads = 64 * warps_of(2 * blocks, tiles, kMaxWarps / 2);
    const kv_state *state = l.state;
    if (rows <= 1) return launch(gated<Tile, 1>, dim3(blocks, rows), threads, l.stream, norm, op, act, state);
    return launch(gated<Tile, kManyRows>, dim3(blocks, (rows + kManyRows - 1) / kManyRows), threads, l.stream, norm, op, act, state);
}

cudaError_t launch_gated(const kv_op_norm &norm, const kv_op_linear &op, const kv_op_act &act, const Launch &l) {
    KV_OF_FORMAT(op.w.dtype, launch_as, norm, op, act, l);
}

}  // namespace kv
