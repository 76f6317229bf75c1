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

static inline int element_size(int dtype) { return dtype == KV_F32 ? 4 : 2; }

// K of KV head h in page number `page`; V is v_offset further on.
static inline char *k_of(const kv_cache &cache, int page, int h, int head_dim) {
    return (char *)cache.base + page * cache.page_stride + (int64_t)h * KV_PAGE * head_dim * element_size(cache.k_dtype);
}
static inline char *v_of(const kv_cache &cache, int page, int h, int head_dim) {
    return (char *)cache.base + page * cache.page_stride + cache.v_offset +
           (int64_t)h * KV_PAGE * head_dim * element_size(cache.v_dtype);
}

}  // namespace KV_NS
