// rms.h - the factor of RMSNorm.
#pragma once
#include "lanes.h"

namespace KV_NS {

// 1 / sqrt(mean(x^2) + eps)
static inline float rms_factor(const float *x, int dim, float eps) {
    f32x16 s[4] = {splat(0), splat(0), splat(0), splat(0)};
    int i = 0;
    for (; i + 64 <= dim; i += 64)
        for (int j = 0; j < 4; j++) {
            f32x16 v = load(x + i + 16 * j);
            s[j] = fma(v, v, s[j]);
        }
    for (; i + 16 <= dim; i += 16) {
        f32x16 v = load(x + i);
        s[0] = fma(v, v, s[0]);
    }
    if (i < dim) {
        f32x16 v = load_part(x + i, dim - i);
        s[1] = fma(v, v, s[1]);
    }
    return 1.f / sqrtf(sum((s[0] + s[1]) + (s[2] + s[3])) / (float)dim + eps);
}

}  // namespace KV_NS
