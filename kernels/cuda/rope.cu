// rope.cu - the rotary table of a step: out[R][2][half] = cos, then sin, of pos*inv_freq, times factor.
#include "launch.cuh"

namespace kv {

static __global__ void rope(kv_op_rope op, const kv_state *state) {
    begin_kernel();
    const int row = blockIdx.x, i = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= state->n_rows || i >= op.half) return;
    const float angle = (float)state->pos[row] * op.inv_freq[i];  // up to n_ctx radians: never the fast intrinsics
    float *out = op.out + (int64_t)row * 2 * op.half;
    out[i] = cosf(angle) * op.factor;
    out[op.half + i] = sinf(angle) * op.factor;
}

cudaError_t launch_rope(const kv_op_rope &op, const Launch &l) {
    return launch(rope, row_grid(l.bounds.max_rows, op.half), kThreads, l.stream, op, l.state);
}

}  // namespace kv
