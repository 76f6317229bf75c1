// stage.cuh - asynchronous copies from global to shared memory, and words that a thread finds where it brought them itself. So many bytes
// are on their way without a register for each.
#pragma once
#include "number.cuh"

namespace kv {

// 16 bytes; both addresses are multiples of 16. They are there for the thread after wait_copies, for the block after a barrier that
// follows it. commit_copies() ends a group; wait_copies<N>() leaves the N newest groups under way.
#ifdef KVRUN_SIMT
static inline void copy16(void *to, const void *from) { simt::copy_async(to, from, 16); }
static inline void commit_copies() { simt::commit_copies(); }
template <int N> static inline void wait_copies() { simt::wait_copies(N); }
#else
static __device__ __forceinline__ void copy16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
static __device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#endif

// The 16 bytes that a thread takes in each of its turns at something.
struct Words {
    const char *first;
    int step;
    __device__ __forceinline__ uint4 operator()(int turn) const { return load16(first + turn * step); }
};

// `turns` words of every thread of a block of THREADS, in shared memory at `stage`: [turns][THREADS][16].
template <int THREADS> static __device__ __forceinline__ Words staged_words(const float *stage) { return {(const char *)stage + 16 * threadIdx.x, 16 * THREADS}; }
template <int THREADS> static __device__ __forceinline__ void stage_words(float *stage, const Words &from, int turns) {
    char *to = (char *)stage + 16 * threadIdx.x;
#pragma unroll 1
    for (int turn = 0; turn < turns; turn++) copy16(to + turn * 16 * THREADS, from.first + turn * from.step);
}
// `bytes` bytes, a multiple of 16, by all threads of the block.
template <int THREADS> static __device__ __forceinline__ void stage_bytes(float *stage, const char *from, int bytes) {
#pragma unroll 1
    for (int at = 16 * threadIdx.x; at < bytes; at += 16 * THREADS) copy16((char *)stage + at, from + at);
}

}  // namespace kv
