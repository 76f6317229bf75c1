// norm.cu - RMSNorm (Zhang and Sennrich, 2019) of each row, with an offset on the weights and an optional residual add.
#include "launch.cuh"

namespace kv {

// A block takes a row. out may be x: each element is read last by the thread that writes it.
static __global__ void norm(kv_op_norm op, const kv_state *state) {
    begin_kernel();
    const int row = blockIdx.x;
    if (row >= rows_of(op.rows, state)) return;
    const float *x = op.x + (int64_t)row * op.dim;
    float *out = op.out + (int64_t)row * op.dim;
    float squares = 0;
    for (int i = threadIdx.x; i < op.dim; i += blockDim.x) squares += x[i] * x[i];
    const float inverse = 1 / sqrtf(block_sum(squares) / op.dim + op.eps);
    for (int i = threadIdx.x; i < op.dim; i += blockDim.x) {
        const float y = x[i] * inverse * (op.w[i] + op.w_offset);
        out[i] = op.accumulate ? out[i] + op.scale * y : y;
    }
}

cudaError_t launch_norm(const kv_op_norm &op, const Launch &l) {
    return launch(norm, l.rows(op.rows), kThreads, l.stream, op, l.state);
}

}  // namespace kv
