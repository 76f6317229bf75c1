// table.cpp - the table of one instruction set.
#include "kernels.h"
#if defined(__AMX_TILE__)
#include <immintrin.h>
#endif

namespace KV_NS {

// Runs in every thread before it takes part in a step.
static void thread_start() {
#if defined(__AMX_TILE__)
    // All eight tiles: 16 rows of 64 bytes.
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;
    for (int i = 0; i < 8; i++) {
        config[16 + 2 * i] = 64;
        config[48 + i] = 16;
    }
    asm volatile("" ::"r"(config) : "memory");   // the compiler may not see that the load below reads config
    _tile_loadconfig(config);
#endif
}

extern const kv::Ops ops;
const kv::Ops ops = {embed, norm, linear, act, rope, append, attend, gather, sample, thread_start,
                     linear_scratch, attend_scratch, sample_scratch};

}  // namespace KV_NS
