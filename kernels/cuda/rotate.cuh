// rotate.cuh - the orthonormal Walsh-Hadamard transform of a head in shared memory, by one warp, to the bit as page.h says.
#pragma once
#include "number.cuh"

namespace kv {

// x[dim], in place; its own inverse. The warp's lanes see each other's x afterwards.
static __device__ __forceinline__ void rotate(float *x, int dim, int lane) {
    const int block = dim & -dim;
    for (int stride = 1; stride < block; stride *= 2) {
        __syncwarp();
        for (int i = lane; i < dim / 2; i += 32) {
            const int at = i / stride * 2 * stride + i % stride;
            const float a = x[at], b = x[at + stride];
            x[at] = a + b;
            x[at + stride] = a - b;
        }
    }
    __syncwarp();
    const float norm = (float)(1 / sqrt((double)block));
    for (int i = lane; i < dim; i += 32) x[i] *= norm;
    __syncwarp();
}

}  // namespace kv
