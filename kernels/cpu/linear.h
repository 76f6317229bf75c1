// linear.h - what the files of the linear op share, in namespace KV_NS.
#pragma once
#include "kernels.h"
#include "weight.h"

namespace KV_NS {

static inline int64_t blocks_of(const kv_weight &w) { return (w.n + KV_LANES - 1) / KV_LANES; }
static inline int64_t align64(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }
// Into the second-level cache: the first level has too few requests in flight to keep memory busy. A macro, since gcc
// drops calls of a function that does nothing but prefetch.
#define KV_PREFETCH(p) __builtin_prefetch((p), 0, 2)

// Calls body(part, begin, end) for ranges of at most `grain` of [0, count(part)) of every part, a thread's own part first:
// each thread reads one stretch of memory, and who is done helps the others.
template <class Count, class Body> static void split_parts(kv::Worker &worker, int64_t parts, int64_t grain, Count count, Body body) {
    const uint32_t phase = worker.phase;         // one shared counter a part
    const int64_t own = worker.thread * parts / worker.threads;
    for (int64_t p = 0; p < parts; p++) {
        const int64_t part = (own + p) % parts;
        worker.phase = phase + (uint32_t)part;
        for (int64_t begin, end; worker.take(count(part), grain, begin, end);) body(part, begin, end);
    }
    worker.phase = phase + (uint32_t)parts;
}

// Stores y[rows][stride], the plain products of `rows` activation rows from `row` on with `blocks` weight blocks from
// `block` on, as kv_op_linear says.
void linear_finish(const kv_op_linear &, int64_t row, int64_t rows, int64_t block, int64_t blocks, const float *y, int64_t stride);

// Decode: float32 activations times weights that are widened in registers, one pass over the weights.
void linear_decode(const kv_op_linear &, int rows, kv::Worker &);
int64_t linear_decode_scratch(const kv_op_linear &, int threads);
// Prefill: weights widened into panels of 32 rows, each used for all activations; in float32 (vector) or bfloat16 (tiles).
void linear_vector(const kv_op_linear &, int rows, kv::Worker &);
int64_t linear_vector_scratch(const kv_op_linear &, int max_rows, int threads);
#if defined(__AMX_TILE__)
// act: null, or what follows, is done at once and makes the only output; for products that linear_act takes.
void linear_tiles(const kv_op_linear &, const kv_op_act *act, int rows, kv::Worker &);
int64_t linear_tiles_scratch(const kv_op_linear &, int max_rows, int threads);
#endif

}  // namespace KV_NS
