// table.cpp - the table of one instruction set.
#include "kernels.h"
#include "tile_config.h"

namespace KV_NS {

// Runs in every thread before it takes part in a step.
static void thread_start() {
#if defined(__AMX_TILE__)
    configure_tiles(16, 16, 64);
#endif
}

extern const kv::Ops ops;
const kv::Ops ops = {embed, norm, linear, act, linear_act, rope, append, attend, gather, sample, thread_start,
                     linear_scratch, attend_scratch, sample_scratch};

}  // namespace KV_NS
