// attend_finish.cuh - what follows a tile's weighted sums: parts are put down, the block that is the last to do so adds them up in
// their order, and rows are divided by the sum of their weights, turned back where V is rotated, and given out.
#pragma once
#include "attend.cuh"
#include "rotate.cuh"

namespace kv {

constexpr int kListedPages = 256, kWeighedParts = KV_PAGE / 2;

// A block's tile of queries, in shared memory: total[queries][dim], top and length (of the softmax) [queries], work[tile][KV_PAGE].
struct TileSums {
    int begin, first, queries, kv_head;          // query i is of row begin + (first + i) / group, head (first + i) % group of the KV head's
    float *total, *top, *length, *work;

    __device__ __forceinline__ int64_t slot(const kv_op_attend &op, const Tiles &tiles, int row0, const PartResults &results, int n) const {
        return results.slot(begin + (first + n) / tiles.group - row0, op.heads, kv_head * tiles.group + (first + n) % tiles.group, 0);
    }
};

// Sums of all parts of the tile's queries to total, top and length. Each sum is taken part after part, so that it does not depend
// on which parts other rows of the tile see.
static __device__ __forceinline__ void combine_parts(const kv_op_attend &op, const kv_table &table, const Seen &seen, const Tiles &tiles, int row0,
                                                     const PartResults &in, const TileSums &tile) {
    __shared__ int list[kListedPages], listed;   // pages that begin a part
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = op.head_dim, quads = d / 4;
    auto slot_of = [&](int n) { return tile.slot(op, tiles, row0, in, n); };
    for (int n = warp; n < tile.queries; n += kAttendThreads / 32) {
        const float2 *ml = in.ml + slot_of(n);
        float most = kLowest;
        for (int i = seen.first + lane; i < seen.last; i += 32)
            if (seen.begins(table, i) && ml[i].y != 0) most = fmaxf(most, ml[i].x);
        most = warp_max(most);
        if (lane == 0) tile.top[n] = most, tile.length[n] = 0;
    }
    for (int i = threadIdx.x; i < tile.queries * d; i += kAttendThreads) tile.total[i] = 0;
    float *const weight = tile.work, *const mass = weight + tile.queries * kWeighedParts;
    for (int page = seen.first; page < seen.last; page += kListedPages) {
        __syncthreads();
        if (warp == 0) {
            int n = 0;
            for (int i = page + lane; i - lane < seen.last && i - lane < page + kListedPages; i += 32) {
                const bool begins = i < seen.last && seen.begins(table, i);
                const uint32_t votes = __ballot_sync(kAllLanes, begins);
                if (begins) list[n + __popc(votes & ((1u << lane) - 1))] = i;
                n += __popc(votes);
            }
            if (lane == 0) listed = n;
        }
        __syncthreads();
        for (int from = 0; from < listed; from += kWeighedParts) {
            const int parts = listed - from < kWeighedParts ? listed - from : kWeighedParts;
            for (int i = threadIdx.x; i < tile.queries * kWeighedParts; i += kAttendThreads) {
                const int n = i / kWeighedParts, part = i % kWeighedParts;
                if (part >= parts) continue;
                const float2 ml = in.ml[slot_of(n) + list[from + part]];
                weight[i] = ml.y == 0 ? -1.f : expf(ml.x - tile.top[n]);       // below 0: the row sees nothing of the part
                mass[i] = ml.y;
            }
            __syncthreads();
            if ((int)threadIdx.x < tile.queries) {
                const float *w = weight + threadIdx.x * kWeighedParts, *m = mass + threadIdx.x * kWeighedParts;
                float length = tile.length[threadIdx.x];
                for (int part = 0; part < parts; part++) length = w[part] < 0 ? length : fmaf(m[part], w[part], length);
                tile.length[threadIdx.x] = length;
            }
            for (int i = threadIdx.x; i < tile.queries * quads; i += kAttendThreads) {
                const int n = i / quads, quad = i % quads;
                const float *o = in.o + slot_of(n) * d + 4 * quad, *w = weight + n * kWeighedParts;
                float4 sum = *(float4 *)(tile.total + n * d + 4 * quad);
#pragma unroll 8
                for (int part = 0; part < parts; part++) {
                    const float4 x = *(const float4 *)(o + (int64_t)list[from + part] * d);
                    const float by = w[part];
                    sum.x = by < 0 ? sum.x : fmaf(x.x, by, sum.x);
                    sum.y = by < 0 ? sum.y : fmaf(x.y, by, sum.y);
                    sum.z = by < 0 ? sum.z : fmaf(x.z, by, sum.z);
                    sum.w = by < 0 ? sum.w : fmaf(x.w, by, sum.w);
                }
                *(float4 *)(tile.total + n * d + 4 * quad) = sum;
            }
            __syncthreads();
        }
    }
    __syncthreads();
}

// Puts down the sums of the part that begins at page `page`.
static __device__ __forceinline__ void store_part(const kv_op_attend &op, const Tiles &tiles, int row0, const PartResults &out, const TileSums &tile, int page) {
    const int lane = threadIdx.x % 32, d = op.head_dim;
    for (int n = threadIdx.x / 32; n < tile.queries; n += kAttendThreads / 32) {
        const int64_t slot = tile.slot(op, tiles, row0, out, n) + page;
        for (int c = lane; c < d; c += 32) out.o[slot * d + c] = tile.total[n * d + c];
        if (lane == 0) out.ml[slot] = make_float2(tile.top[n], tile.length[n]);
    }
    __syncthreads();
}

// Gives out the tile's rows, of which total, top and length are final.
static __device__ __forceinline__ void store_rows(const kv_op_attend &op, const Tiles &tiles, const TileSums &tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = op.head_dim;
    for (int n = warp; n < tile.queries; n += kAttendThreads / 32) {
        const int row = tile.begin + (tile.first + n) / tiles.group, head = tile.kv_head * tiles.group + (tile.first + n) % tiles.group;
        float length = tile.length[n], by = 1;
        if (op.sinks) {
            const float top = fmaxf(tile.top[n], op.sinks[head]);
            by = length == 0 ? 0.f : expf(tile.top[n] - top);
            length = fmaf(length, by, expf(op.sinks[head] - top));
        }
        float *y = tile.total + n * d;
        for (int c = lane; c < d; c += 32) y[c] = length == 0 ? 0.f : y[c] * by / length;
        if (is_quantized(op.cache.v_dtype)) rotate(y, d, lane);
        for (int c = lane; c < d; c += 32) op.out[((int64_t)row * op.heads + head) * d + c] = y[c];
    }
}

// All that a block does for its tile, of rows [begin, end): sum(page, stop) sums pages to total, top and length, by all threads. Where
// it is in the table is kept in shared memory, because registers are dear while pages are summed.
template <class Sum>
static __device__ __forceinline__ void attend_parts(const kv_op_attend &op, const kv_state *state, const Tiles &tiles, int row0, const PartResults &out,
                                                    const kv_table &table, int end, const TileSums &tile, Sum sum) {
    __shared__ Seen seen;
    __shared__ int part, page, stop;
    const int blocks = gridDim.x;
    if (threadIdx.x == 0) {
        seen = seen_by(op, state, table, tile.begin, end);
        // The newest parts are the largest, so they come first.
        const int from = seen.first < seen.last ? part_of(table.base[seen.first]) : 0, mine = blocks - 1 - (int)blockIdx.x;
        part = from + ((mine - from) % blocks + blocks) % blocks;
    }
    for (;;) {
        if (threadIdx.x == 0) {
            page = seen.first;
            stop = seen.last;
            if (tiles.parts > 1) {                // holes in the table can give a block several parts, or none
                const int to = seen.first < seen.last ? part_of(table.base[seen.last - 1]) : -1;
                while (part <= to && !seen.pages_of(table, part, page, stop)) part += blocks;
                if (part > to) page = -1;
                part += blocks;
            }
        }
        __syncthreads();
        if (page < 0) break;
        sum(page, stop);
        if (tiles.parts == 1) break;
        store_part(op, tiles, row0, out, tile, page);
    }
    if (tiles.parts > 1) {
        if (!last_to_arrive(out.arrived + (int64_t)blockIdx.z * op.kv_heads + tile.kv_head, blocks)) return;
        combine_parts(op, table, seen, tiles, row0, out, tile);
    }
    store_rows(op, tiles, tile);
}

}  // namespace kv
