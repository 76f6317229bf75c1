// simt.cpp - fibers, barriers and the scheduler. See simt.h.
#include "simt.h"
#include <algorithm>
#include <memory>
#include <ucontext.h>
#include <vector>

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace simt {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;

enum class Wait { no, block, warp, finished };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    uint3 index;
    Wait wait;
    uint32_t mask;                // lanes that a warp barrier waits for
    uint64_t brought;             // to an exchange
};

// One block at a time; a launch may not start another.
struct Block {
    std::vector<Fiber> fibers;    // kept from launch to launch for their stacks
    unsigned n = 0, current = 0;
    ucontext_t scheduler;
    const std::function<void()> *thread;
};
static thread_local Block block;

static void fiber_main() {
    (*block.thread)();
    block.fibers[block.current].wait = Wait::finished;
}

static void pause(Wait wait, uint32_t mask) {
    Fiber &self = block.fibers[block.current];
    self.wait = wait;
    self.mask = mask;
    swapcontext(&self.context, &block.scheduler);
}

void block_barrier() { pause(Wait::block, 0); }
void warp_barrier(uint32_t mask) { pause(Wait::warp, mask); }
unsigned lane() { return block.current % 32; }

uint64_t exchange(uint32_t mask, uint64_t value, unsigned from) {
    block.fibers[block.current].brought = value;
    warp_barrier(mask);
    const unsigned source = std::min(block.current / 32 * 32 + from, block.n - 1);
    value = block.fibers[source].brought;
    warp_barrier(mask);           // nobody brings the next value before all have read this one
    return value;
}

// Lets go on all fibers from `begin` to `end` that wait like `first`, if no other one that they wait for is missing.
static void release(unsigned begin, unsigned end, Wait wait, uint32_t mask) {
    for (unsigned i = begin; i < end; i++) {
        const Fiber &f = block.fibers[i];
        if (wait == Wait::warp && !(mask >> (i - begin) & 1)) continue;
        if (f.wait == Wait::finished) continue;            // a thread that has exited is not waited for
        if (f.wait != wait || f.mask != mask) return;
    }
    for (unsigned i = begin; i < end; i++) {
        Fiber &f = block.fibers[i];
        if (f.wait == wait && f.mask == mask) f.wait = Wait::no;
    }
}

// Runs the fibers of one block to their end; false when all that are left wait in vain.
static bool run_block() {
    for (;;) {
        bool ran = false, left = false;
        for (unsigned i = 0; i < block.n; i++) {
            Fiber &f = block.fibers[i];
            if (f.wait != Wait::no) continue;
            ran = true;
            block.current = i;
            threadIdx = f.index;
            swapcontext(&block.scheduler, &f.context);
        }
        if (!ran) return false;
        for (unsigned i = 0; i < block.n; i++) {
            const Fiber &f = block.fibers[i];
            left |= f.wait != Wait::finished;
            const unsigned warp = i / 32 * 32;
            if (f.wait == Wait::block) release(0, block.n, Wait::block, 0);
            if (f.wait == Wait::warp) release(warp, std::min(warp + 32, block.n), Wait::warp, f.mask);
        }
        if (!left) return true;
    }
}

cudaError_t launch(dim3 grid, dim3 size, const std::function<void()> &thread) {
    const unsigned n = size.x * size.y * size.z;
    if (!n || n > kMaxThreads || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
    if (block.fibers.size() < n) block.fibers.resize(n);
    block.n = n;
    block.thread = &thread;
    blockDim = size;
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                for (unsigned i = 0; i < n; i++) {
                    Fiber &f = block.fibers[i];
                    if (!f.stack) f.stack.reset(new char[kStack]);
                    getcontext(&f.context);
                    f.context.uc_stack.ss_sp = f.stack.get();
                    f.context.uc_stack.ss_size = kStack;
                    f.context.uc_link = &block.scheduler;
                    makecontext(&f.context, fiber_main, 0);
                    f.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
                    f.wait = Wait::no;
                }
                if (!run_block()) return cudaErrorLaunchTimeout;
            }
    return cudaSuccess;
}

}  // namespace simt

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchTimeout: return "the threads of a block wait for each other for ever";
    default: return "invalid argument";
    }
}
