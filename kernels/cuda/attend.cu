// attend.cu - attention over cache pages with few query rows: online softmax (Milakov and Gimelshein, 2018) in parts that run
// side by side (Flash-Decoding, Dao et al., 2023), which the last block to end combines in order.
//
// The positions of a sequence are cut into parts by a fixed rule, and a part is reduced page by page, so a row's result
// depends on nothing but its own positions: not on the rows beside it nor on pages that left the window. All query heads of a
// KV head are in one block, so that each cached byte is read once. Prompt rows go the same way with one part for all pages.
#include "attend.cuh"
#include "attend_finish.cuh"
#include "attend_k.cuh"
#include "attend_v.cuh"

namespace kv {

// Shared memory of a block, in floats.
struct Layout {
    int q, factor, mask, score, sum, total, end;
    __host__ __device__ Layout(const kv_op_attend &op, int tile) {
        const int d = op.head_dim, groups = kAttendThreads / (d / 4);
        q = 0;
        factor = q + tile * d;
        mask = factor + (op.cache.k_dtype == KV_Q4 ? tile * d : 0);
        score = mask + (op.cache.k_dtype == KV_Q4 ? (d / 8 + 3) / 4 * 4 : 0);
        sum = score + tile * KV_PAGE;
        total = sum + groups * tile * d;
        end = total + tile * d;
    }
};

// Sums pages [page, stop) for the tile's queries, rows [begin, end), in shared memory laid out as `at` says; keep, constant: [NQ].
template <int NQ>
static __device__ __forceinline__ void sum_pages(const kv_op_attend &op, const kv_state *state, const kv_table &table, const TileSums &tile, int group,
                                                 int end, int page, int stop, float *shared, const Layout &at, float *keep, float *constant) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kAttendThreads / 32, d = op.head_dim;
    const int begin = tile.begin, first = tile.first, queries = tile.queries, kv_head = tile.kv_head;
    float *q = shared + at.q, *factor = shared + at.factor, *score = tile.work, *sums = shared + at.sum, *total = tile.total;
    float *top = tile.top, *length = tile.length;
    uint32_t *mask = (uint32_t *)(shared + at.mask);
    const float scale = op.softcap > 0 ? op.scale / op.softcap : op.scale;
    const int first_pos = state->pos[begin], last_pos = state->pos[end - 1];
    const int own = has_side(op.cache) ? first_pos / KV_PAGE * KV_PAGE : -1;
    const Side side(op.cache, table, kv_head, op.kv_heads, d);
    ask_for(op.cache, table, page, own, last_pos, side);
    __syncthreads();                             // what the last part left has been read
    for (int n = warp; n < NQ; n += warps) {
        const int i = first + (n < queries ? n : 0), row = begin + i / group, head = kv_head * group + i % group;
        const float *from = op.qkv + ((int64_t)row * (op.heads + 2 * op.kv_heads) + head) * d;
        for (int c = lane; c < d; c += 32) q[n * d + c] = from[c] * scale;
        if (op.cache.k_dtype == KV_Q8) rotate(q + n * d, d, lane);
    }
    if (threadIdx.x < NQ) top[threadIdx.x] = kLowest, length[threadIdx.x] = 0, constant[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < NQ * d; i += kAttendThreads) total[i] = 0;
    __syncthreads();

