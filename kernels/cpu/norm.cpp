// norm.cpp - RMSNorm (Zhang and Sennrich, 2019), also added to a residual.
#include "kernels.h"
#include "rms.h"

namespace KV_NS {

void norm(const kv_op_norm &op, const kv_state &state, kv::Worker &worker) {
    const int dim = op.dim, whole = dim / 16 * 16, rest = dim - whole;
    const f32x16 offset = splat(op.w_offset), scale = splat(op.scale);
    worker.split(kv::rows_of(op.rows, state), 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const float *x = op.x + row * dim;
            float *out = op.out + row * dim;
            const f32x16 factor = splat(rms_factor(x, dim, op.eps));
            auto y = [&](f32x16 x, f32x16 w) { return x * factor * (w + offset); };
            if (op.accumulate) {
                for (int i = 0; i < whole; i += 16) store(out + i, fma(scale, y(load(x + i), load(op.w + i)), load(out + i)));
                if (rest) {
                    f32x16 z = y(load_part(x + whole, rest), load_part(op.w + whole, rest));
                    store_part(out + whole, fma(scale, z, load_part(out + whole, rest)), rest);
                }
            } else {
                for (int i = 0; i < whole; i += 16) store(out + i, y(load(x + i), load(op.w + i)));
                if (rest) store_part(out + whole, y(load_part(x + whole, rest), load_part(op.w + whole, rest)), rest);
            }
        }
    });
}

}  // namespace KV_NS
