// ops.h - the launchers of kernels/cuda, one per op and file. They check nothing: step.cpp has done so.
// A launch depends only on the op and on bounds of the row counts, never on the state, whose contents are device memory
// that changes between replays of a captured graph. So a grid covers the bound, and a kernel leaves the rows above R alone.
#pragma once
#include "../kvrun.h"
#ifdef KVRUN_SIMT
#include "../simt/simt.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace kv {

// Where and for how many rows a step is launched.
struct Launch {
    const kv_state *state;        // device memory
    int max_rows, max_out;        // bounds of R and O
    cudaStream_t stream;

    int rows(int32_t which) const { return which == KV_ROWS_OUT ? max_out : max_rows; }
};

cudaError_t launch_embed(const kv_op_embed &, const Launch &);
cudaError_t launch_norm(const kv_op_norm &, const Launch &);
cudaError_t launch_act(const kv_op_act &, const Launch &);
cudaError_t launch_rope(const kv_op_rope &, const Launch &);
cudaError_t launch_gather(const kv_op_gather &, const Launch &);

}  // namespace kv
