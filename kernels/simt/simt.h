// simt.h - a CUDA device on the host, enough for the sources of kernels/cuda: blocks run one after the other, the threads
// of a block are fibers of the calling thread. A fiber runs until it meets a barrier, so a race is not found here, but
// a wrong index (with a sanitizer), a missing barrier that matters in that order, and a deadlock are.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static thread_local   /* blocks take turns; what the last block left is there, as on a GPU */
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 { unsigned x, y, z; };
extern thread_local uint3 threadIdx, blockIdx;   // set whenever a fiber is entered
extern thread_local dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchTimeout = 702 };
typedef void *cudaStream_t;
const char *cudaGetErrorString(cudaError_t);

namespace simt {
// Runs `thread` for every thread of every block. cudaErrorLaunchTimeout: all threads of a block wait, and none can go on.
cudaError_t launch(dim3 grid, dim3 block, const std::function<void()> &thread);
void block_barrier();
void warp_barrier(uint32_t mask);                // waits for the lanes of mask: diverged halves of a warp do not mix
uint64_t exchange(uint32_t mask, uint64_t value, unsigned lane);  // the value that `lane` brought

template <class T> T shuffle(uint32_t mask, T value, unsigned lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, lane);
    memcpy(&value, &bits, sizeof value);
    return value;
}
unsigned lane();
}  // namespace simt

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { simt::warp_barrier(mask); }
template <class T> T __shfl_sync(uint32_t mask, T value, int from) { return simt::shuffle(mask, value, from & 31); }
template <class T> T __shfl_xor_sync(uint32_t mask, T value, int with) { return simt::shuffle(mask, value, simt::lane() ^ with); }
template <class T> T __shfl_down_sync(uint32_t mask, T value, unsigned by) {
    return simt::shuffle(mask, value, simt::lane() + by < 32 ? simt::lane() + by : simt::lane());
}

inline float __uint_as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
struct __half { uint16_t bits; };
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half h) {
    const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, rest = (uint32_t)(h.bits & 0x7fff) << 13;
    if ((h.bits & 0x7c00) == 0x7c00) return __uint_as_float(sign | 0x7f800000u | rest);
    const float magnitude = __uint_as_float(rest) * __uint_as_float(0x77800000u);  // exponent bias: * 2^112
    return sign ? -magnitude : magnitude;
}
