// simt.h - a CUDA device on the host, enough for the sources of kernels/cuda: blocks run one after the other, the threads
// of a block are fibers of the calling thread. A fiber runs until it meets a barrier; in which order they take turns is
// set by kv_simt_order. So races show as results that depend on the order, a wrong index shows under a sanitizer, and a
// deadlock is an error. One launch at a time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static                        /* blocks take turns; what the last block left is there, as on a GPU */
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchTimeout = 702 };
typedef void *cudaStream_t;
const char *cudaGetErrorString(cudaError_t);
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}

namespace simt {
// What the running thread sees. Plain globals: one launch runs at a time.
struct Place { uint3 thread, block; dim3 block_size, grid_size; };
extern Place place;
extern uint64_t begun;                           // threads that came to begin_kernel() of launch.cuh since a launch began

// Runs `thread` for every thread of every block. shared_bytes: dynamic shared memory, every byte 0xFF when a block begins.
// cudaErrorLaunchTimeout: all threads of a block wait, and none can go on.
cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &thread);
inline cudaError_t launch(dim3 grid, dim3 block, const std::function<void()> &thread) { return launch(grid, block, 0, thread); }
[[noreturn]] void leave();                       // ends the thread
void *dynamic_shared();
void block_barrier();
void warp_barrier(uint32_t mask);                // waits for the lanes of mask: diverged halves of a warp do not mix
uint64_t exchange(uint32_t mask, uint64_t value, unsigned lane);  // the value that `lane` brought
uint32_t ballot(uint32_t mask, bool value);
unsigned lane();

// d += A B of mma.m16n8k16 with float32 accumulators, as inexact as on tensor cores. a[4], b[2]: the lane's fragments, two 16-bit
// numbers in each, which `wide` makes a float; d[4].
void mma_m16n8k16(float *d, const uint32_t *a, const uint32_t *b, float (*wide)(uint16_t));
void copy_async(void *to, const void *from, unsigned bytes);      // done when the thread waits for its group, not before
void commit_copies();
void wait_copies(unsigned pending);              // until at most `pending` of the thread's groups are not done

template <class T> T shuffle(uint32_t mask, T value, unsigned lane) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, lane);
    memcpy(&value, &bits, sizeof value);
    return value;
}
}  // namespace simt

#define threadIdx (simt::place.thread)
#define blockIdx (simt::place.block)
#define blockDim (simt::place.block_size)
#define gridDim (simt::place.grid_size)

inline void __syncthreads() { simt::block_barrier(); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { simt::warp_barrier(mask); }
inline void __threadfence() {}
template <class T> T __shfl_sync(uint32_t mask, T value, int from) { return simt::shuffle(mask, value, from & 31); }
template <class T> T __shfl_xor_sync(uint32_t mask, T value, int with) { return simt::shuffle(mask, value, simt::lane() ^ with); }
template <class T> T __shfl_down_sync(uint32_t mask, T value, unsigned by) {
    return simt::shuffle(mask, value, simt::lane() + by < 32 ? simt::lane() + by : simt::lane());
}
template <class T> T __shfl_up_sync(uint32_t mask, T value, unsigned by) {
    return simt::shuffle(mask, value, simt::lane() >= by ? simt::lane() - by : simt::lane());
}
inline uint32_t __ballot_sync(uint32_t mask, bool value) { return simt::ballot(mask, value); }
inline bool __any_sync(uint32_t mask, bool value) { return simt::ballot(mask, value) != 0; }
inline bool __all_sync(uint32_t mask, bool value) { return simt::ballot(mask, value) == mask; }
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
    for (unsigned with = 16; with > 0; with /= 2) {
        const uint32_t other = simt::shuffle(mask, value, simt::lane() ^ with);
        value = other > value ? other : value;
    }
    return value;
}

// Fibers change places only at barriers, so nothing can come between.
template <class T, class U> T atomicAdd(T *at, U value) { const T old = *at; *at = old + (T)value; return old; }
template <class T, class U> T atomicMax(T *at, U value) { const T old = *at; if ((T)value > old) *at = (T)value; return old; }
template <class T, class U> T atomicMin(T *at, U value) { const T old = *at; if ((T)value < old) *at = (T)value; return old; }
template <class T, class U> T atomicExch(T *at, U value) { const T old = *at; *at = (T)value; return old; }
template <class T> T __ldg(const T *p) { return *p; }

inline float __uint_as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(uint32_t x) { return __builtin_ffs((int)x); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return (uint64_t)((unsigned __int128)a * b >> 64); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}
inline unsigned long long __float2ull_rn(float x) { return (unsigned long long)rintf(x); }

// Rounded by themselves, never fused.
inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }
inline float __fadd_rn(float a, float b) { volatile float r = a + b; return r; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { volatile double r = a * b; return r; }
inline double __dadd_rn(double a, double b) { volatile double r = a + b; return r; }

struct __half { uint16_t bits; };
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline float __half2float(__half h) {
    const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, rest = (uint32_t)(h.bits & 0x7fff) << 13;
    if ((h.bits & 0x7c00) == 0x7c00) return __uint_as_float(sign | 0x7f800000u | rest);
    const float magnitude = __uint_as_float(rest) * __uint_as_float(0x77800000u);  // exponent bias: * 2^112
    return sign ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {(uint16_t)(sign | 0x7fff)};
    if (magnitude >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};               // 65520 and more
    if (magnitude < 0x38800000) {                                                  // below the normal halves: units of 2^-24
        const float units = __uint_as_float(magnitude) * 16777216.f;
        return {(uint16_t)(sign | (uint32_t)rintf(units))};
    }
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return {(uint16_t)(sign | ((magnitude - 0x38000000) >> 13))};
}
