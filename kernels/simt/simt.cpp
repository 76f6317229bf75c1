// simt.cpp - fibers, barriers and the scheduler. See simt.h.
#include "simt.h"
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#endif
// Changing fibers through ucontext costs two system calls; that is left to sanitizers and other processors.
#if defined(__x86_64__) && defined(__linux__) && !defined(SANITIZED)
#define OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace simt {

Place place;
uint64_t begun = 0;
static uint64_t launches = 0;

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 96 * 1024;         // dynamic, beside 3 KiB of static memory, where a block has least: compute 8.6, 8.9, 12.0

enum class Wait { no, block, warp, finished };

struct Copy { void *to; const void *from; unsigned bytes; };

struct Fiber {
#ifdef OWN_SWITCH
    void *top = nullptr;          // of its stack, registers below
#else
    ucontext_t context;
#endif
    std::unique_ptr<char[]> stack;
    uint3 index;
    Wait wait;
    uint32_t mask;                // lanes that a warp barrier waits for
    uint64_t brought[2];          // to an exchange of the whole warp
    uint64_t apart;               // to a vote, or an exchange of some lanes
    unsigned exchanges;           // of the whole warp that it took part in
    uint32_t a[4], b[2];          // brought to a matrix product
    std::vector<Copy> open;       // copies that are not committed
    std::vector<std::vector<Copy>> groups;
};

// One block at a time; a launch may not start another.
struct Block {
    std::vector<Fiber> fibers;    // kept from launch to launch for their stacks
    unsigned n = 0, current = 0;
#ifdef OWN_SWITCH
    void *scheduler = nullptr;
#else
    ucontext_t scheduler;
#endif
    const std::function<void()> *thread;
    char *shared = nullptr;
};
static Block block;
static uint32_t order = 0;
static uint64_t random_state = 1;

#ifdef OWN_SWITCH
// Saves the callee-saved registers on this stack, whose top goes to *from, and goes on on the stack `to`.
extern "C" void kv_simt_switch(void **from, void *to);
asm(R"(
.text
.hidden kv_simt_switch
.globl kv_simt_switch
.type kv_simt_switch, @function
kv_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kv_simt_switch, .-kv_simt_switch
)");
static void to_scheduler(Fiber &self) { kv_simt_switch(&self.top, block.scheduler); }
static void to_fiber(Fiber &fiber) { kv_simt_switch(&block.scheduler, fiber.top); }
#else
static void to_scheduler(Fiber &self) { swapcontext(&self.context, &block.scheduler); }
static void to_fiber(Fiber &fiber) { swapcontext(&block.scheduler, &fiber.context); }
#endif

void leave() {
    block.fibers[block.current].wait = Wait::finished;
    to_scheduler(block.fibers[block.current]);                // and never comes back
    __builtin_unreachable();
}

static void fiber_main() {
    (*block.thread)();
    leave();
}

static void make_ready(Fiber &fiber) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.wait = Wait::no;
    fiber.exchanges = 0;
    fiber.open.clear();
    fiber.groups.clear();
#ifdef OWN_SWITCH
    void **top = (void **)(((uintptr_t)fiber.stack.get() + kStack) & ~(uintptr_t)15);
    *--top = nullptr;             // fiber_main begins as if it had been called: with its stack 8 bytes off 16
    *--top = (void *)fiber_main;
    fiber.top = top - 6;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#endif
}

static void pause(Wait wait, uint32_t mask) {
    Fiber &self = block.fibers[block.current];
    self.wait = wait;
    self.mask = mask;
    to_scheduler(self);
}

void *dynamic_shared() { return block.shared; }
void block_barrier() { pause(Wait::block, 0); }
void warp_barrier(uint32_t mask) { pause(Wait::warp, mask); }
unsigned lane() { return block.current % 32; }

uint64_t exchange(uint32_t mask, uint64_t value, unsigned from) {
    Fiber &self = block.fibers[block.current];
    const unsigned source = std::min(block.current / 32 * 32 + from, block.n - 1);
    if (mask == 0xffffffffu) {    // no lane can be two ahead of another, so two slots in turn do
        const unsigned turn = self.exchanges++ % 2;
        self.brought[turn] = value;
        warp_barrier(mask);
        return block.fibers[source].brought[turn];
    }
    self.apart = value;
    warp_barrier(mask);
    value = block.fibers[source].apart;
    warp_barrier(mask);           // nobody brings the next value before all have read this one
    return value;
}

