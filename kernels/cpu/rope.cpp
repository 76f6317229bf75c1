// rope.cpp - the cosines and sines of a step's positions, which every layer's append reads.
#include <cmath>

#include "kernels.h"

namespace KV_NS {

void rope(const kv_op_rope &op, const kv_state &state, kv::Worker &worker) {
    worker.split(state.n_rows, 8, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const float pos = (float)state.pos[row];
            float *c = op.out + row * 2 * op.half, *s = c + op.half;
            for (int i = 0; i < op.half; i++) {
                const float angle = pos * op.inv_freq[i];
                c[i] = cosf(angle) * op.factor;
                s[i] = sinf(angle) * op.factor;
            }
        }
    });
}

}  // namespace KV_NS
