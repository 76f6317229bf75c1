// launch.cuh - what the kernels share: the launch itself, grids over rows, number formats, a sum over a block.
#pragma once
#include "ops.h"
#ifndef KVRUN_SIMT
#include <cuda_fp16.h>
#endif

namespace kv {

constexpr int kThreads = 256;     // of a block, unless an op has reason for another number

// One row per block in x; in y as many blocks as cover `columns`, `per_thread` of them to a thread.
inline dim3 row_grid(int rows, int columns, int per_thread = 1) {
    const int tile = kThreads * per_thread;
    return dim3(rows, (columns + tile - 1) / tile);
}

// Reports what the launch itself can tell: cudaSuccess does not mean that the kernel has run.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
    if (grid.x == 0) return cudaSuccess;
#ifdef KVRUN_SIMT
    (void)stream;
    return simt::launch(grid, block, [&] { kernel(args...); });
#else
    kernel<<<grid, block, 0, stream>>>(args...);
    return cudaGetLastError();
#endif
}

static __device__ __forceinline__ int rows_of(int32_t which, const kv_state *s) {
    return which == KV_ROWS_OUT ? s->n_out : s->n_rows;
}

static __device__ __forceinline__ float bf16_to_f32(uint32_t bits) { return __uint_as_float(bits << 16); }
static __device__ __forceinline__ float f16_to_f32(uint32_t bits) { return __half2float(__ushort_as_half((unsigned short)bits)); }

// Sum over the threads of a block, given to each of them; the order of addition is fixed. blockDim.x is a multiple of 32.
static __device__ __forceinline__ float block_sum(float value) {
    __shared__ float warp_sum[32];
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += warp_sum[warp];
    __syncthreads();              // so that a second call may write warp_sum
    return sum;
}

}  // namespace kv
