// rotate.cuh - the orthonormal Walsh-Hadamard transform of a head in shared memory, by one warp, to the bit as page.h says.
#pragma once
#include "number.cuh"

namespace kv {

// x[dim], dim at most 32*MOST, in place; its own inverse. What the warp's lanes have written is seen by it, and they see each other's x afterwards.
// Lanes hold every 32nd number: strides up to 16 are shuffles, greater ones a lane's own business.
template <int MOST = 256 / 32> static __device__ __forceinline__ void rotate(float *x, int dim, int lane) {
    const int block = dim & -dim;
    float y[MOST];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MOST; i++) y[i] = 32 * i + lane < dim ? x[32 * i + lane] : 0.f;
    for (int stride = 1; stride < block && stride < 32; stride *= 2)
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            if (32 * i >= dim) break;
            const float other = __shfl_xor_sync(0xffffffffu, y[i], stride);
            y[i] = lane & stride ? other - y[i] : y[i] + other;
        }
#pragma unroll
    for (int stride = 1; stride < MOST; stride *= 2) {
        if (32 * stride >= block) break;
#pragma unroll
        for (int i = 0; i < MOST; i++) {
            if (i & stride || 32 * i >= dim) continue;
            const float a = y[i], b = y[i + stride];
            y[i] = a + b;
            y[i + stride] = a - b;
        }
    }
    // 1/sqrt(block): 2^-(log/2), times sqrt(1/2) where log is odd.
    const int log = __popc(block - 1);
    const float norm = __uint_as_float((uint32_t)(127 - log / 2) << 23) * (log % 2 ? 0.70710678118654752f : 1.f);
#pragma unroll
    for (int i = 0; i < MOST; i++)
        if (32 * i + lane < dim) x[32 * i + lane] = y[i] * norm;
    __syncwarp();
}

}  // namespace kv