    const int quads = d / 4, groups = kAttendThreads / quads, quad = threadIdx.x % quads, turn = threadIdx.x / quads;
    float sum[NQ][4];
#pragma unroll
    for (int n = 0; n < NQ; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;

    // Adds `sum` of all threads to `total`, through `sums`; rotated: as rotated V.
    auto flush = [&](bool rotated) {
        if (turn < groups)
#pragma unroll
            for (int n = 0; n < NQ; n++) {
                *(float4 *)(sums + (turn * NQ + n) * d + 4 * quad) = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
                sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
            }
        __syncthreads();
        for (int i = threadIdx.x; i < NQ * d; i += kAttendThreads) {
            float s = sums[i];
            for (int g = 1; g < groups; g++) s += sums[g * NQ * d + i];
            if (rotated) sums[i] = s;
            else total[i] += s;
        }
        __syncthreads();
        if (!rotated) return;
        for (int n = warp; n < NQ; n += warps) {
            rotate(sums + n * d, d, lane);
            for (int c = lane; c < d; c += 32) total[n * d + c] += sums[n * d + c];
        }
        __syncthreads();
    };

    for (; page < stop; page++) {
        if (page + 1 < stop) ask_for(op.cache, table, page + 1, own, last_pos, side);
        const int base = table.base[page];
        const char *k = k_of(op.cache, table.page[page], kv_head, d), *v = v_of(op.cache, table.page[page], kv_head, d);
        const Slots all = {slots_of(base, first_pos, op.window).low, slots_of(base, last_pos, op.window).high};
        if (all.low >= all.high) continue;
        if (op.cache.k_dtype == KV_Q4 && base != own) {
            prepare_q4<NQ>(PageK4(k + KV_PAGE * d / 2, d), d, q, factor, mask, constant);
            __syncthreads();
        }
        for (int b = warp; b < KV_PAGE / KV_LANES; b += warps) {
            if (16 * b >= all.high || 16 * b + 16 <= all.low) continue;
            float s[NQ][4];
#pragma unroll
            for (int n = 0; n < NQ; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
            // KV_Q4: the rows' own page and the first positions are exact (see kv_cache).
            const bool coded = op.cache.k_dtype == KV_Q4 && base != own && (base != 0 || b >= KV_SINKS / KV_LANES);
            const char *block = k + (int64_t)b * d * 32;
            int dtype = op.cache.k_dtype;
            if (dtype == KV_Q4 && !coded) {
                dtype = KV_BF16;
                block = base == own ? side.k_open() + (int64_t)b * d * 32 : side.k_sinks();
            }
            switch (dtype) {
            case KV_F32: scores_f32<NQ>(k + (int64_t)b * d * 64, d, q, lane, s); break;
            case KV_F16: scores_half<F16, NQ>(block, d, q, lane, s); break;
            case KV_BF16: scores_half<Bf16, NQ>(block, d, q, lane, s); break;
            case KV_Q8: scores_q8<NQ>(k + b * d * 16, (const uint16_t *)(k + KV_PAGE * d) + b * (d / kv_q8_group(d)) * KV_LANES, d, q, lane, s); break;
            case KV_Q4: scores_q4<NQ>(k + b * d * 8, mask, d, factor, lane, s);
            }
#pragma unroll
            for (int n = 0; n < NQ; n++) {
#pragma unroll
                for (int t = 0; t < 4; t++)
                    for (int with = 4; with < 32; with *= 2) s[n][t] += __shfl_xor_sync(kAllLanes, s[n][t], with);
                if (lane < 4)
#pragma unroll
                    for (int t = 0; t < 4; t++) score[n * KV_PAGE + 16 * b + 4 * lane + t] = coded ? s[n][t] + constant[n] : s[n][t];
            }
        }
        __syncthreads();
        for (int n = warp; n < NQ; n += warps) {
            const int row = begin + (first + (n < queries ? n : 0)) / group;
            const Slots mine = slots_of(base, state->pos[row], op.window);
            float *of = score + n * KV_PAGE, s[KV_PAGE / 32], most = kLowest;
#pragma unroll
            for (int i = 0; i < KV_PAGE / 32; i++) {
                const int t = lane + 32 * i;
                s[i] = kLowest;
                if (t < mine.low || t >= mine.high) continue;
                s[i] = op.softcap > 0 ? op.softcap * tanhf(of[t]) : of[t];
                most = fmaxf(most, s[i]);
            }
            const float before = top[n], now = fmaxf(before, warp_max(most));
            float added = 0;
#pragma unroll
            for (int i = 0; i < KV_PAGE / 32; i++) {
                const int t = lane + 32 * i;
                const float p = t < mine.low || t >= mine.high ? 0.f : expf(s[i] - now);
                of[t] = p;
                added += p;
            }
            added = warp_sum(added);
            __syncwarp();                        // all lanes have read top
            if (lane == 0) {
                keep[n] = length[n] == 0 ? 0.f : expf(before - now);
                length[n] = fmaf(length[n], keep[n], added);
                top[n] = now;
            }
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < NQ; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) sum[n][c] *= keep[n];
        if (op.cache.v_dtype == KV_Q4)
            for (int i = threadIdx.x; i < NQ * d; i += kAttendThreads) total[i] *= keep[i / d];
        // KV_Q4: the rows' own page is exact; of the page of position 0 the first slots are, the others are not.
        const bool quantized = op.cache.v_dtype == KV_Q4, sinks = quantized && base == 0 && base != own && all.low < KV_SINKS;
        for (int piece = 0; piece <= (sinks ? 1 : 0); piece++) {
            const bool exact = quantized && (base == own || piece == 1);
            if (exact) flush(false);
            const int dtype = exact ? KV_BF16 : op.cache.v_dtype;
            const char *from = !exact ? v : base == own ? side.v_open() : side.v_sinks();
            const Slots some = {sinks && piece == 0 ? KV_SINKS : all.low, piece == 1 ? KV_SINKS : all.high};
            if (turn < groups) {
                switch (dtype) {
                case KV_F32: sums_f32<NQ>(from, d, quad, turn, groups, score, some, sum); break;
                case KV_F16: sums_half<F16, NQ>(from, d, quad, turn, groups, score, some, sum); break;
                case KV_BF16: sums_half<Bf16, NQ>(from, d, quad, turn, groups, score, some, sum); break;
                case KV_Q8: sums_q8<NQ>(from, d, quad, turn, groups, score, some, sum); break;
                case KV_Q4: sums_q4<NQ>(from, d, quad, turn, groups, score, some, sum);
                }
            }
            if (exact) flush(true);
        }
        __syncthreads();                         // before the next page's scores
    }
    flush(false);
}

template <int NQ>
static __global__ void __launch_bounds__(kAttendThreads, 2) attend(kv_op_attend op, const kv_state *state, Tiles tiles, int row0, PartResults out) {
    begin_kernel();
    KV_DYNAMIC_SHARED(float, shared);
    __shared__ float top[NQ], length[NQ], keep[NQ], constant[NQ];
    const int group = tiles.group, rows_end = row0 + tiles.batch_rows < state->n_rows ? row0 + tiles.batch_rows : state->n_rows;
    const int begin = row0 + (int)blockIdx.z / tiles.pieces * tiles.tile_rows;
    if (begin >= rows_end) return;
    const int end = begin + tiles.tile_rows < rows_end ? begin + tiles.tile_rows : rows_end;
    const int first = (int)blockIdx.z % tiles.pieces * NQ;
    const int queries = (end - begin) * group - first < NQ ? (end - begin) * group - first : NQ;
    if (queries <= 0) return;
    const kv_table &table = table_of(state, op.cache, state->seq[begin]);
    const Layout at(op, NQ);
    const TileSums tile = {begin, first, queries, (int)blockIdx.y, shared + at.total, top, length, shared + at.score};
    attend_parts(op, state, tiles, row0, out, table, end, tile,
                 [&](int page, int stop) { sum_pages<NQ>(op, state, table, tile, group, end, page, stop, shared, at, keep, constant); });
}

// Whether attend_tiles.cu has a kernel: 16-bit and quantized pages of heads that are whole groups of channels.
static bool in_tiles(const kv_op_attend &op) { return op.head_dim % 32 == 0 && op.cache.k_dtype != KV_F32 && op.cache.v_dtype != KV_F32; }

// Part results of a row.
static int64_t row_bytes(const kv_op_attend &op, int parts) { return (int64_t)op.heads * parts * (op.head_dim + 2) * 4; }

static Tiles tiles_of(const kv_op_attend &op, const kv_cuda_bounds &bounds) {
    Tiles t;
    t.group = op.heads / op.kv_heads;
    t.tile = !in_tiles(op) ? kPlainTile : !bounds.prefill ? 8 : op.head_dim <= kWideTileDim ? 32 : 16;
    t.parts = bounds.prefill || bounds.max_pages < 1 ? 1 : bounds.max_pages;
    t.batch_rows = bounds.max_rows;
    if (t.parts > 1 && t.batch_rows > kBatchBytes / row_bytes(op, t.parts)) t.batch_rows = (int)(kBatchBytes / row_bytes(op, t.parts));
    if (t.batch_rows > t.tile) t.batch_rows -= t.batch_rows % t.tile;         // so that batches end where tiles do
    if (t.batch_rows < 1) t.batch_rows = 1;
    // Rows share a block only where they are sure to be of one sequence.
    t.tile_rows = bounds.max_seqs > 1 ? 1 : t.tile / t.group;
    if (t.tile_rows > t.batch_rows) t.tile_rows = t.batch_rows;
    if (t.tile_rows < 1) t.tile_rows = 1;
    t.pieces = (t.tile_rows * t.group + t.tile - 1) / t.tile;
    return t;
}

// Of no fewer bytes for larger bounds, so that what was asked for once will do for every smaller step.
int64_t attend_scratch(const kv_op_attend &op, const kv_cuda_bounds &bounds) {
    const int64_t row = row_bytes(op, tiles_of(op, bounds).parts), all = row * bounds.max_rows;
    return bounds.prefill ? 0 : row > kBatchBytes ? row : all < kBatchBytes ? all : kBatchBytes;
}

int64_t attend_counters(const kv_op_attend &op, const kv_cuda_bounds &bounds) {
    const int group = op.heads / op.kv_heads;
    return bounds.prefill ? 0 : (int64_t)bounds.max_rows * op.kv_heads * ((group + kPlainTile - 1) / kPlainTile);
}

cudaError_t launch_attend(const kv_op_attend &op, const Launch &l) {
    const Tiles t = tiles_of(op, l.bounds);
    PartResults results;
    results.parts = t.parts;
    results.o = (float *)l.scratch;
    results.ml = (float2 *)(results.o + (int64_t)t.batch_rows * op.heads * t.parts * op.head_dim);
    results.arrived = l.counters;
    const size_t shared = sizeof(float) * (size_t)Layout(op, kPlainTile).end;
    const kv_state *state = l.state;
    for (int row0 = 0; row0 < l.bounds.max_rows; row0 += t.batch_rows) {
        const dim3 grid(t.parts > 1 ? part_of((t.parts - 1) * KV_PAGE) + 1 : 1, op.kv_heads, (t.batch_rows + t.tile_rows - 1) / t.tile_rows * t.pieces);
        const cudaError_t error = in_tiles(op) ? launch_attend_tiles(op, state, t, row0, results, grid, l.stream)
                                               : launch_shared(attend<kPlainTile>, grid, kAttendThreads, shared, l.stream, op, state, t, row0, results);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace kv
