// act.cuh - the activations of a gated MLP.
#pragma once
#include "launch.cuh"

namespace kv {

static __device__ __forceinline__ float activation(int kind, float gate) {
    if (kind == KV_SILU) return gate / (1 + expf(-gate));
    const float inner = 0.7978845608f * (gate + 0.044715f * gate * gate * gate);  // sqrt(2/pi)
    return 0.5f * gate * (1 + tanhf(inner));
}

}  // namespace kv
