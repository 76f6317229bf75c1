// pace.h - one thread or all: beside another busy process every barrier may wait for a thread that the system has put aside,
// and one thread alone is then faster. Decided by measuring, step by step; no result depends on the number of threads.
#pragma once
#include <cstdint>

namespace kv {

class Pace {
    enum Mode { ALL, TRY_ONE, ONE, TRY_ALL };
    static constexpr int TRIAL = 6, STAY = 64;   // steps of a trial, and until the next one
    static constexpr double SLOWED = 1.6;        // times the best pace seen: then one thread is tried
    const void *plan = nullptr;
    Mode mode = ALL;
    int steps = 0;                               // of this mode
    double best = 0, all = 0, one = 0;           // nanoseconds of a step: the best of all threads, recent ones, one thread's

    void enter(Mode next) {
        mode = next;
        steps = 0;
    }

public:
    // Whether the next decode step of this plan is one thread's.
    bool alone(const void *ops) {
        if (ops != plan) *this = Pace(), plan = ops;
        return mode == TRY_ONE || mode == ONE;
    }

    // That step took so long.
    void took(int64_t ns) {
        double &mean = mode == ALL || mode == TRY_ALL ? all : one;
        const bool fresh = steps == 0 && mode != ONE && mode != ALL;
        mean = fresh || mean == 0 ? (double)ns : mean + ((double)ns - mean) / TRIAL;
        steps++;
        switch (mode) {
            case ALL:
                best = best == 0 || ns < best ? (double)ns : best * 1.0005;   // a longer context is slower, too
                if (steps > STAY / 4 && all > SLOWED * best) enter(TRY_ONE);
                break;
            case TRY_ONE:
                if (steps < TRIAL) break;
                if (one >= all) best = all;      // then that is the pace now
                enter(one < all ? ONE : ALL);
                break;
            case ONE:
                if (steps == STAY) enter(TRY_ALL);
                break;
            case TRY_ALL:
                if (steps == TRIAL) enter(all < one ? ALL : ONE);
        }
    }
};

}  // namespace kv
