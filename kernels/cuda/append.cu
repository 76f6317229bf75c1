// append.cu - q/k norms, RoPE (Su et al., 2021) and the stores of K and V into the row's page.
#include "append.cuh"

namespace kv {

constexpr int kWarps = 4;         // of a block; a warp takes a head

// RMSNorm over a whole projection, in place, before any head of it is used. A block takes q or k of a row.
static __global__ void norm_whole(kv_op_append op, const kv_state *state) {
    begin_kernel();
    const int row = blockIdx.x, is_k = blockIdx.y;
    if (row >= state->n_rows) return;
    const int dim = (is_k ? op.kv_heads : op.heads) * op.head_dim;
    const float *w = is_k ? op.k_norm : op.q_norm;
    float *x = op.qkv + (int64_t)row * (op.heads + 2 * op.kv_heads) * op.head_dim + (is_k ? op.heads * op.head_dim : 0);
    float squares = 0;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) squares = fmaf(x[i], x[i], squares);
    const float inverse = 1 / sqrtf(block_sum(squares) / dim + op.eps);
    for (int i = threadIdx.x; i < dim; i += blockDim.x) x[i] = x[i] * inverse * (w[i] + op.w_offset);
}

static __global__ void append(const __grid_constant__ kv_op_append op, kv_state *state) {
    begin_kernel();
    __shared__ float heads_of_block[kWarps][kMaxHeadDim];
    const int row = blockIdx.x, warp = threadIdx.x / 32, head = blockIdx.y * kWarps + warp;
    if (row == 0 && blockIdx.y == 0 && threadIdx.x == 0) state->appended += state->n_rows;
    if (row < state->n_rows && head < op.heads + 2 * op.kv_heads) append_head(op, state, row, head, heads_of_block[warp]);
}

cudaError_t launch_append(const kv_op_append &op, const Launch &l) {
    if (op.qk_norm == KV_QK_WHOLE) {
        const cudaError_t error = launch(norm_whole, dim3(l.bounds.max_rows, 2), kThreads, l.stream, op, (const kv_state *)l.state);
        if (error != cudaSuccess) return error;
    }
    const dim3 grid(l.bounds.max_rows, (op.heads + 2 * op.kv_heads + kWarps - 1) / kWarps);
    const cudaError_t error = launch(append, grid, 32 * kWarps, l.stream, op, l.state);
    return error == cudaSuccess && has_side(op.cache) ? launch_close(op, l) : error;
}

}  // namespace kv
