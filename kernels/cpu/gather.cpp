// gather.cpp - the rows whose logits are wanted.
#include <cstring>

#include "kernels.h"

namespace KV_NS {

void gather(const kv_op_gather &op, const kv_state &state, kv::Worker &worker) {
    worker.split(state.n_out, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            memcpy(op.out + i * op.dim, op.x + (int64_t)state.out_row[i] * op.dim, sizeof(float) * (size_t)op.dim);
    });
}

}  // namespace KV_NS
