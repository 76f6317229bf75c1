// attend.cuh - what the attention kernels share: how rows, pages and parts are cut, and where part results lie.
#pragma once
#include "launch.cuh"
#include "pages.cuh"

namespace kv {

constexpr int kAttendThreads = 128;
constexpr int kPlainTile = 4;                   // queries of a block without matrix instructions
constexpr int kWideTileDim = 128;               // larger heads have tiles of 16 prompt queries: of 32 they need more registers and memory than there are
constexpr float kLowest = -1e30f;               // stands for minus infinity without making NaN of a difference
constexpr int64_t kBatchBytes = 64 << 20;       // part results of the rows that are worked on at a time

// Number of the part that holds a page: 32 parts of one page each, then 32 of two, of four, ... so that long contexts have few.
static __host__ __device__ __forceinline__ int part_of(int base) {
    const int page = base / KV_PAGE;
    int octave = 0;
    while (page >= 32 * ((2 << octave) - 1)) octave++;
    return 32 * octave + ((page - 32 * ((1 << octave) - 1)) >> octave);
}
// The position where a part begins.
static __device__ __forceinline__ int begin_of(int part) {
    const int octave = part / 32;
    return (32 * ((1 << octave) - 1) + (part % 32 << octave)) * KV_PAGE;
}

// How a launch cuts its rows: tiles of queries, each of `tile_rows` rows (or of a piece of one row's group), rows in batches.
struct Tiles {
    int group, tile_rows, pieces;               // pieces: tiles of one row, where a group is larger than a tile
    int tile;                                   // queries of a tile, as the kernel is built for
    int batch_rows, parts;                      // parts: slots for part results of a query, one a page; 1: nothing is cut
};

// Results of parts: o [batch_rows][heads][parts][dim], then (m, l) [batch_rows][heads][parts]. arrived: a counter for each tile.
struct PartResults {
    float *o;
    float2 *ml;
    int parts;
    unsigned *arrived;
    __device__ __forceinline__ int64_t slot(int row, int heads, int head, int part) const { return ((int64_t)row * heads + head) * parts + part; }
};

// The pages that any row of a tile sees: [first, last).
struct Seen {
    int first, last;
    // Whether a part begins at page i.
    __device__ __forceinline__ bool begins(const kv_table &table, int i) const { return i == first || part_of(table.base[i - 1]) != part_of(table.base[i]); }
    // The pages [page, stop) of a part; false where none is seen.
    __device__ __forceinline__ bool pages_of(const kv_table &table, int part, int &page, int &stop) const {
        page = first_page(table, begin_of(part));
        stop = first_page(table, begin_of(part + 1));
        page = page > first ? page : first;
        stop = stop < last ? stop : last;
        return page < stop;
    }
};

// Of rows [begin, end).
static __device__ __forceinline__ Seen seen_by(const kv_op_attend &op, const kv_state *state, const kv_table &table, int begin, int end) {
    const int oldest = op.window ? state->pos[begin] - op.window + 1 : 0;
    return {first_page(table, oldest > 0 ? oldest : 0), last_page(table, state->pos[end - 1]) + 1};
}

// Slots of the page at `base` that a row at pos sees.
static __device__ __forceinline__ Slots slots_of(int base, int pos, int window) {
    const int low = window ? pos - window + 1 - base : 0, high = pos - base + 1;
    return {low > 0 ? low : 0, high < KV_PAGE ? high : KV_PAGE};
}

cudaError_t launch_attend_tiles(const kv_op_attend &, const kv_state *, const Tiles &, int row0, const PartResults &, dim3 grid, cudaStream_t);

}  // namespace kv