uint32_t ballot(uint32_t mask, bool value) {
    block.fibers[block.current].apart = value;
    warp_barrier(mask);
    const unsigned warp = block.current / 32 * 32;
    uint32_t votes = 0;
    for (unsigned i = 0; i < 32 && warp + i < block.n; i++)
        if (mask >> i & 1 && block.fibers[warp + i].wait != Wait::finished && block.fibers[warp + i].apart) votes |= 1u << i;
    warp_barrier(mask);
    return votes;
}

// The sum of n terms as tensor cores make it: all at once, each cut off below the last bit of the largest, and the sum cut off to a float,
// not rounded (Fasi, Higham, Mikaitis and Pranesh, 2021, who find one bit more than this on A100; later ones keep more, none less).
static float cut_sum(const double *terms, int n) {
    double most = 0, all = 0;
    for (int i = 0; i < n; i++) most = std::max(most, std::fabs(terms[i])), all += terms[i];
    if (!std::isfinite(all)) return (float)all;
    int unit = most == 0 ? 0 : std::max(std::ilogb(most) - 23, -149);
    const double units = std::ldexp(1.0, -unit);
    int64_t sum = 0;
    for (int i = 0; i < n; i++) sum += (int64_t)(terms[i] * units);
    for (; sum >= 1 << 24 || sum <= -(1 << 24); sum /= 2) unit++;
    return (float)std::ldexp((double)sum, unit);
}

// Fragments as in the PTX manual: g = lane/4, t = lane%4. A rows g, g+8 and columns 2t, 2t+1 (+8); B rows 2t, 2t+1 (+8) of
// column g; D rows g, g+8 of columns 2t, 2t+1.
void mma_m16n8k16(float *d, const uint32_t *a, const uint32_t *b, float (*wide)(uint16_t)) {
    Fiber &self = block.fibers[block.current];
    std::copy(a, a + 4, self.a);
    std::copy(b, b + 2, self.b);
    warp_barrier(0xffffffffu);
    const Fiber *warp = &block.fibers[block.current / 32 * 32];
    const unsigned g = lane() / 4, t = lane() % 4;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = g + 8 * (i / 2), column = 2 * t + i % 2;
        double terms[17] = {d[i]};
        for (unsigned k = 0; k < 16; k++) {
            const unsigned half = k / 8, pair = k % 8 / 2, shift = k % 2 * 16;
            const uint32_t x = warp[row % 8 * 4 + pair].a[row / 8 + 2 * half], y = warp[column * 4 + pair].b[half];
            terms[k + 1] = (double)wide((uint16_t)(x >> shift)) * wide((uint16_t)(y >> shift));
        }
        d[i] = cut_sum(terms, 17);
    }
    warp_barrier(0xffffffffu);
}

void copy_async(void *to, const void *from, unsigned bytes) {
    memset(to, 0xff, bytes);      // what is read before the wait is no number
    block.fibers[block.current].open.push_back({to, from, bytes});
}
void commit_copies() {
    Fiber &self = block.fibers[block.current];
    self.groups.push_back(std::move(self.open));
    self.open.clear();
}
void wait_copies(unsigned pending) {
    auto &groups = block.fibers[block.current].groups;
    while (groups.size() > pending) {
        for (const Copy &c : groups.front()) memcpy(c.to, c.from, c.bytes);
        groups.erase(groups.begin());
    }
}

// Lets the threads of a warp go on whose barrier is complete: all lanes of its mask wait there or have exited.
static bool release_warp(unsigned begin, unsigned end) {
    bool released = false, alike = true;
    for (unsigned i = begin; i < end && alike; i++) alike = block.fibers[i].wait == Wait::warp && block.fibers[i].mask == block.fibers[begin].mask;
    if (alike) {                  // mostly all of them wait at the same
        for (unsigned i = begin; i < end; i++) block.fibers[i].wait = Wait::no;
        return true;
    }
    for (unsigned i = begin; i < end; i++) {
        if (block.fibers[i].wait != Wait::warp) continue;
        const uint32_t mask = block.fibers[i].mask;
        bool complete = true;
        for (unsigned j = begin; j < end && complete; j++) {
            const Fiber &f = block.fibers[j];
            if (mask >> (j - begin) & 1) complete = f.wait == Wait::finished || (f.wait == Wait::warp && f.mask == mask);
        }
        if (!complete) continue;
        for (unsigned j = begin; j < end; j++)
            if (block.fibers[j].wait == Wait::warp && block.fibers[j].mask == mask) block.fibers[j].wait = Wait::no;
        released = true;
    }
    return released;
}

