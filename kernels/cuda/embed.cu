// embed.cu - out[R][k] = scale * W[token][:] from a packed matrix (page.h).
#include "launch.cuh"
#include "weight.cuh"

namespace kv {

// A thread takes a pair of columns: in the 16-bit formats the pair is one word.
static __global__ void embed(kv_op_embed op, const kv_state *state) {
    begin_kernel();
    const int row = blockIdx.x, k = op.w.k;
    const int pair = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= state->n_rows || 2 * pair >= k) return;
    const float2 w = weight_pair(op.w, state->token[row], 2 * pair);
    float *out = op.out + (int64_t)row * k + 2 * pair;
    out[0] = op.scale * w.x;
    out[1] = op.scale * w.y;
}

cudaError_t launch_embed(const kv_op_embed &op, const Launch &l) {
    return launch(embed, row_grid(l.bounds.max_rows, op.w.k, 2), kThreads, l.stream, op, l.state);
}

}  // namespace kv
