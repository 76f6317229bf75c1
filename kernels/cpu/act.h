// act.h - SiLU (SwiGLU; Shazeer, 2020) and the tanh form of GELU (Hendrycks and Gimpel, 2016).
#pragma once
#include "../kvrun.h"
#include "lanes.h"

namespace KV_NS {

static inline f32x16 silu(f32x16 x) { return x / (splat(1.f) + exp(splat(0.f) - x)); }

// x/2 (1 + tanh u) = x / (1 + e^-2u), which does not cancel for negative u.
static inline f32x16 gelu_tanh(f32x16 x) {
    f32x16 u = x * fma(x * x, splat(0.7978845608f * 0.044715f), splat(0.7978845608f));
    return x / (splat(1.f) + exp(u * splat(-2.f)));
}

// Calls f(activation) with that of `kind`.
template <class F> static inline void with_activation(int32_t kind, F f) {
    if (kind == KV_SILU) f([](f32x16 x) __attribute__((always_inline)) { return silu(x); });
    else f([](f32x16 x) __attribute__((always_inline)) { return gelu_tanh(x); });
}

}  // namespace KV_NS
