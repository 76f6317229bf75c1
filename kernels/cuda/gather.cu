// gather.cu - the rows whose logits are wanted: out[O][dim] = x[out_row][dim]; the counters at the start of a step; and the state of
// the step that follows a draw.
#include "launch.cuh"

namespace kv {

static __global__ void gather(kv_op_gather op, const kv_state *state) {
    begin_kernel();
    const int row = blockIdx.x, i = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= state->n_out || i >= op.dim) return;
    op.out[(int64_t)row * op.dim + i] = op.x[(int64_t)state->out_row[row] * op.dim + i];
}

cudaError_t launch_gather(const kv_op_gather &op, const Launch &l) {
    return launch(gather, row_grid(l.bounds.max_out, op.dim), kThreads, l.stream, op, l.state);
}

// token and pos are const to all ops but this one.
static __global__ void advance(kv_state *state) {
    begin_kernel();
    for (int i = threadIdx.x; i < state->n_rows; i += blockDim.x) {
        const int next = state->next[i];
        ((int32_t *)state->token)[i] = next < 0 ? 0 : next;      // of logits that were not finite nothing was drawn
        ((int32_t *)state->pos)[i] += 1;
    }
    if (threadIdx.x == 0) {
        state->status = KV_OK;
        state->ahead = state->ahead ? 2 : 1;
    }
}

static __global__ void clear(unsigned *counters, int n) {
    begin_kernel();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) counters[i] = 0;
}

cudaError_t launch_clear(unsigned *counters, int n, cudaStream_t stream) {
    return launch(clear, (n + kThreads - 1) / kThreads, kThreads, stream, counters, n);
}

cudaError_t launch_advance(kv_state *state, cudaStream_t stream) { return launch(advance, 1, 32, stream, state); }

}  // namespace kv
