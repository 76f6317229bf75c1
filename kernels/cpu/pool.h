// pool.h - the threads of one kv_cpu and what they share.
#pragma once
#include <pthread.h>
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "ops.h"

namespace kv {

// A word that threads wait on: they spin for a while, then sleep.
struct Gate {
    alignas(64) std::atomic<uint32_t> value{0};
    std::atomic<int> sleepers{0};
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

    ~Gate();
    void wait_while(uint32_t old, int64_t spin_ns);
    void advance();
};

// Threads that run one function together, with barriers and shared range counters.
struct Pool {
    using Body = void (*)(void *arg, int thread);
    using Last = void (*)(void *arg);
    static constexpr uint32_t RING = 64;      // splits that may lie between two barriers
    struct alignas(64) Counter { std::atomic<int64_t> next{0}; };

    const int threads;
    Counter counter[RING];
    alignas(64) std::atomic<int> arrived{0};
    Gate barrier_gate, start_gate;
    uint32_t clean = 0;                       // counters from this phase on are zero; written only inside a barrier
    int64_t barrier_spin_ns, start_spin_ns;
    pid_t owner;
    bool stopping = false;
    Body body = nullptr;
    void *arg = nullptr;
    std::vector<pthread_t> workers;

    explicit Pool(int threads);
    ~Pool();
    bool start();                             // false when the system refuses a thread
    void run(Body body, void *arg);           // body(arg, 0..threads-1), thread 0 being the caller; waits for all
    // Waits for all threads; the last one to arrive calls last(arg) while the others wait.
    void barrier(uint32_t phase, Last last = nullptr, void *arg = nullptr);
    bool forked() const;                      // this is a child process, where the workers do not exist
};

int64_t now_ns();

// Flush-to-zero and denormals-are-zero for the scope, the caller's floating-point mode after it.
class FlushDenormals {
    uint64_t saved;
public:
    FlushDenormals();
    ~FlushDenormals();
};

const Ops *ops_of(int32_t isa);               // null when this build lacks it or this machine does not grant it

}  // namespace kv
