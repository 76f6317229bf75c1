// ops.h - the launchers of kernels/cuda, one per op and file. They check nothing: step.cpp has done so.
// A launch depends only on the op and on the bounds, never on the state, whose contents are device memory that changes
// between replays of a captured graph. So a grid covers the bound, and a kernel leaves the rows above R alone.
#pragma once
#include "../kvrun.h"
#ifdef KVRUN_SIMT
#include "../simt/simt.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace kv {

// Where and for which steps a plan is launched.
struct Launch {
    kv_cuda_bounds bounds;
    kv_state *state;              // device memory
    char *scratch;                // device memory; free again when the op's last kernel has run
    unsigned *counters;           // device memory: zeros, and zeros again when the op's last kernel has run
    float *sums;                  // device memory [max_seqs][kv_heads][head_dim]: what a step that runs ahead leaves of a KV_Q4 K page's qsq
    cudaStream_t stream;

    int rows(int32_t which) const { return which == KV_ROWS_OUT ? bounds.max_out : bounds.max_rows; }
};

cudaError_t launch_embed(const kv_op_embed &, const Launch &);
cudaError_t launch_norm(const kv_op_norm &, const Launch &);
cudaError_t launch_linear(const kv_op_linear &, const Launch &);
cudaError_t launch_act(const kv_op_act &, const Launch &);
cudaError_t launch_rope(const kv_op_rope &, const Launch &);
cudaError_t launch_append(const kv_op_append &, const Launch &);
cudaError_t launch_close(const kv_op_append &, const Launch &);   // what KV_Q4 does after append's rows are stored
cudaError_t launch_settle(const kv_op_append &, const Launch &);  // makes `sums` those of the side memory
cudaError_t launch_attend(const kv_op_attend &, const Launch &);
// What follows one another in every layer, as one kernel: decode rows alone (fuse.h says where they fit).
cudaError_t launch_qkv(const kv_op_norm &, const kv_op_linear &, const kv_op_append &, const Launch &);
cudaError_t launch_gated(const kv_op_norm &, const kv_op_linear &, const kv_op_act &, const Launch &);
cudaError_t launch_gather(const kv_op_gather &, const Launch &);
cudaError_t launch_sample(const kv_op_sample &, const Launch &);
cudaError_t launch_unpack(const kv_weight &, int64_t row0, int64_t rows, void *out, int32_t dtype, cudaStream_t);

cudaError_t launch_advance(kv_state *, cudaStream_t);
cudaError_t launch_clear(unsigned *counters, int n, cudaStream_t);

// Bytes of scratch, and how many counters.
int64_t attend_scratch(const kv_op_attend &, const kv_cuda_bounds &);
int64_t attend_counters(const kv_op_attend &, const kv_cuda_bounds &);
int64_t qkv_counters(const kv_op_append &, const kv_cuda_bounds &);
int64_t sample_scratch(const kv_op_sample &, const kv_cuda_bounds &);

}  // namespace kv
