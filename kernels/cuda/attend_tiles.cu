// attend_tiles.cu - attention over 16-bit and quantized pages on the tensor cores: queries are the rows of a tile, cached tokens
// (then channels) its columns, and cached words become operands as they are loaded.
//
// Quantized codes are exact in 16 bits, so only what meets them is rounded: of decode rows q and the probabilities are split
// into two terms each, of prompt rows rounded to 16 bits once. Scales of K multiply finished sums, or q before; those of V are
// folded into the probabilities. Operands in halves are brought near 1 by powers of two first.
#include "attend_finish.cuh"
#include "attend_k.cuh"
#include "attend_tiles.cuh"

namespace kv {

constexpr int kTileWarps = kAttendThreads / 32;

// Decode rows over quantized pages are all that loads could keep waiting: codes are few, and much is done with each. So their pages are on
// their way to shared memory while the page before is worked on, K since its scores, V since its sums.
static __host__ __device__ __forceinline__ bool is_staged(int tile, int dtype) { return tile == 8 && is_quantized(dtype); }
static __host__ __device__ __forceinline__ int code_bytes(int dtype, int dim) { return dtype == KV_Q8 ? KV_PAGE * dim : KV_PAGE * dim / 2; }

// How a warp's words of a quantized page are cut: turns at K, turns at V of a group of 32 channels, which `splits` warps share.
static __host__ __device__ __forceinline__ int splits_of(int dim) { return dim / 32 > 2 ? 1 : kTileWarps / (dim / 32); }
static __host__ __device__ __forceinline__ int k_turns(int dtype, int dim) { return dtype == KV_Q8 ? dim / 16 : dim / 32; }
static __host__ __device__ __forceinline__ int v_turns(int dtype, int dim) { return KV_PAGE / splits_of(dim) / (dtype == KV_Q8 ? 16 : 32); }

// Shared memory of a block, in floats. q: of KV_Q4 floats, otherwise operands; factor, factors: floats and operands of KV_Q4. score: rows of
// `stride`, such that a warp's rows lie in different banks; weights: operands of the probabilities where V is 16-bit. scale: what the scores
// of a query are multiplied with. k_words, v_words: of staged pages, and in k_rest and v_rest what follows the codes in them.
struct TileLayout {
    int q, factor, factors, score, stride, weights, total, scale, constant, top, length, keep, mask, k_words, k_rest, v_words, v_rest, end;
    TileLayout(const kv_op_attend &op, int tile, int terms) {
        const int d = op.head_dim, k = op.cache.k_dtype, v = op.cache.v_dtype, of_turn = 4 * kAttendThreads, of_rows = operand_words(tile, d / 16, terms);
        q = 0;
        factor = q + (k == KV_Q4 ? tile * d : of_rows);
        factors = factor + (k == KV_Q4 ? tile * d : 0);
        score = factors + (k == KV_Q4 ? of_rows : 0);
        stride = KV_PAGE + (v == KV_Q8 ? 16 : 4);
        weights = score + tile * stride;
        total = weights + (is_quantized(v) ? 0 : operand_words(tile, KV_PAGE / 16, terms));
        scale = total + tile * d;
        constant = scale + tile;
        top = constant + tile;
        length = top + tile;
        keep = length + tile;
        mask = keep + tile;
        k_words = (mask + d / 8 + 3) / 4 * 4;
        k_rest = k_words + (is_staged(tile, k) ? k_turns(k, d) * of_turn : 0);
        v_words = k_rest + (is_staged(tile, k) ? ((int)kv_head_bytes(k, d, 0) - code_bytes(k, d)) / 4 : 0);
        v_rest = v_words + (is_staged(tile, v) ? (d / 32 + kTileWarps - 1) / kTileWarps * v_turns(v, d) * of_turn : 0);
        end = v_rest + (is_staged(tile, v) ? ((int)kv_head_bytes(v, d, 1) - code_bytes(v, d)) / 4 : 0);
    }
};

// Sums pages [page, stop) for the tile's queries, rows [begin, end), in shared memory laid out as `at` says. MT: tiles of 16 queries.
// NG: groups of 32 channels that a warp sums at most. TERMS: of the operands that are made from floats. HALF: tiles of 8 queries.
template <int MT, int NG, int TERMS, bool HALF>
static __device__ __forceinline__ void sum_pages(const kv_op_attend &op, const kv_state *state, const kv_table &table, const TileSums &tile, int group,
                                                 int end, int page, int stop, float *shared, const TileLayout &at) {
    constexpr int kTile = HALF ? 8 : 16 * MT;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, d = op.head_dim;
    const int begin = tile.begin, first = tile.first, queries = tile.queries, kv_head = tile.kv_head;
    float *q = shared + at.q, *factor = shared + at.factor, *score = tile.work, *total = tile.total, *scale_of = shared + at.scale;
    const PackedRows<F16, TERMS, HALF> q_halves{(uint32_t *)q, d / 16}, factors{(uint32_t *)shared + at.factors, d / 16};
    const PackedRows<Bf16, TERMS, HALF> q_brains{(uint32_t *)q, d / 16};
    const PackedRows<F16, TERMS, HALF> halves{(uint32_t *)shared + at.weights, KV_PAGE / 16};
    const PackedRows<Bf16, TERMS, HALF> brains{(uint32_t *)shared + at.weights, KV_PAGE / 16};
    float *constant = shared + at.constant, *top = tile.top, *length = tile.length, *keep = shared + at.keep;
    uint32_t *mask = (uint32_t *)(shared + at.mask);
    const int k_dtype = op.cache.k_dtype, v_dtype = op.cache.v_dtype;
    const float scale = op.softcap > 0 ? op.scale / op.softcap : op.scale;
    const bool k_staged = HALF && is_quantized(k_dtype), v_staged = HALF && is_quantized(v_dtype);
    // Where a head has few groups of channels, the warps of a group share the tokens.
    const int groups = d / 32, splits = splits_of(d), my_group = groups > 2 ? warp : warp % groups;
    const int split = groups > 2 ? 0 : warp / groups, tokens_from = KV_PAGE / splits * split, tokens_to = tokens_from + KV_PAGE / splits;
    const int first_pos = state->pos[begin], last_pos = state->pos[end - 1];
    const int own = has_side(op.cache) ? first_pos / KV_PAGE * KV_PAGE : -1;
    // Send for K, for V of page number i of the table, unless it is exact: a group of copies, of nothing where there is nothing to copy.
    auto send_for_k = [&](int i) {
        if (k_staged && i < stop && (k_dtype == KV_Q8 || table.base[i] != own)) {
            const char *from = k_of(op.cache, table.page[i], kv_head, d);
            const int codes = code_bytes(k_dtype, d), block = codes / (KV_PAGE / KV_LANES);
            stage_words<kAttendThreads>(shared + at.k_words, TokenBlocks{from + 2 * warp * block, block}.quads(lane), k_turns(k_dtype, d));
            stage_bytes<kAttendThreads>(shared + at.k_rest, from + codes, (int)kv_head_bytes(k_dtype, d, 0) - codes);
        }
        commit_copies();
    };
    auto send_for_v = [&](int i) {
        if (v_staged && i < stop && (v_dtype == KV_Q8 || table.base[i] != own)) {
            const char *from = v_of(op.cache, table.page[i], kv_head, d);
            const int codes = code_bytes(v_dtype, d), turns = v_turns(v_dtype, d);
#pragma unroll
            for (int ng = 0; ng < NG; ng++) {
                const int group_of_channels = my_group + kTileWarps * ng;
                if (group_of_channels >= groups) continue;
                stage_words<kAttendThreads>(shared + at.v_words + 4 * kAttendThreads * turns * ng, quads_of_v(from, v_dtype, 32 * group_of_channels, tokens_from, lane), turns);
            }
            stage_bytes<kAttendThreads>(shared + at.v_rest, from + codes, (int)kv_head_bytes(v_dtype, d, 1) - codes);
        }
        commit_copies();
    };
    const Side side(op.cache, table, kv_head, op.kv_heads, d);
    ask_for(op.cache, table, page, own, last_pos, side);
    __syncthreads();                             // what the last part left has been read
    if (HALF) send_for_k(page), send_for_v(page);
    for (int n = warp; n < kTile; n += kTileWarps) {
        const int row = begin + (first + n) / group, head = kv_head * group + (first + n) % group;
        float *to = (k_dtype == KV_Q4 ? q : total) + n * d, most = 0;
        const float *from = op.qkv + ((int64_t)row * (op.heads + 2 * op.kv_heads) + head) * d;
        for (int c = lane; c < d; c += 32) to[c] = n < queries ? from[c] * scale : 0.f;
        if (k_dtype == KV_Q8 && n < queries) rotate<4 * NG>(to, d, lane);
        float power = 1;
        if (k_dtype == KV_Q8 || k_dtype == KV_F16) {
            for (int c = lane; c < d; c += 32) most = fmaxf(most, fabsf(to[c]));
            power = power_near_one(warp_max(most));
            for (int c = lane; c < d; c += 32) to[c] *= power;
        }
        __syncwarp();
        for (int c = 2 * lane; c < d && k_dtype != KV_Q4; c += 64) {
            const float2 x = *(const float2 *)(to + c);
            if (k_dtype == KV_BF16) q_brains.put(n, pair_of_halves(c), x.x, x.y);
            else q_halves.put(n, k_dtype == KV_Q8 ? pair_of_bytes(c) : pair_of_halves(c), x.x, x.y);
        }
        __syncwarp();
        for (int i = lane; i < KV_PAGE; i += 32) score[n * at.stride + i] = 0;
        for (int c = lane; c < d; c += 32) total[n * d + c] = 0;
        if (lane == 0) scale_of[n] = 1 / power, top[n] = kLowest, length[n] = 0, keep[n] = 0, constant[n] = 0;
    }
    for (int i = threadIdx.x; i < at.total - at.weights; i += kAttendThreads) shared[at.weights + i] = 0;
    if (HALF) wait_copies<1>();                  // K is here
    __syncthreads();

    float sum[NG][MT][4][4] = {};
    float unit[NG];                              // sums are in units of 1/unit
#pragma unroll
    for (int ng = 0; ng < NG; ng++) unit[ng] = 1;

    // Multiplies the sums by `keep` of their rows (or 1), and makes them units of 1/to.
    auto rescale = [&](int ng, bool kept, float to) {
        const float change = to / unit[ng];
        unit[ng] = to;
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            const float low = (kept ? keep[16 * mt + g] : 1.f) * change, high = HALF ? low : (kept ? keep[16 * mt + g + 8] : 1.f) * change;
#pragma unroll
            for (int i = 0; i < 4; i++) sum[ng][mt][i][0] *= low, sum[ng][mt][i][1] *= low, sum[ng][mt][i][2] *= high, sum[ng][mt][i][3] *= high;
        }
    };
    // Adds the sums of all warps to `total`; warps that share a group of channels take turns.
    auto flush = [&]() {
        for (int turn = 0; turn < splits; turn++) {
            if (turn == split)
#pragma unroll
                for (int ng = 0; ng < NG; ng++) {
                    const int group_of_channels = my_group + kTileWarps * ng;
                    if (group_of_channels >= groups) continue;
                    rescale(ng, false, 1);
#pragma unroll
                    for (int mt = 0; mt < MT; mt++) {
                        float *to = total + (16 * mt + g) * d + 32 * group_of_channels + 8 * t;
#pragma unroll
                        for (int i = 0; i < 4; i++) add_terms<HALF>(sum[ng][mt][i]);
#pragma unroll
                        for (int c = 0; c < (HALF ? 2 : 4); c++) {
                            float4 *four = (float4 *)(to + c / 2 * 8 * d + c % 2 * 4), x = *four;
                            *four = make_float4(x.x + sum[ng][mt][0][c], x.y + sum[ng][mt][1][c], x.z + sum[ng][mt][2][c], x.w + sum[ng][mt][3][c]);
                        }
#pragma unroll
                        for (int i = 0; i < 16; i++) sum[ng][mt][i / 4][i % 4] = 0;
                    }
                }
            __syncthreads();
        }
    };
    auto rotate_total = [&]() {
        for (int n = warp; n < queries; n += kTileWarps) rotate<4 * NG>(total + n * d, d, lane);
        __syncthreads();
    };

