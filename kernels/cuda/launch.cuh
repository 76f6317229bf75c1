// launch.cuh - what the kernels share: the launch itself, grids over rows, sums over a warp and over a block.
#pragma once
#include "number.cuh"
#include "ops.h"
#include <atomic>

namespace kv {

constexpr int kThreads = 256;     // of a block, unless an op has reason for another number
constexpr uint32_t kAllLanes = 0xffffffffu;

// One row per block in x; in y as many blocks as cover `columns`, `per_thread` of them to a thread.
inline dim3 row_grid(int rows, int columns, int per_thread = 1) {
    const int tile = kThreads * per_thread;
    return dim3(rows, (columns + tile - 1) / tile);
}

// The first statement of every kernel, before any thread returns. On Hopper and later a kernel may be started while the one
// before it on the stream still runs (programmatic dependent launch): this lets the next one start, and waits until all before
// is done and can be seen. What comes before it may read weights and nothing else. The emulator counts who has been here.
static __device__ __forceinline__ void begin_kernel() {
#if defined(KVRUN_SIMT)
    simt::begun++;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifndef KVRUN_SIMT
// Whether `kernel`, and so every other, may overlap on the current device as begin_kernel() says: PTX of an older architecture that a
// newer driver compiled waits for nothing.
inline bool overlaps(const void *kernel) {
    static int known[64];         // by device: 0 not asked yet, 1 no, 2 yes
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
    if (!known[device]) {
        cudaFuncAttributes attributes;
        known[device] = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90 ? 2 : 1;
    }
    return known[device] == 2;
}

// More shared memory than 48 KB is to be asked for, once for a kernel and device. What was allowed is never lowered, because a captured
// launch may need the larger one; and a launch like one before asks the runtime nothing, which a capture might refuse.
inline cudaError_t allow_shared(const void *kernel, size_t bytes) {
    if (bytes <= 48 * 1024) return cudaSuccess;
    static struct { const void *kernel; int device; size_t bytes; } allowed[64];
    static std::atomic_flag busy = ATOMIC_FLAG_INIT;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    while (busy.test_and_set(std::memory_order_acquire)) {}
    int i = 0;
    while (i < 63 && allowed[i].kernel && (allowed[i].kernel != kernel || allowed[i].device != device)) i++;
    if (allowed[i].kernel != kernel || allowed[i].device != device) allowed[i] = {kernel, device, 0};  // the last place serves all that find none
    if (allowed[i].bytes < bytes) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
        if (error == cudaSuccess) allowed[i].bytes = bytes;
    }
    busy.clear(std::memory_order_release);
    return error;
}
#endif

// Reports what the launch itself can tell: cudaSuccess does not mean that the kernel has run.
template <class... Params, class... Args>
cudaError_t launch_shared(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef KVRUN_SIMT
    (void)stream;
    simt::begun = 0;
    const cudaError_t error = simt::launch(grid, block, shared_bytes, [&] { kernel(args...); });
    const uint64_t threads = (uint64_t)grid.x * grid.y * grid.z * block.x * block.y * block.z;
    return error == cudaSuccess && simt::begun != threads ? cudaErrorInvalidValue : error;
#else
    const cudaError_t error = allow_shared((const void *)kernel, shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = overlaps((const void *)kernel) ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
#endif
}
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, cudaStream_t stream, Args... args) {
    return launch_shared(kernel, grid, block, 0, stream, args...);
}

// A device function that stays a call.
#ifdef KVRUN_SIMT
#define KV_NOINLINE __attribute__((noinline))
#else
#define KV_NOINLINE __noinline__
#endif

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

// Whether this block is the last of `blocks` to come here with a counter of zero, which is zero again afterwards. It then sees all
// that the others' threads wrote before.
static __device__ __forceinline__ bool last_to_arrive(unsigned *counter, unsigned blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(counter, 1u) == blocks - 1;
        if (last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

}  // namespace kv
