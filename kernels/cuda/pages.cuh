// pages.cuh - a sequence's pages by position, and the addresses of its heads in them and in its side memory (page.h).
#pragma once
#include "../page.h"
#include "number.cuh"

namespace kv {

// Index of the last page whose base is at most pos, -1 when there is none. Looks from the newest page back.
static __device__ __forceinline__ int last_page(const kv_table &table, int pos) {
    int i = table.n_pages - 1;
    while (i >= 0 && table.base[i] > pos) i--;
    return i;
}

// Index of the first page that holds a slot at or after pos; n_pages when there is none. Pages without holes are found at once.
static __device__ __forceinline__ int first_page(const kv_table &table, int pos) {
    int low = 0, high = table.n_pages;
    if (high > 0) {
        const int guess = (pos - table.base[0]) / KV_PAGE;
        if (guess >= 0 && guess < high && table.base[guess] <= pos && pos < table.base[guess] + KV_PAGE) return guess;
    }
    while (low < high) {
        const int middle = (low + high) / 2;
        if (table.base[middle] + KV_PAGE <= pos) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Slots [low, high) of a page.
struct Slots { int low, high; };

static __device__ __forceinline__ const kv_table &table_of(const kv_state *state, const kv_cache &cache, int seq) {
    return state->table[(int64_t)cache.group * state->n_seqs + seq];
}

// K (V) of KV head h in page number `page`.
static __device__ __forceinline__ char *k_of(const kv_cache &cache, int page, int h, int head_dim) {
    return (char *)cache.base + page * cache.page_stride + h * kv_head_bytes(cache.k_dtype, head_dim, 0);
}
static __device__ __forceinline__ char *v_of(const kv_cache &cache, int page, int h, int head_dim) {
    return (char *)cache.base + page * cache.page_stride + cache.v_offset + h * kv_head_bytes(cache.v_dtype, head_dim, 1);
}

static __host__ __device__ __forceinline__ bool is_quantized(int dtype) { return dtype == KV_Q8 || dtype == KV_Q4; }
static __host__ __device__ __forceinline__ bool has_side(const kv_cache &c) { return c.k_dtype == KV_Q4 || c.v_dtype == KV_Q4; }

// Parts of KV head h in a sequence's side memory; each is there only where its format is KV_Q4.
struct Side {
    char *k, *v;
    int h, kv_heads, head_dim;

    __device__ __forceinline__ Side(const kv_cache &cache, const kv_table &table, int h_, int kv_heads_, int head_dim_)
        : k((char *)cache.side + table.side * cache.side_stride), v(k + kv_side_v(cache.k_dtype, kv_heads_, head_dim_)),
          h(h_), kv_heads(kv_heads_), head_dim(head_dim_) {}
    __device__ __forceinline__ char *k_open() const { return k + kv_side_open(h, head_dim); }
    __device__ __forceinline__ char *v_open() const { return v + kv_side_open(h, head_dim); }
    __device__ __forceinline__ char *k_sinks() const { return k + kv_side_sinks(h, kv_heads, head_dim); }
    __device__ __forceinline__ char *v_sinks() const { return v + kv_side_sinks(h, kv_heads, head_dim); }
    __device__ __forceinline__ float *qsq() const { return (float *)(k + kv_side_qsq(h, kv_heads, head_dim)); }
};

// Asks for `bytes` bytes, by all threads of the block: they come to the L2 cache while other work is done, so that loads into registers
// need not bridge the whole way. The emulator looks whether all of it may be read.
static __device__ __forceinline__ void ask_for(const char *from, int bytes) {
#pragma unroll 1
    for (int at = 128 * threadIdx.x; at < bytes; at += 128 * blockDim.x) {
#ifdef KVRUN_SIMT
        (void)*(volatile const char *)(from + at);
#else
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
#endif
    }
}
// The same of K and V of a head in page i of the table, as rows up to last_pos in the page at `own` read them: under KV_Q4 that one and the
// first slots of all are in the side memory.
static __device__ __forceinline__ void ask_for(const kv_cache &cache, const kv_table &table, int i, int own, int last_pos, const Side &side) {
    const int base = table.base[i], block = KV_LANES * side.head_dim * 2;
#pragma unroll 1
    for (int is_v = 0; is_v < 2; is_v++) {
        const int dtype = is_v ? cache.v_dtype : cache.k_dtype;
        if (dtype == KV_Q4 && base == own) {
            ask_for(is_v ? side.v_open() : side.k_open(), ((last_pos - base) / KV_LANES + 1) * block);
            continue;
        }
        const int page = table.page[i];
        ask_for(is_v ? v_of(cache, page, side.h, side.head_dim) : k_of(cache, page, side.h, side.head_dim), (int)kv_head_bytes(dtype, side.head_dim, is_v));
        if (dtype == KV_Q4 && base == 0) ask_for(is_v ? side.v_sinks() : side.k_sinks(), block);
    }
}

}  // namespace kv