    for (; page < stop; page++) {
        if (page + 1 < stop) ask_for(op.cache, table, page + 1, own, last_pos, side);
        const int base = table.base[page];
        const char *k = k_of(op.cache, table.page[page], kv_head, d);
        const Slots all = {slots_of(base, first_pos, op.window).low, slots_of(base, last_pos, op.window).high};
        if (all.low >= all.high) {               // nothing of it is seen
            if (HALF) {
                send_for_k(page + 1);
                wait_copies<0>();
                __syncthreads();
                send_for_v(page + 1);
            }
            continue;
        }
        const bool coded = k_dtype == KV_Q4 && base != own;          // else, under KV_Q4, the page is exact
        if (coded) {
            prepare_q4<kTile>(PageK4(HALF ? (const char *)(shared + at.k_rest) : k + KV_PAGE * d / 2, d), d, q, factor, mask, constant);
            __syncthreads();
            for (int n = warp; n < kTile; n += kTileWarps) {
                float most = 0;
                for (int c = lane; c < d; c += 32) most = fmaxf(most, fabsf(factor[n * d + c]));
                const float power = power_near_one(warp_max(most));
                for (int c = 2 * lane; c < d; c += 64) factors.put(n, pair_of_nibbles(c), factor[n * d + c] * power, factor[n * d + c + 1] * power);
                if (lane == 0) scale_of[n] = 1 / power;
            }
            __syncthreads();
        }
        const int token0 = 32 * warp;
        if (token0 < all.high && token0 + 32 > all.low) {
            float s[MT][4][4] = {};
            const bool sinks = coded && base == 0 && warp == 0;      // the first block is exact, the second is not
            if (k_dtype == KV_Q8) {
                const Words words = HALF ? staged_words<kAttendThreads>(shared + at.k_words) : TokenBlocks{k + (int64_t)2 * warp * d * 16, (int64_t)d * 16}.quads(lane);
                const uint16_t *scales = HALF ? (const uint16_t *)(shared + at.k_rest) : (const uint16_t *)(k + KV_PAGE * d);
                scores_8<MT, TERMS, HALF>(words, scales + warp * d, d / 2, d, q_halves, lane, s);
            } else if (k_dtype == KV_F16)
                scores_16<MT, HALF>({k + (int64_t)2 * warp * d * 32, (int64_t)d * 32}, d, q_halves, lane, s);
            else if (coded)
                scores_4<MT, TERMS, HALF>(HALF ? staged_words<kAttendThreads>(shared + at.k_words) : TokenBlocks{k + (int64_t)2 * warp * d * 8, (int64_t)d * 8}.quads(lane), mask,
                                          d, factors, lane, s);
#pragma unroll
            for (int mt = 0; mt < MT; mt++)
#pragma unroll
                for (int half = 0; half < (HALF ? 1 : 2); half++) {
                    const int n = 16 * mt + g + 8 * half;
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int c = 0; c < 2; c++) s[mt][i][2 * half + c] = fmaf(s[mt][i][2 * half + c], scale_of[n], coded ? constant[n] : 0.f);
                }
            if (k_dtype == KV_BF16 || (k_dtype == KV_Q4 && !coded) || sinks) {
                float exact[MT][4][4] = {};
                const char *from = k_dtype == KV_BF16 ? k : sinks ? side.k_sinks() : side.k_open();
                // Under `sinks` the second block is read from the first one's place, and thrown away.
                const TokenBlocks blocks{from + (int64_t)2 * warp * d * 32, sinks ? 0 : (int64_t)d * 32};
                if (k_dtype == KV_BF16) scores_16<MT, HALF>(blocks, d, q_brains, lane, exact);
                else scores_16<MT, HALF>(blocks, d, LooseRows<Bf16, TERMS, HALF>{q, d}, lane, exact);
#pragma unroll
                for (int mt = 0; mt < MT; mt++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int c = 0; c < 4; c++)
                            if (!sinks || t < 2) s[mt][i][c] = exact[mt][i][c];
            }
#pragma unroll
            for (int mt = 0; mt < MT; mt++)
#pragma unroll
                for (int half = 0; half < (HALF ? 1 : 2); half++) {
                    const int n = 16 * mt + g + 8 * half;
                    if (n >= queries) continue;
                    float4 *to = (float4 *)score + n * (at.stride / 4) + token0 / 4 + 2 * t;
#pragma unroll
                    for (int c = 0; c < 2; c++)
                        to[c] = make_float4(s[mt][0][2 * half + c], s[mt][1][2 * half + c], s[mt][2][2 * half + c], s[mt][3][2 * half + c]);
                }
        }
        __syncthreads();
        if (HALF) send_for_k(page + 1);
        for (int n = warp; n < queries; n += kTileWarps) {
            const Slots mine = slots_of(base, state->pos[begin + (first + n) / group], op.window);
            static_assert(KV_PAGE == 4 * 32, "four slots a lane");
            float *of = score + n * at.stride + 4 * lane, most = kLowest;
            const float4 scores = *(const float4 *)of;
            float x[4] = {scores.x, scores.y, scores.z, scores.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int slot = 4 * lane + i;
                if (slot < mine.low || slot >= mine.high) x[i] = kLowest;
                else x[i] = op.softcap > 0 ? op.softcap * tanhf(x[i]) : x[i];
                most = fmaxf(most, x[i]);
            }
            const float before = top[n], now = fmaxf(before, warp_max(most));
            float added = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int slot = 4 * lane + i;
                x[i] = slot < mine.low || slot >= mine.high ? 0.f : expf(x[i] - now);
                added += x[i];
            }
            if (is_quantized(v_dtype)) *(float4 *)of = make_float4(x[0], x[1], x[2], x[3]);
            else
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const bool second = HALF ? i == 1 : (lane / 8 + i) % 2;      // half of the lanes begin with their second pair: more banks
                    const float a = second ? x[2] : x[0], b = second ? x[3] : x[1];
                    if (v_dtype == KV_F16) halves.put(n, pair_of_halves(4 * lane + 2 * second), a, b);
                    else brains.put(n, pair_of_halves(4 * lane + 2 * second), a, b);
                }
            added = warp_sum(added);
            __syncwarp();
            if (lane == 0) {
                keep[n] = length[n] == 0 ? 0.f : expf(before - now);
                length[n] = fmaf(length[n], keep[n], added);
                top[n] = now;
            }
        }
        if (HALF) wait_copies<1>();              // V is here
        __syncthreads();

        // KV_Q4: the rows' own page is exact; of the page of position 0 the first slots are, the others are not. Exact sums are
        // not rotated; they go through `total` while it is turned back.
        const bool quantized = v_dtype == KV_Q4, sinks = quantized && base == 0 && base != own && all.low < KV_SINKS;
        if (quantized) {
            for (int i = threadIdx.x; i < queries * d; i += kAttendThreads) total[i] *= keep[i / d];
            __syncthreads();
        }
        for (int piece = 0; piece <= (sinks ? 1 : 0); piece++) {
            const bool exact = quantized && (base == own || piece == 1);
            const int dtype = exact ? KV_BF16 : v_dtype;
            const char *from = !exact ? v_of(op.cache, table.page[page], kv_head, d) : base == own ? side.v_open() : side.v_sinks();
            const Slots some = {sinks && piece == 0 ? KV_SINKS : all.low, piece == 1 ? KV_SINKS : all.high};
            if (exact) {
#pragma unroll
                for (int ng = 0; ng < NG; ng++)
                    if (piece == 0) rescale(ng, true, unit[ng]);
                flush();
                rotate_total();
            }
#pragma unroll
            for (int ng = 0; ng < NG; ng++) {
                const int group_of_channels = my_group + kTileWarps * ng, channel = 32 * group_of_channels;
                if (group_of_channels >= groups) continue;
                const char *words = from + (int64_t)channel * 4;
                if (dtype == KV_Q8 || dtype == KV_Q4) {
                    const int of_group = dtype == KV_Q8 ? kv_q8_group(d) : kv_q4_group(d);
                    const char *rest = HALF ? (const char *)(shared + at.v_rest) : from + code_bytes(dtype, d);
                    const uint16_t *scales = (const uint16_t *)rest + channel / of_group * KV_PAGE;
                    const Words v_words = HALF ? staged_words<kAttendThreads>(shared + at.v_words + 4 * kAttendThreads * v_turns(dtype, d) * ng)
                                               : quads_of_v(from, dtype, channel, tokens_from, lane);
                    const float near_one = power_near_one(greatest(scales, some, lane));
                    rescale(ng, true, near_one);
                    if (dtype == KV_Q8) {
                        sums_8<MT, TERMS, HALF>(v_words, scales, near_one, tokens_from, tokens_to, score, at.stride, some, lane, sum[ng]);
                    } else {
                        float rest[MT][2] = {};
                        const uint16_t *zeros = scales + d / of_group * KV_PAGE;
                        sums_4<MT, TERMS, HALF>(v_words, scales, zeros, near_one, tokens_from, tokens_to, score, at.stride, some, lane, sum[ng], rest);
#pragma unroll
                        for (int mt = 0; mt < MT; mt++)
#pragma unroll
                            for (int half = 0; half < (HALF ? 1 : 2); half++) {
                                float r = rest[mt][half];
                                r += __shfl_xor_sync(kAllLanes, r, 1);
                                r += __shfl_xor_sync(kAllLanes, r, 2);
                                r *= near_one;
#pragma unroll
                                for (int i = 0; i < 4; i++) sum[ng][mt][i][2 * half] += r, sum[ng][mt][i][2 * half + 1] += r;
                            }
                    }
                } else {
                    if (!exact) rescale(ng, true, 1);
                    if (dtype == KV_F16) sums_16<MT>(words, d, tokens_from, tokens_to, halves, some, lane, sum[ng]);
                    else if (!exact) sums_16<MT>(words, d, tokens_from, tokens_to, brains, some, lane, sum[ng]);
                    else sums_16<MT>(words, d, tokens_from, tokens_to, LooseRows<Bf16, TERMS, HALF>{score, at.stride}, some, lane, sum[ng]);
                }
            }
            if (exact) {
                flush();
                rotate_total();
            }
        }
        if (HALF) wait_copies<0>();              // the next K is here
        __syncthreads();                         // before the next page's scores
        if (HALF) send_for_v(page + 1);
    }
    flush();
}

