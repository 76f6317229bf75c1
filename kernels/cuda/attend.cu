// attend.cu - attention over cache pages with few query rows: online softmax (Milakov and Gimelshein, 2018) in parts that run
// side by side (Flash-Decoding, Dao et al., 2023), then combined in order.
//
// The positions of a sequence are cut into parts by a fixed rule, and a part is reduced page by page, so a row's result
// depends on nothing but its own positions: not on the rows beside it nor on pages that left the window. All query heads of a
// KV head are in one block, so that each cached byte is read once. Prompt rows go the same way with one part for all pages.
#include "attend.cuh"
#include "attend_k.cuh"
#include "attend_v.cuh"
#include "rotate.cuh"

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

template <int NQ>
static __global__ void __launch_bounds__(kAttendThreads) attend(kv_op_attend op, const kv_state *state, Tiles tiles, int row0, PartResults out) {
    begin_kernel();
    KV_DYNAMIC_SHARED(float, shared);
    __shared__ float top[NQ], length[NQ], keep[NQ], constant[NQ];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kAttendThreads / 32;
    const int d = op.head_dim, kv_head = blockIdx.y, group = tiles.group;
    const int rows_end = row0 + tiles.batch_rows < state->n_rows ? row0 + tiles.batch_rows : state->n_rows;
    const int begin = row0 + (int)blockIdx.z / tiles.pieces * tiles.tile_rows;
    if (begin >= rows_end) return;
    const int end = begin + tiles.tile_rows < rows_end ? begin + tiles.tile_rows : rows_end;
    const kv_table &table = table_of(state, op.cache, state->seq[begin]);
    const Seen seen(op, state, table, begin, end);
    int page = seen.first, stop = seen.last;
    if (tiles.parts > 1) {                       // this block's part alone
        page = blockIdx.x;
        if (page < seen.first || page >= seen.last || !seen.begins(table, page)) return;
        stop = page + 1;
        while (stop < seen.last && !seen.begins(table, stop)) stop++;
    }
    // Query i of the tile: row begin + (first + i) / group, head (first + i) % group of the KV head's.
    const int first = (int)blockIdx.z % tiles.pieces * NQ;
    const int queries = (end - begin) * group - first < NQ ? (end - begin) * group - first : NQ;
    const Layout at(op, NQ);
    float *q = shared + at.q, *factor = shared + at.factor, *score = shared + at.score, *sums = shared + at.sum, *total = shared + at.total;
    uint32_t *mask = (uint32_t *)(shared + at.mask);
    const float scale = op.softcap > 0 ? op.scale / op.softcap : op.scale;
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
    const int first_pos = state->pos[begin], last_pos = state->pos[end - 1];
    const int own = has_side(op.cache) ? first_pos / KV_PAGE * KV_PAGE : -1;
    const Side side(op.cache, table, kv_head, op.kv_heads, d);
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
        const int base = table.base[page];
        const char *k = k_of(op.cache, table.page[page], kv_head, d), *v = v_of(op.cache, table.page[page], kv_head, d);
        const Slots all = {slots_of(base, first_pos, op.window).low, slots_of(base, last_pos, op.window).high};
        if (all.low >= all.high) continue;
        if (op.cache.k_dtype == KV_Q4 && base != own) {
            prepare_q4<NQ>(PageK4(k, d), d, q, factor, mask, constant);
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
    const int part = tiles.parts > 1 ? blockIdx.x : 0;
    for (int n = warp; n < queries; n += warps) {
        const int row = begin + (first + n) / group - row0, head = kv_head * group + (first + n) % group;
        const int64_t slot = out.slot(row, op.heads, head, part);
        for (int c = lane; c < d; c += 32) out.o[slot * d + c] = total[n * d + c];
        if (lane == 0) out.ml[slot] = make_float2(top[n], length[n]);
    }
}

// A block adds the parts of a query up in their order; a thread has a channel.
static __global__ void combine(kv_op_attend op, const kv_state *state, Tiles tiles, int row0, PartResults in) {
    begin_kernel();
    __shared__ float result[KV_MAX_QUANT_DIM];
    const int row = row0 + blockIdx.x, head = blockIdx.y, d = op.head_dim, c = threadIdx.x;
    if (row >= state->n_rows) return;
    int first = 0, last = 1;
    const kv_table &table = table_of(state, op.cache, state->seq[row]);
    const int begin = row0 + (row - row0) / tiles.tile_rows * tiles.tile_rows;
    const Seen seen(op, state, table, begin, row + 1);
    if (tiles.parts > 1) first = seen.first, last = seen.last;
    const int64_t slot = in.slot(row - row0, op.heads, head, 0);
    float top = op.sinks ? op.sinks[head] : kLowest;
    for (int i = first; i < last; i++)
        if ((tiles.parts == 1 || seen.begins(table, i)) && in.ml[slot + i].y != 0) top = fmaxf(top, in.ml[slot + i].x);
    float sum = 0, length = op.sinks ? expf(op.sinks[head] - top) : 0;
    for (int i = first; i < last; i++) {
        if (tiles.parts > 1 && !seen.begins(table, i)) continue;
        const float2 ml = in.ml[slot + i];
        if (ml.y == 0) continue;                 // the row sees nothing of the part
        const float weight = expf(ml.x - top);
        length = fmaf(ml.y, weight, length);
        if (c < d) sum = fmaf(in.o[(slot + i) * d + c], weight, sum);
    }
    float y = length == 0 ? 0.f : sum / length;
    if (is_quantized(op.cache.v_dtype)) {
        if (c < d) result[c] = y;
        __syncthreads();
        if (threadIdx.x < 32) rotate(result, d, threadIdx.x);
        __syncthreads();
        if (c < d) y = result[c];
    }
    if (c < d) op.out[((int64_t)row * op.heads + head) * d + c] = y;
}

// Whether attend_tiles.cu has a kernel: 16-bit and quantized pages of heads that are whole groups of channels.
static bool in_tiles(const kv_op_attend &op) { return op.head_dim % 32 == 0 && op.cache.k_dtype != KV_F32 && op.cache.v_dtype != KV_F32; }

static Tiles tiles_of(const kv_op_attend &op, const kv_cuda_bounds &bounds) {
    Tiles t;
    t.group = op.heads / op.kv_heads;
    t.tile = !in_tiles(op) ? kPlainTile : bounds.prefill ? 32 : 16;
    t.parts = bounds.prefill || bounds.max_pages < 1 ? 1 : bounds.max_pages;
    const int64_t row_bytes = (int64_t)op.heads * t.parts * (op.head_dim + 2) * 4;
    t.batch_rows = (int)(kBatchBytes / row_bytes);
    if (t.batch_rows > bounds.max_rows) t.batch_rows = bounds.max_rows;
    if (t.batch_rows > t.tile) t.batch_rows -= t.batch_rows % t.tile;         // so that batches end where tiles do
    if (t.batch_rows < 1) t.batch_rows = 1;
    // Rows share a block only where they are sure to be of one sequence.
    t.tile_rows = bounds.max_seqs > 1 ? 1 : t.tile / t.group;
    if (t.tile_rows > t.batch_rows) t.tile_rows = t.batch_rows;
    if (t.tile_rows < 1) t.tile_rows = 1;
    t.pieces = (t.tile_rows * t.group + t.tile - 1) / t.tile;
    return t;
}

int64_t attend_scratch(const kv_op_attend &op, const kv_cuda_bounds &bounds) {
    const Tiles t = tiles_of(op, bounds);
    return (int64_t)t.batch_rows * op.heads * t.parts * (op.head_dim + 2) * 4;
}

cudaError_t launch_attend(const kv_op_attend &op, const Launch &l) {
    const Tiles t = tiles_of(op, l.bounds);
    PartResults results;
    results.parts = t.parts;
    results.o = (float *)l.scratch;
    results.ml = (float2 *)(results.o + (int64_t)t.batch_rows * op.heads * t.parts * op.head_dim);
    const size_t shared = sizeof(float) * (size_t)Layout(op, kPlainTile).end;
    const kv_state *state = l.state;
    for (int row0 = 0; row0 < l.bounds.max_rows; row0 += t.batch_rows) {
        const dim3 grid(t.parts, op.kv_heads, (t.batch_rows + t.tile_rows - 1) / t.tile_rows * t.pieces);
        cudaError_t error = in_tiles(op) ? launch_attend_tiles(op, state, t, row0, results, grid, l.stream)
                                         : launch_shared(attend<kPlainTile>, grid, kAttendThreads, shared, l.stream, op, state, t, row0, results);
        if (error == cudaSuccess)
            error = launch(combine, dim3(t.batch_rows, op.heads), (op.head_dim + 31) / 32 * 32, l.stream, op, state, t, row0, results);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

}  // namespace kv
