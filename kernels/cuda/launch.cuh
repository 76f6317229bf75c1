// launch.cuh - what the kernels share: the launch itself, grids over rows, sums over a warp and over a block.
#pragma once
#include "number.cuh"
#include "ops.h"

namespace kv {

constexpr int kThreads = 256;     // of a block, unless an op has reason for another number
constexpr uint32_t kAllLanes = 0xffffffffu;

// One row per block in x; in y as many blocks as cover `columns`, `per_thread` of them to a thread.
inline dim3 row_grid(int rows, int columns, int per_thread = 1) {
    const int tile = kThreads * per_thread;
    return dim3(rows, (columns + tile - 1) / tile);
}

// Reports what the launch itself can tell: cudaSuccess does not mean that the kernel has run.
template <class... Params, class... Args>
cudaError_t launch_shared(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef KVRUN_SIMT
    (void)stream;
    return simt::launch(grid, block, shared_bytes, [&] { kernel(args...); });
#else
    if (shared_bytes > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, block, shared_bytes, stream>>>(args...);
    return cudaGetLastError();
#endif
}
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
    return launch_shared(kernel, grid, block, 0, stream, args...);
}

// `name` points to the block's dynamic shared memory.
#ifdef KVRUN_SIMT
#define KV_DYNAMIC_SHARED(type, name) type *name = (type *)simt::dynamic_shared()
#else
#define KV_DYNAMIC_SHARED(type, name)                    \
    extern __shared__ __align__(128) unsigned char kv_dynamic_shared[]; \
    type *name = (type *)kv_dynamic_shared
#endif

static __device__ __forceinline__ int rows_of(int32_t which, const kv_state *s) {
    return which == KV_ROWS_OUT ? s->n_out : s->n_rows;
}

static __device__ __forceinline__ float warp_sum(float value) {
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
    return value;
}
static __device__ __forceinline__ float warp_max(float value) {
    for (int lane = 16; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, lane));
    return value;
}

// Sum over the threads of a block, given to each of them; the order of addition is fixed. blockDim.x is a multiple of 32.
static __device__ __forceinline__ float block_sum(float value) {
    __shared__ float sums[32];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += sums[warp];
    __syncthreads();              // so that a second call may write sums
    return sum;
}

}  // namespace kv