template <int MT, int NG, int TERMS, bool HALF>
static __global__ void __launch_bounds__(kAttendThreads, MT * NG == 1 ? 3 : 2)
attend_tiles(kv_op_attend op, const kv_state *state, Tiles tiles, int row0, PartResults out, TileLayout at) {
    begin_kernel();
    KV_DYNAMIC_SHARED(float, shared);
    constexpr int kTile = HALF ? 8 : 16 * MT;
    const int group = tiles.group, rows_end = row0 + tiles.batch_rows < state->n_rows ? row0 + tiles.batch_rows : state->n_rows;
    const int begin = row0 + (int)blockIdx.z / tiles.pieces * tiles.tile_rows;
    if (begin >= rows_end) return;
    const int end = begin + tiles.tile_rows < rows_end ? begin + tiles.tile_rows : rows_end;
    const int first = (int)blockIdx.z % tiles.pieces * kTile;
    const int queries = (end - begin) * group - first < kTile ? (end - begin) * group - first : kTile;
    if (queries <= 0) return;
    const kv_table &table = table_of(state, op.cache, state->seq[begin]);
    const TileSums tile = {begin, first, queries, (int)blockIdx.y, shared + at.total, shared + at.top, shared + at.length, shared + at.score};
    attend_parts(op, state, tiles, row0, out, table, end, tile,
                 [&](int page, int stop) { sum_pages<MT, NG, TERMS, HALF>(op, state, table, tile, group, end, page, stop, shared, at); });
}

cudaError_t launch_attend_tiles(const kv_op_attend &op, const kv_state *state, const Tiles &t, int row0, const PartResults &results, dim3 grid,
                                cudaStream_t stream) {
    const TileLayout at(op, t.tile, t.tile == 32 ? 1 : 2);              // a parameter takes no registers
    const bool wide = op.head_dim > kWideTileDim;
    const auto kernel = t.tile == 32 ? attend_tiles<2, 1, 1, false> : t.tile == 16 ? attend_tiles<1, 2, 2, false>
                        : wide ? attend_tiles<1, 2, 2, true> : attend_tiles<1, 1, 2, true>;
    return launch_shared(kernel, grid, kAttendThreads, sizeof(float) * (size_t)at.end, stream, op, state, t, row0, results, at);
}

}  // namespace kv
