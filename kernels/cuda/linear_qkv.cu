// linear_qkv.cu - decode rows' norm, q, k and v projections, q/k norms, RoPE, and the stores of K and V as one kernel. Compiled without
// contraction of a*b + c, as append.cu is: both store the same bits.
#include "append.cuh"
#include "linear.cuh"

namespace kv {

// A block takes 16 rows of the projection; the last one of a head's to end does the rest of the head, a warp a row.
template <class Tile, int ROWS>
static __global__ void __launch_bounds__(32 * kMaxWarps, 1) qkv(kv_op_norm norm, kv_op_linear op, const __grid_constant__ kv_op_append append, kv_state *state, unsigned *counters) {
    __shared__ float part[kMaxWarps][ROWS][16], inverse[ROWS], heads[ROWS][kMaxHeadDim];
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    Stream<Tile, ROWS> stream(op.w, blockIdx.x, threadIdx.x % 32, warp, warps);
    int row0, rows;
    if (!products_of<ROWS>(stream, op, state, NormedRows{norm, inverse}, part, row0, rows)) return;
    for (int i = threadIdx.x; i < 16 * ROWS; i += blockDim.x) {
        const int r = i / 16, column = blockIdx.x * KV_LANES + i % 16;
        if (row0 + r >= rows) continue;
        float y = sum_of<ROWS>(part, 0, warps, r, i % 16) * inverse[r];
        if (op.bias) y += op.bias[column];
        op.out[(int64_t)(row0 + r) * op.w.n + column] = op.scale * y;
    }
    const int blocks = append.head_dim / KV_LANES, head = blockIdx.x / blocks, n_heads = append.heads + 2 * append.kv_heads;
    if (!last_to_arrive(counters + blockIdx.y * n_heads + head, blocks)) return;
    if (head == 0 && row0 == 0 && threadIdx.x == 0) state->appended += rows;
    for (int r = warp; r < ROWS && row0 + r < rows; r += warps) append_head(append, state, row0 + r, head, heads[r]);
}

template <class Tile> static cudaError_t launch_as(const kv_op_norm &norm, const kv_op_linear &op, const kv_op_append &append, const Launch &l) {
    const int blocks = op.w.n / KV_LANES, threads = 32 * warps_of(blocks, tiles_of<Tile>(op.w));
    return launch_rows(qkv<Tile, 1>, qkv<Tile, kManyRows>, blocks, l.rows(op.rows), threads, l, norm, op, append, l.state, l.counters);
}

int64_t qkv_counters(const kv_op_append &op, const kv_cuda_bounds &bounds) { return (int64_t)bounds.max_rows * (op.heads + 2 * op.kv_heads); }

static cudaError_t launch_projection(const kv_op_norm &norm, const kv_op_linear &op, const kv_op_append &append, const Launch &l) {
    KV_OF_FORMAT(op.w.dtype, launch_as, norm, op, append, l);
}

cudaError_t launch_qkv(const kv_op_norm &norm, const kv_op_linear &op, const kv_op_append &append, const Launch &l) {
    const cudaError_t error = launch_projection(norm, op, append, l);
    return error == cudaSuccess && has_side(append.cache) ? launch_close(append, l) : error;
}

}  // namespace kv
