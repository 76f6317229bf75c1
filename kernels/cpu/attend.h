// attend.h - the inner part of attention: a block of queries against the pages of one part of the positions.
#pragma once
#include "kernels.h"
#include "lanes.h"
#include "pages.h"

namespace KV_NS {

static const float LOWEST = -1e30f;        // stands for minus infinity without making NaN of a difference

static inline float first(f32x16 a) {
    float t[16];
    store(t, a);
    return t[0];
}

// Queries of consecutive rows of one sequence that share a KV head: row-major [rows][group].
struct Block {
    int group, rows, head_dim, window;
    float softcap;
    const int32_t *pos;                    // [rows], ascending
    float *q;                              // [queries][head_dim], times scale (over softcap)
    float *s;                              // [TILE][KV_PAGE] scores, then probabilities
    float *o, *m, *l;                      // the part: [queries][head_dim], [queries], [queries]
    float *total, *total_m, *total_l;      // all parts so far

    void start() {
        for (int i = 0; i < rows * group; i++) m[i] = LOWEST, l[i] = 0;
    }
};

static const int TILE = 12;                // most queries of one pass of the inner kernel

static inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
static inline int64_t block_floats(int queries, int head_dim) {
    return 3 * padded((int64_t)queries * head_dim) + TILE * KV_PAGE + 4 * padded(queries);
}
static inline Block block_in(float *at, int queries, int head_dim) {
    Block b{};
    const int64_t matrix = padded((int64_t)queries * head_dim), vector = padded(queries);
    b.q = at, at += matrix;
    b.o = at, at += matrix;
    b.total = at, at += matrix;
    b.s = at, at += TILE * KV_PAGE;
    b.m = at, at += vector;
    b.l = at, at += vector;
    b.total_m = at, at += vector;
    b.total_l = at;
    return b;
}

// Adds pages [page, end) of the table to the block's part. next_k: what will be read after them, or null.
using Pages = void (*)(Block &, const kv_cache &, const kv_table &, int page, int end, int kv_head, const char *next_k);

template <class K, class V>
static void attend_pages(Block &block, const kv_cache &cache, const kv_table &table, int page, int end, int kv_head,
                         const char *next_k);

}  // namespace KV_NS

#include "attend_pages.h"
