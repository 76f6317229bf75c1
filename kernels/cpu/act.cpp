// act.cpp - gated activations: SiLU (SwiGLU; Shazeer, 2020) and the tanh form of GELU (Hendrycks and Gimpel, 2016).
#include "kernels.h"
#include "lanes.h"

namespace KV_NS {

static inline f32x16 silu(f32x16 x) { return x / (splat(1.f) + exp(splat(0.f) - x)); }

// x/2 (1 + tanh u) = x / (1 + e^-2u), which does not cancel for negative u.
static inline f32x16 gelu_tanh(f32x16 x) {
    f32x16 u = x * fma(x * x, splat(0.7978845608f * 0.044715f), splat(0.7978845608f));
    return x / (splat(1.f) + exp(u * splat(-2.f)));
}

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
    if (op.kind == KV_SILU) gate(op, state, worker, silu);
    else gate(op, state, worker, gelu_tanh);
}

}  // namespace KV_NS
