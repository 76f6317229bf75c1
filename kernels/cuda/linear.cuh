// linear.cuh - products of few rows with a packed matrix, as a stream over it: what the linear kernels share.
//
// A block takes 16 rows of W, its warps share the columns tile by tile. Which warp adds what, and in which order the warps'
// sums are added, follows from the shape alone, so a row of x gives the same bits whatever rows are beside it.
#pragma once
#include "launch.cuh"
#include "weight.cuh"

namespace kv {

constexpr int kMaxWarps = 16;
constexpr int kManyRows = 4;                     // rows of a block where there are several

// Wide matrices have blocks enough to fill the machine; of narrow ones each block brings more warps.
inline int warps_of(int blocks, int tiles, int most = kMaxWarps) {
    int warps = blocks >= 1024 ? 4 : blocks >= 256 ? 8 : kMaxWarps;
    while (warps > tiles || warps > most) warps /= 2;
    return warps;
}

// One warp's part of 16 rows of W: tiles warp, warp + warps, ...
template <class Tile, int ROWS> struct Stream {
    // Tiles that a warp has asked for and not used; of 4-bit ones fewer, whose sums need more registers.
    static constexpr int kAhead = Tile::kColumns > 32 ? (ROWS == 1 ? 6 : 2) : ROWS == 1 ? 8 : 4;
    const uint8_t *w;
    int k, lane, warp, warps, tiles;
    typename Tile::Data data[kAhead];

    __device__ __forceinline__ Stream(const kv_weight &matrix, int block, int lane_, int warp_, int warps_)
        : w((const uint8_t *)matrix.data + block * weight_block_bytes(matrix.dtype, matrix.k)), k(matrix.k), lane(lane_), warp(warp_), warps(warps_),
          tiles((matrix.k + Tile::kColumns - 1) / Tile::kColumns) {}

    __device__ __forceinline__ typename Tile::Data load(int tile) const { return Tile::load(w + (int64_t)tile * Tile::kBytes, lane, k - tile * Tile::kColumns); }

    // Asks for the first tiles. Weights never change, so this need not wait for the op before.
    __device__ __forceinline__ void ask() {
#pragma unroll
        for (int i = 0; i < kAhead; i++)
            if (warp + i * warps < tiles) data[i] = load(warp + i * warps);
    }
    // part[r][16] += what the warp has of row r of x times each of its rows of W; x: [ROWS].
    template <class Row> __device__ __forceinline__ void products(const Row *x, float (*part)[16]) {
        float sum[ROWS][4];
#pragma unroll
        for (int r = 0; r < ROWS; r++) sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = 0;
        for (int from = warp; from < tiles; from += kAhead * warps)
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const int tile = from + i * warps, next = tile + kAhead * warps, column = tile * Tile::kColumns;
                if (tile >= tiles) break;
#pragma unroll
                for (int r = 0; r < ROWS; r++) Tile::dot(data[i], x[r].from(column), lane, k - column, sum[r]);
                if (next < tiles) data[i] = load(next);
            }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                for (int with = 4; with < 32; with *= 2) sum[r][i] += __shfl_xor_sync(kAllLanes, sum[r][i], with);
                if (lane < 4) part[r][4 * lane + i] = sum[r][i];
            }
    }
};

// An RMSNorm before a product. inverse[ROWS]: 1/sqrt of each row's mean square, in shared memory, for all threads of the block
// after its next barrier. The first blocks of a launch also store what the norm op gives.
template <int ROWS>
static __device__ __forceinline__ void norm_rows(const kv_op_norm &op, int row0, int rows, float *inverse) {
    __shared__ float squares[ROWS][kMaxWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float *x = op.x + (int64_t)(row0 + r < rows ? row0 + r : row0) * op.dim;
        float sum = 0;
        for (int i = threadIdx.x; i < op.dim; i += blockDim.x) sum = fmaf(x[i], x[i], sum);
        sum = warp_sum(sum);
        if (lane == 0) squares[r][warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x < ROWS) {
        float sum = 0;
        for (int i = 0; i < warps; i++) sum += squares[threadIdx.x][i];
        inverse[threadIdx.x] = 1 / sqrtf(sum / op.dim + op.eps);
    }
    if (blockIdx.x > 0) return;
    __syncthreads();
    for (int r = 0; r < ROWS && row0 + r < rows; r++)
        for (int i = threadIdx.x; i < op.dim; i += blockDim.x) {
            const int64_t at = (int64_t)(row0 + r) * op.dim + i;
            op.out[at] = op.x[at] * inverse[r] * (op.w[i] + op.w_offset);
        }
}

// Calls launch_as<Tile> of the matrix' format.
#define KV_OF_FORMAT(dtype, launch_as, ...)                                   \
    switch (dtype) {                                                          \
    case KV_F32: return launch_as<TileF32>(__VA_ARGS__);                      \
    case KV_F16: return launch_as<TileHalf<F16>>(__VA_ARGS__);                \
    case KV_BF16: return launch_as<TileHalf<Bf16>>(__VA_ARGS__);              \
    case KV_Q8: return launch_as<TileQ8>(__VA_ARGS__);                        \
    case KV_Q4: return launch_as<TileQ4>(__VA_ARGS__);                        \
    case KV_Q4S: return launch_as<TileQ4S>(__VA_ARGS__);                      \
    }                                                                         \
    return cudaErrorInvalidValue

}  // namespace kv
