// gather.cu - the rows whose logits are wanted: out[O][dim] = x[out_row][dim].
#include "launch.cuh"

namespace kv {

static __global__ void gather(kv_op_gather op, const kv_state *state) {
    const int row = blockIdx.x, i = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= state->n_out || i >= op.dim) return;
    op.out[(int64_t)row * op.dim + i] = op.x[(int64_t)state->out_row[row] * op.dim + i];
}

cudaError_t launch_gather(const kv_op_gather &op, const Launch &l) {
    return launch(gather, row_grid(l.bounds.max_out, op.dim), kThreads, l.stream, op, l.state);
}

}  // namespace kv
