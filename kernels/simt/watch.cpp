// watch.cpp - see watch.h.
#include "watch.h"
#include "ptx.h"
#include "ptx_launch.h"
#ifdef PTX_COUNT
#include "count.h"
#else
#define count_access(...) (void)0
#define count_block() (void)0
#endif
#include <cstdarg>
#include <cstdio>
#include <unordered_map>
#include <unordered_set>

namespace ptx {

// By which thread of which block, and how many barriers it had passed. The epochs of all blocks of a process are drawn from one counter,
// so that no two blocks share one.
struct Access {
    uint32_t epoch = 0;           // of the block's barriers; 0: there was no access
    uint32_t block = 0, warp_epoch = 0;
    uint16_t thread = 0;
    bool atomic = false;
};
// Of a piece of memory: the last write, the last read, the one before by another thread of that one's warp, the last by another warp.
struct Watched {
    Access write, read, neighbour, stranger;
    uint32_t flying = 0;          // copies that are under way to here
};
// A word of global memory. What is smaller is watched by its bytes too, in entries of their own.
struct Word { Watched watched; bool by_bytes = false; };

// What an atomic hands on: all that `block` did before `epoch`, and what `thread` did in it.
struct Handed { uint32_t block, epoch; uint16_t thread; };
// Got from an atomic of `thread`; once fenced, in force for it and, when the barrier that ends `since` is behind them, for all of the block.
struct Got { Handed handed; uint32_t since; uint16_t thread; bool fenced; };

struct Copy { uint32_t to; uint64_t from; uint32_t bytes; };
struct Thread {
    uint32_t epoch, warp_epoch;
    uint32_t fenced;              // the epoch of its last fence
    bool waits, wrote;            // has come to griddepcontrol.wait; wrote to global memory before
    std::vector<uint64_t> early;  // words that it read before
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

static std::vector<Thread> threads;
static std::vector<Watched> shared_watch;
static std::vector<bool> belongs;                // to a variable, by byte of shared memory
static std::unordered_map<uint64_t, Word> words;
static std::unordered_map<uint64_t, Watched> small;
static std::unordered_map<uint64_t, std::vector<Handed>> hands;
static std::vector<Got> got;
static std::unordered_set<uint64_t> written_before, written_now;        // words, by kernels of this step
static uint32_t first_epoch = 1, last_epoch = 1, block_number = 0;
static char message[512];
static bool failed;

// Nobody goes on after a failure: without one of them the others might go on for ever.
static uint16_t me() {
    if (failed) simt::leave();
    const auto &p = simt::place;
    return (uint16_t)(p.thread.x + p.block_size.x * (p.thread.y + p.block_size.y * p.thread.z));
}

void stop_thread(const char *format, ...) {
    if (!failed) {                // the first is told
        const auto &b = simt::place.block;
        const int n = snprintf(message, sizeof message, "block (%u, %u, %u), thread %u: ", b.x, b.y, b.z, me());
        va_list args;
        va_start(args, format);
        vsnprintf(message + n, sizeof message - (size_t)n, format, args);
        va_end(args);
    }
    failed = true;
    simt::leave();
}
const char *what_failed() { return failed ? message : nullptr; }

void begin_launch(const std::vector<Range> &variables, uint64_t dynamic_from) {
    if (failed) shared_watch.clear();            // copies that were under way
    failed = false;
    block_number = 0;
    written_before.merge(written_now);
    words.clear();
    small.clear();
    hands.clear();
    shared_watch.resize(shared_bytes);
    belongs.assign(shared_bytes, false);
    for (const Range &v : variables) std::fill_n(belongs.begin() + (ptrdiff_t)v.at, v.bytes, true);
    std::fill(belongs.begin() + (ptrdiff_t)dynamic_from, belongs.end(), true);
}
void begin_thread() {
    if (failed) simt::leave();
    const auto &p = simt::place;
    const uint32_t number = p.block.x + p.grid_size.x * (p.block.y + p.grid_size.y * p.block.z) + 1;
    if (number == block_number) return;
    block_number = number;
    count_block();
    first_epoch = ++last_epoch;
    got.clear();
    threads.resize(p.block_size.x * p.block_size.y * p.block_size.z);
    for (Thread &thread : threads) thread = {first_epoch, 0, 0, false, false, {}, {}, {}};
}
void end_thread() {
    const Thread &self = threads[me()];
    const bool none = std::all_of(self.groups.begin(), self.groups.end(), [](const auto &group) { return group.empty(); });
    if (!none || !self.open.empty()) stop_thread("ends while copies are under way");
}

void after_block_barrier() { last_epoch = std::max(last_epoch, ++threads[me()].epoch); }
void after_warp_barrier() { threads[me()].warp_epoch++; }
void let_the_next_begin() {}
void wait_for_the_kernel_before() {
    Thread &self = threads[me()];
    for (const uint64_t at : self.early)
        if (written_before.count(at)) stop_thread("read global memory at %llx, which a kernel before writes, before it waited for that one", (unsigned long long)at);
    if (self.wrote) stop_thread("wrote to global memory before it waited for the kernel before");
    self.waits = true;
}
void begin_step() {
    written_before.clear();
    written_now.clear();
}

// ---- order ----

// Whether what was done `then` is done, and can be seen, for what is done `now`.
static bool ordered(const Access &then, const Access &now) {
    if (!then.epoch || (then.atomic && now.atomic)) return true;
    if (then.block == now.block) {
        if (then.thread == now.thread || then.epoch != now.epoch) return true;
        return then.thread / 32 == now.thread / 32 && then.warp_epoch != now.warp_epoch;
    }
    for (const Got &g : got) {
        const Handed &h = g.handed;
        if (h.block == then.block && (then.epoch < h.epoch || (then.thread == h.thread && then.epoch == h.epoch)) && g.fenced &&
            (g.thread == now.thread || now.epoch > g.since))
            return true;
    }
    return false;
}
static void check(const Access &then, const Access &now, const char *does, const char *memory, uint64_t at) {
    if (!ordered(then, now))
        stop_thread("%s %s memory at %llx, where block %u, thread %u was, with nothing between that puts the two in order", does, memory, (unsigned long long)at,
                    then.block - 1, then.thread);
}
static Access here(bool atomic) {
    const uint16_t thread = me();
    return {threads[thread].epoch, block_number, threads[thread].warp_epoch, thread, atomic};
}
static void note_read(Watched &w, const Access &now, const char *memory, uint64_t at) {
    check(w.write, now, "reads", memory, at);
    if (w.read.epoch && w.read.thread != now.thread) (w.read.block == now.block && w.read.thread / 32 == now.thread / 32 ? w.neighbour : w.stranger) = w.read;
    w.read = now;
}
// same: what is written is there already, so that no order of several writes shows.
static void note_write(Watched &w, const Access &now, bool same, const char *memory, uint64_t at) {
    for (const Access *then : {&w.read, &w.neighbour, &w.stranger}) check(*then, now, "writes", memory, at);
    if (!same) check(w.write, now, "writes", memory, at);
    w.write = now;
}

// ---- shared memory, byte by byte ----

template <class F> static void each_shared(uint32_t at, uint32_t bytes, F touch) {
    if (at + (uint64_t)bytes > shared_bytes) stop_thread("touches shared memory at %u, behind its end at %llu", at, (unsigned long long)shared_bytes);
    for (uint32_t i = at; i < at + bytes; i++) {
        if (!belongs[i]) stop_thread("touches shared memory at %u, where no variable is", i);
        if (shared_watch[i].flying) stop_thread("touches shared memory at %u, to which a copy is under way", i);
        if (shared_watch[i].write.epoch < first_epoch) shared_watch[i] = {};       // of another block
        touch(shared_watch[i], i);
    }
}
static void written(const Watched &w, uint32_t i) {
    if (!w.write.epoch) stop_thread("reads shared memory at %u, which this block has not written", i);
}
void read_shared(uint32_t at, uint32_t bytes) {
    const Access now = here(false);
    count_access(true, now.thread, at, bytes);
    each_shared(at, bytes, [&](Watched &w, uint32_t i) { written(w, i), note_read(w, now, "shared", i); });
}
// value: what is written, nullptr where that is not known.
static void note_shared_write(uint32_t at, uint32_t bytes, const void *value) {
    const Access now = here(false);
    const bool same = value && at + (uint64_t)bytes <= shared_bytes && !memcmp(value, shared_memory + at, bytes);
    each_shared(at, bytes, [&](Watched &w, uint32_t i) { note_write(w, now, same, "shared", i); });
}
void write_shared(uint32_t at, uint32_t bytes, const void *value) {
    count_access(true, me(), at, bytes);
    note_shared_write(at, bytes, value);
}
void atomic_shared(uint32_t at, uint32_t bytes) {
    const Access now = here(true);
    count_access(true, now.thread, at, bytes);
    each_shared(at, bytes, [&](Watched &w, uint32_t i) { written(w, i), note_write(w, now, false, "shared", i); });
}

void begin_copy(uint32_t to, uint64_t from, uint32_t bytes) {
    read_global(from, bytes);
    write_shared(to, bytes, nullptr);
    for (uint32_t i = to; i < to + bytes; i++) shared_watch[i].flying++;
    threads[me()].open.push_back({to, from, bytes});
}
void commit_copies() {
    Thread &self = threads[me()];
    self.groups.push_back(std::move(self.open));
    self.open.clear();
}
void wait_copies(unsigned pending) {
    auto &groups = threads[me()].groups;
    for (; groups.size() > pending; groups.erase(groups.begin()))
        for (const Copy &c : groups.front()) {
            for (uint32_t i = c.to; i < c.to + c.bytes; i++) shared_watch[i].flying--;
            note_shared_write(c.to, c.bytes, nullptr);         // it counts as done now, too: others see it behind a barrier that follows
            memcpy(shared_memory + c.to, (const char *)c.from, c.bytes);
        }
}

// ---- global memory, by words ----

template <class F> static void each_global(uint64_t at, uint32_t bytes, F touch) {
    count_access(false, me(), at, bytes);
    if (at < 4096) stop_thread("touches global memory at %llx", (unsigned long long)at);
    if (bytes % 4 == 0) {
        for (uint64_t i = at; i < at + bytes; i += 4) {
            Word &word = words[i];
            touch(word.watched, i);
            for (uint64_t byte = i; word.by_bytes && byte < i + 4; byte++)
                if (const auto found = small.find(byte); found != small.end()) touch(found->second, byte);
        }
        return;
    }
    Word &word = words[at / 4 * 4];
    word.by_bytes = true;
    Watched whole = word.watched;                // checked against, not noted: other bytes of it may be written at the same time
    touch(whole, at);
    for (uint64_t i = at; i < at + bytes; i++) touch(small[i], i);
}
void read_global(uint64_t at, uint32_t bytes) {
    const Access now = here(false);
    each_global(at, bytes, [&](Watched &w, uint64_t i) { note_read(w, now, "global", i); });
    if (Thread &self = threads[now.thread]; !self.waits)
        for (uint64_t i = at / 4 * 4; i < at + bytes; i += 4) self.early.push_back(i);
}
void write_global(uint64_t at, uint32_t bytes, const void *value) {
    const Access now = here(false);
    const bool same = !memcmp(value, (const void *)at, bytes);
    each_global(at, bytes, [&](Watched &w, uint64_t i) { note_write(w, now, same, "global", i); });
    for (uint64_t i = at / 4 * 4; i < at + bytes; i += 4) written_now.insert(i);
    threads[now.thread].wrote |= !threads[now.thread].waits;
}
void atomic_global(uint64_t at, uint32_t bytes) {
    const uint16_t thread = me();
    Thread &self = threads[thread];
    auto &handed = hands[at];
    for (const Handed &h : handed)
        if (h.block != block_number) got.push_back({h, self.epoch, thread, false});
    const Access now = here(true);
    each_global(at, bytes, [&](Watched &w, uint64_t i) {
        // The word itself is in order with other atomics, and with what came before those.
        for (const Access *then : {&w.write, &w.read})
            if (then->block == now.block) check(*then, now, "changes", "global", i);
        w.write = now;
    });
    if (self.fenced == self.epoch) handed.push_back({block_number, self.epoch, thread});
}
void fence() {
    const uint16_t thread = me();
    threads[thread].fenced = threads[thread].epoch;
    for (Got &g : got)
        if (g.thread == thread) g.fenced = true;
}
void prefetch(uint64_t) {}

}  // namespace ptx
