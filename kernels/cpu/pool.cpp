// pool.cpp - threads that spin briefly, then sleep, so that decoding survives a busy neighbour.
#include "pool.h"

#include <csignal>
#include <ctime>
#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace kv {

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

static int usable_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}

FlushDenormals::FlushDenormals() {
#if defined(__x86_64__) || defined(_M_X64)
    saved = _mm_getcsr();
    _mm_setcsr((unsigned)saved | 0x8040);
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("msr fpcr, %0" ::"r"(saved | (1ull << 24)));
#else
    saved = 0;
#endif
}

FlushDenormals::~FlushDenormals() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_setcsr((unsigned)saved);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(saved));
#endif
}

Gate::~Gate() {
    pthread_cond_destroy(&changed);
    pthread_mutex_destroy(&mutex);
}

void Gate::wait_while(uint32_t old, int64_t spin_ns) {
    if (value.load(std::memory_order_acquire) != old) return;
    if (spin_ns > 0) {
        int64_t end = now_ns() + spin_ns;
        do {
            for (int i = 0; i < 32; i++) {
                relax();
                if (value.load(std::memory_order_acquire) != old) return;
            }
        } while (now_ns() < end);
    }
    pthread_mutex_lock(&mutex);
    sleepers.fetch_add(1);                    // sequentially consistent, as in advance(): one of the two sees the other
    while (value.load() == old) pthread_cond_wait(&changed, &mutex);
    sleepers.fetch_sub(1);
    pthread_mutex_unlock(&mutex);
}

void Gate::advance() {
    value.fetch_add(1);
    if (sleepers.load() == 0) return;
    pthread_mutex_lock(&mutex);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

Pool::Pool(int n) : threads(n), owner(getpid()) {
    // Spinning only helps while every thread has a core of its own.
    bool room = n <= usable_cores();
    barrier_spin_ns = room ? 40000 : 0;
    start_spin_ns = room ? 400000 : 0;
}

struct Seat { Pool *pool; int thread; };

static void *work(void *p) {
    Seat seat = *(Seat *)p;
    delete (Seat *)p;
    Pool &pool = *seat.pool;
    for (uint32_t round = 0;; round++) {
        pool.start_gate.wait_while(round, round ? pool.start_spin_ns : 0);
        if (pool.stopping) return nullptr;
        pool.body(pool.arg, seat.thread);
        pool.barrier(pool.clean);
    }
}

bool Pool::start() {
    sigset_t all, before;
    sigfillset(&all);
    if (pthread_sigmask(SIG_SETMASK, &all, &before) != 0) return false;   // signals belong to the program's own threads
    bool good = true;
    for (int i = 1; i < threads && good; i++) {
        Seat *seat = new Seat{this, i};
        pthread_t id;
        good = pthread_create(&id, nullptr, work, seat) == 0;
        if (good) workers.push_back(id);
        else delete seat;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return good;
}

Pool::~Pool() {
    if (forked()) return;
    stopping = true;
    start_gate.advance();
    for (pthread_t id : workers) pthread_join(id, nullptr);
}

bool Pool::forked() const { return getpid() != owner; }

void Pool::run(Body b, void *a) {
    body = b;
    arg = a;
    if (threads > 1) start_gate.advance();
    b(a, 0);
    barrier(clean);
}

void Pool::barrier(uint32_t phase, Last last, void *a) {
    uint32_t round = barrier_gate.value.load(std::memory_order_relaxed);
    if (threads > 1 && arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < threads) {
        barrier_gate.wait_while(round, barrier_spin_ns);
        return;
    }
    for (; clean != phase; clean++) counter[clean % RING].next.store(0, std::memory_order_relaxed);
    if (last) last(a);
    arrived.store(0, std::memory_order_relaxed);
    if (threads > 1) barrier_gate.advance();
}

void Worker::barrier() { pool->barrier(phase); }

bool Worker::take(int64_t total, int64_t grain, int64_t &begin, int64_t &end) {
    if (phase - pool->clean >= Pool::RING) barrier();   // every thread comes here at the same phase
    if (grain < 1) grain = 1;
    std::atomic<int64_t> &next = pool->counter[phase % Pool::RING].next;
    if (pool->threads == 1) {
        begin = next.load(std::memory_order_relaxed);
        next.store(begin + grain, std::memory_order_relaxed);
    } else {
        begin = next.fetch_add(grain, std::memory_order_relaxed);
    }
    end = begin + grain < total ? begin + grain : total;
    return begin < total;
}

}  // namespace kv

// ---- memory bandwidth ----

namespace {

struct Read {
    const char *data;
    int64_t bytes;
    int threads;
    std::atomic<uint64_t> sum{0};
};

void read_part(void *arg, int thread) {
    Read &r = *(Read *)arg;
    int64_t lines = r.bytes / 64, begin = lines * thread / r.threads, end = lines * (thread + 1) / r.threads;
    const uint64_t *p = (const uint64_t *)(r.data + begin * 64);
    uint64_t s[8] = {};
    for (int64_t i = begin; i < end; i++, p += 8) {
        __builtin_prefetch((const char *)p + 4096, 0, 2);
        for (int j = 0; j < 8; j++) s[j] += p[j];
    }
    r.sum += s[0] ^ s[1] ^ s[2] ^ s[3] ^ s[4] ^ s[5] ^ s[6] ^ s[7];
}

}  // namespace

extern "C" __attribute__((visibility("default")))
double kv_cpu_read_bandwidth(const void *data, int64_t bytes, int32_t threads, int32_t repeat) {
    if (!data || bytes < 64 || threads < 1 || threads > 1024) return 0;
    kv::Pool pool(threads);
    if (!pool.start()) return 0;
    double best = 0;
    for (int i = 0; i < repeat; i++) {
        Read read{(const char *)data, bytes, threads};
        int64_t start = kv::now_ns();
        pool.run(read_part, &read);
        double rate = (double)(bytes / 64 * 64) / ((double)(kv::now_ns() - start) * 1e-9);
        if (rate > best) best = rate;
    }
    return best;
}
