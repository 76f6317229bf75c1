// pages.h - finding a sequence's pages by position.
#pragma once
#include "../page.h"

namespace KV_NS {

// Index of the last page whose base is at most pos, -1 when there is none. Looks from the newest page back.
static inline int last_page(const kv_table &table, int pos) {
    int i = table.n_pages - 1;
    while (i >= 0 && table.base[i] > pos) i--;
    return i;
}

// Index of the first page that holds a slot at or after pos; n_pages when there is none.
static inline int first_page(const kv_table &table, int pos) {
    int low = 0, high = table.n_pages;
    while (low < high) {
        int middle = (low + high) / 2;
        if (table.base[middle] + KV_PAGE <= pos) low = middle + 1;
        else high = middle;
    }
    return low;
}

// K of KV head h in page number `page`; V is v_offset further on.
static inline char *k_of(const kv_cache &cache, int page, int h, int head_dim) {
    return (char *)cache.base + page * cache.page_stride + h * kv_head_bytes(cache.k_dtype, head_dim, 0);
}
static inline char *v_of(const kv_cache &cache, int page, int h, int head_dim) {
    return (char *)cache.base + page * cache.page_stride + cache.v_offset + h * kv_head_bytes(cache.v_dtype, head_dim, 1);
}

static inline bool has_side(const kv_cache &cache) { return cache.k_dtype == KV_Q4 || cache.v_dtype == KV_Q4; }

// The parts of KV head h in a sequence's side memory; those of a format that is not KV_Q4 are null.
struct Side {
    uint16_t *k_open = nullptr, *k_sinks = nullptr, *v_open = nullptr, *v_sinks = nullptr;
    float *qsq = nullptr;
};
static inline Side side_of(const kv_cache &cache, const kv_table &table, int h, int kv_heads, int head_dim) {
    Side side;
    char *k = (char *)cache.side + table.side * cache.side_stride, *v = k + kv_side_v(cache.k_dtype, kv_heads, head_dim);
    if (cache.k_dtype == KV_Q4) {
        side.k_open = (uint16_t *)(k + kv_side_open(h, head_dim));
        side.k_sinks = (uint16_t *)(k + kv_side_sinks(h, kv_heads, head_dim));
        side.qsq = (float *)(k + kv_side_qsq(h, kv_heads, head_dim));
    }
    if (cache.v_dtype == KV_Q4) {
        side.v_open = (uint16_t *)(v + kv_side_open(h, head_dim));
        side.v_sinks = (uint16_t *)(v + kv_side_sinks(h, kv_heads, head_dim));
    }
    return side;
}

}  // namespace KV_NS
