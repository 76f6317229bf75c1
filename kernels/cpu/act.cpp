// act.cpp - gated activations.
#include "act.h"
#include "kernels.h"

namespace KV_NS {

template <class F> static void gate(const kv_op_act &op, const kv_state &state, kv::Worker &worker, F f) {
    const int PART = 512;
    const int64_t parts = (op.dim + PART - 1) / PART;
    worker.split(parts * state.n_rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t row = item / parts;
            const int from = (int)(item % parts) * PART, to = from + PART < op.dim ? from + PART : op.dim;
            const float *x = op.x + row * 2 * op.dim, *up = x + op.dim;
            float *out = op.out + row * op.dim;
            int i = from;
            for (; i + 16 <= to; i += 16) store(out + i, f(load(x + i)) * load(up + i));
            if (i < to) store_part(out + i, f(load_part(x + i, to - i)) * load_part(up + i, to - i), to - i);
        }
    });
}

void act(const kv_op_act &op, const kv_state &state, kv::Worker &worker) {
    with_activation(op.kind, [&](auto f) { gate(op, state, worker, f); });
}

}  // namespace KV_NS
