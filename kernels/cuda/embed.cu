// embed.cu - out[R][k] = scale * W[token][:] from a packed F32, F16 or BF16 matrix (page.h).
#include "launch.cuh"

namespace kv {

// A thread takes a pair of columns: in the 16-bit formats the pair is one word.
static __global__ void embed(kv_op_embed op, const kv_state *state) {
    const int row = blockIdx.x, k = op.w.k;
    const int pair = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= state->n_rows || 2 * pair >= k) return;
    const int token = state->token[row], lane = token % KV_LANES;
    const int64_t block = token / KV_LANES;
    float a, b;
    if (op.w.dtype == KV_F32) {
        const float *at = (const float *)op.w.data + (block * k + 2 * pair) * KV_LANES + lane;
        a = at[0];
        b = at[KV_LANES];
    } else {
        const uint32_t word = ((const uint32_t *)op.w.data)[(block * (k / 2) + pair) * KV_LANES + lane];
        if (op.w.dtype == KV_BF16) {
            a = bf16_to_f32(word & 0xffff);
            b = bf16_to_f32(word >> 16);
        } else {
            a = f16_to_f32(word & 0xffff);
            b = f16_to_f32(word >> 16);
        }
    }
    float *out = op.out + (int64_t)row * k + 2 * pair;
    out[0] = op.scale * a;
    out[1] = op.scale * b;
}

cudaError_t launch_embed(const kv_op_embed &op, const Launch &l) {
    return launch(embed, row_grid(l.max_rows, op.w.k, 2), kThreads, l.stream, op, l.state);
}

}  // namespace kv
