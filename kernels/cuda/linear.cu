// linear.cu - y = x W^T + bias and what follows, for few rows: a stream over the packed weights.
//
// A block takes 16 rows of W, its warps share the columns tile by tile. Which warp adds what, and in which order the warps'
// sums are added, follows from the shape alone, so a row of x gives the same bits whatever rows are beside it.
#include "launch.cuh"
#include "weight.cuh"

namespace kv {

constexpr int kMaxWarps = 16;

template <class Tile, int ROWS>
static __global__ void __launch_bounds__(32 * kMaxWarps) linear(kv_op_linear op, const kv_state *state) {
    __shared__ float part[kMaxWarps][ROWS][16];
    const int k = op.w.k, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int tiles = (k + Tile::kColumns - 1) / Tile::kColumns;
    const uint8_t *w = (const uint8_t *)op.w.data + blockIdx.x * weight_block_bytes(op.w.dtype, k);
    constexpr int kAhead = ROWS == 1 ? 8 : 4;             // tiles that a warp has asked for and not used
    typename Tile::Data data[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {                    // weights never change, so this need not wait for the op before
        const int tile = warp + i * warps;
        if (tile < tiles) data[i] = Tile::load(w + (int64_t)tile * Tile::kBytes, lane, k - tile * Tile::kColumns);
    }
    begin_kernel();
    const int rows = rows_of(op.rows, state), row0 = blockIdx.y * ROWS;
    if (row0 >= rows) return;
    const float *x[ROWS];
    float sum[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        x[r] = op.x + (int64_t)(row0 + r < rows ? row0 + r : row0) * k;
        sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = 0;
    }
    for (int from = warp; from < tiles; from += kAhead * warps)
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int tile = from + i * warps, next = tile + kAhead * warps, column = tile * Tile::kColumns;
            if (tile >= tiles) break;
#pragma unroll
            for (int r = 0; r < ROWS; r++) Tile::dot(data[i], x[r] + column, lane, k - column, sum[r]);
            if (next < tiles) data[i] = Tile::load(w + (int64_t)next * Tile::kBytes, lane, k - next * Tile::kColumns);
        }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            for (int with = 4; with < 32; with *= 2) sum[r][i] += __shfl_xor_sync(kAllLanes, sum[r][i], with);
            if (lane < 4) part[warp][r][4 * lane + i] = sum[r][i];
        }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * ROWS; i += blockDim.x) {
        const int r = i / 16, column = blockIdx.x * KV_LANES + i % 16;
        if (row0 + r >= rows || column >= op.w.n) continue;
        float y = 0;
        for (int from = 0; from < warps; from++) y += part[from][r][i % 16];
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

// Wide matrices have blocks enough to fill the machine; of narrow ones each block brings more warps.
static int warps_of(int blocks, int tiles) {
    int warps = blocks >= 1024 ? 4 : blocks >= 256 ? 8 : kMaxWarps;
    while (warps > tiles) warps /= 2;
    return warps;
}

template <class Tile> static cudaError_t launch_as(const kv_op_linear &op, const Launch &l) {
    const int blocks = (op.w.n + KV_LANES - 1) / KV_LANES, rows = l.rows(op.rows), tiles = (op.w.k + Tile::kColumns - 1) / Tile::kColumns;
    const int threads = 32 * warps_of(blocks, tiles);
    if (rows <= 1) return launch(linear<Tile, 1>, dim3(blocks, rows), threads, l.stream, op, (const kv_state *)l.state);
    return launch(linear<Tile, 4>, dim3(blocks, (rows + 3) / 4), threads, l.stream, op, (const kv_state *)l.state);
}

cudaError_t launch_linear(const kv_op_linear &op, const Launch &l) {
    switch (op.w.dtype) {
    case KV_F32: return launch_as<TileF32>(op, l);
    case KV_F16: return launch_as<TileHalf<F16>>(op, l);
    case KV_BF16: return launch_as<TileHalf<Bf16>>(op, l);
    case KV_Q8: return launch_as<TileQ8>(op, l);
    case KV_Q4: return launch_as<TileQ4>(op, l);
    }
    return cudaErrorInvalidValue;
}

}  // namespace kv
