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

template <class Tile> static __host__ __device__ __forceinline__ int tiles_of(const kv_weight &w) { return (w.k + Tile::kColumns - 1) / Tile::kColumns; }

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
          tiles(tiles_of<Tile>(matrix)) {}

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

// What a product is taken of: rows as they are, or normed, all but the factors inverse[ROWS], in shared memory.
struct PlainRows {
    const float *x;
    template <int ROWS> __device__ __forceinline__ void prepare(int, int) const {}
    __device__ __forceinline__ PlainRow row(int row, int k) const { return {x + (int64_t)row * k}; }
};
struct NormedRows {
    const kv_op_norm &norm;
    float *inverse;
    template <int ROWS> __device__ __forceinline__ void prepare(int row0, int rows) const { norm_rows<ROWS>(norm, row0, rows, inverse); }
    __device__ __forceinline__ NormedRow row(int row, int k) const { return {norm.x + (int64_t)row * k, norm.w, norm.w_offset}; }
};

// How a linear kernel begins: the products of its rows, [ROWS][16] for each warp, for all threads of the block. False where the block has
// no rows; else they are [row0, row0 + ROWS) below `rows`.
template <int ROWS, class Stream, class Rows>
static __device__ __forceinline__ bool products_of(Stream &stream, const kv_op_linear &op, const kv_state *state, const Rows &of, float (*part)[ROWS][16],
                                                   int &row0, int &rows) {
    stream.ask();
    begin_kernel();
    rows = rows_of(op.rows, state);
    row0 = blockIdx.y * ROWS;
    if (row0 >= rows) return false;
    of.template prepare<ROWS>(row0, rows);
    decltype(of.row(0, 0)) x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) x[r] = of.row(row0 + r < rows ? row0 + r : row0, op.w.k);
    stream.products(x, part[threadIdx.x / 32]);
    __syncthreads();
    return true;
}
// Column i of row r of what warps [from, to) have.
template <int ROWS> static __device__ __forceinline__ float sum_of(const float (*part)[ROWS][16], int from, int to, int r, int i) {
    float y = 0;
    for (; from < to; from++) y += part[from][r][i];
    return y;
}

// Launches the kernel for one row, or that for several.
template <class Kernel, class... Args>
cudaError_t launch_rows(Kernel one, Kernel many, int blocks, int rows, int threads, const Launch &l, Args... args) {
    return rows <= 1 ? launch(one, dim3(blocks, rows), threads, l.stream, args...)
                     : launch(many, dim3(blocks, (rows + kManyRows - 1) / kManyRows), threads, l.stream, args...);
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
