// act.cu - the gated activation: out[R][dim] = act(x[R][0:dim]) * x[R][dim:2*dim].
#include "act.cuh"

namespace kv {

static __global__ void act(kv_op_act op, const kv_state *state) {
    begin_kernel();
    const int row = blockIdx.x, i = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= state->n_rows || i >= op.dim) return;
    const float *x = op.x + (int64_t)row * 2 * op.dim;
    op.out[(int64_t)row * op.dim + i] = activation(op.kind, x[i]) * x[op.dim + i];
}

cudaError_t launch_act(const kv_op_act &op, const Launch &l) {
    return launch(act, row_grid(l.bounds.max_rows, op.dim), kThreads, l.stream, op, l.state);
}

}  // namespace kv