// Runs the fibers of warp [begin, end) until all wait for the block or have finished; false when some wait in vain.
static void run_warp(unsigned begin, unsigned end) {
    do {
        unsigned start = 0, step = 1;
        const unsigned n = end - begin;
        if (order == 1) start = n - 1, step = n - 1;               // backwards
        if (order > 1) {
            random_state = random_state * 6364136223846793005u + 1442695040888963407u;
            start = (unsigned)(random_state >> 33) % n;
            step = n == 32 ? ((unsigned)(random_state >> 40) | 1) % 32 : 1;
        }
        for (unsigned k = 0, i = start; k < n; k++, i = (i + step) % n) {
            Fiber &f = block.fibers[begin + i];
            if (f.wait != Wait::no) continue;
            block.current = begin + i;
            place.thread = f.index;
            to_fiber(f);
        }
    } while (release_warp(begin, end));
}

// Runs the fibers of one block to their end; false when all that are left wait in vain.
static bool run_block() {
    const unsigned warps = (block.n + 31) / 32;
    for (;;) {
        const unsigned first = order > 1 ? (unsigned)(random_state >> 33) % warps : 0;
        for (unsigned w = 0; w < warps; w++) {
            const unsigned at = order == 1 ? warps - 1 - w : (first + w) % warps;
            run_warp(32 * at, std::min(32 * at + 32, block.n));
        }
        unsigned waiting = 0, finished = 0;
        for (unsigned i = 0; i < block.n; i++) {
            waiting += block.fibers[i].wait == Wait::block;
            finished += block.fibers[i].wait == Wait::finished;
        }
        if (finished == block.n) return true;
        if (waiting + finished < block.n) return false;            // a warp's barrier that some of its lanes never reach
        for (unsigned i = 0; i < block.n; i++)
            if (block.fibers[i].wait == Wait::block) block.fibers[i].wait = Wait::no;
    }
}

// A number without a common factor with n, drawn anew: steps of it visit all of n.
static uint64_t stride_through(uint64_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    uint64_t step = (random_state >> 33) % n;
    while (std::gcd(step, n) != 1) step++;
    return step;
}

cudaError_t launch(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()> &thread) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const unsigned n = size.x * size.y * size.z;
    if (!n || n > kMaxThreads || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || shared_bytes > kMaxShared)
        return cudaErrorInvalidConfiguration;
    launches++;
    if (block.fibers.size() < n) block.fibers.resize(n);
    block.n = n;
    block.thread = &thread;
    place.block_size = size;
    place.grid_size = grid;
    // Of exactly this size, so that a sanitizer sees the first byte past it.
    void *shared = nullptr;
    if (shared_bytes && posix_memalign(&shared, 128, shared_bytes)) return cudaErrorInvalidConfiguration;
    block.shared = (char *)shared;
    cudaError_t error = cudaSuccess;
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z, step = order > 1 ? stride_through(blocks) : 1;
    uint64_t at = order > 1 ? (random_state >> 20) % blocks : 0;
    for (uint64_t k = 0; k < blocks && !error; k++, at = (at + step) % blocks) {
        const uint64_t b = order == 1 ? blocks - 1 - at : at;
        place.block = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
        if (shared) memset(shared, 0xff, shared_bytes);
        for (unsigned i = 0; i < n; i++) {
            make_ready(block.fibers[i]);
            block.fibers[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        }
        if (!run_block()) error = cudaErrorLaunchTimeout;
    }
    free(shared);
    return error;
}

}  // namespace simt

// In which order blocks, and between barriers the warps and the threads of a warp, take their turns: 0 ascending, 1 descending,
// any other number: shuffled anew each time from that seed.
extern "C" __attribute__((visibility("default"))) void kv_simt_order(uint32_t order) {
    simt::order = order;
    simt::random_state = order;
}

// Kernels launched in this process.
extern "C" __attribute__((visibility("default"))) uint64_t kv_simt_launches() { return simt::launches; }

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchTimeout: return "the threads of a block wait for each other for ever";
    default: return "invalid argument";
    }
}
