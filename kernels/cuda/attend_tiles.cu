// attend_tiles.cu - attention over 16-bit and quantized pages on the tensor cores: queries are the rows of a tile, cached tokens
// (then channels) its columns, and cached words become operands as they are loaded.
//
// Quantized codes are exact in 16 bits, so only what meets them is rounded: of decode rows q and the probabilities are split
// into two terms each, of prompt rows rounded to 16 bits once. Scales of K multiply finished sums, or q before; those of V are
// folded into the probabilities. Operands in halves are brought near 1 by powers of two first.
#include "attend.cuh"
#include "attend_k.cuh"
#include "mma.cuh"
#include "rotate.cuh"

namespace kv {

constexpr int kTileWarps = kAttendThreads / 32;

// Shared memory of a block, in floats. scale: what the scores of a query are multiplied with.
struct TileLayout {
    int q, factor, score, total, scale, constant, top, length, keep, mask, end;
    __host__ __device__ TileLayout(const kv_op_attend &op, int tile) {
        const int d = op.head_dim;
        q = 0;
        factor = q + tile * d;
        score = factor + (op.cache.k_dtype == KV_Q4 ? tile * d : 0);
        total = score + tile * KV_PAGE;
        scale = total + tile * d;
        constant = scale + tile;
        top = constant + tile;
        length = top + tile;
        keep = length + tile;
        mask = keep + tile;
        end = mask + d / 8;
    }
};

// Scores of 32 tokens by a warp: sum[mt][i] is operand D whose column c is token 4c + i. Words j of the tokens' blocks are at
// k (tokens 0 to 15) and k + stride (the others).
struct TokenBlocks {
    const char *k;
    int64_t stride;
    __device__ __forceinline__ uint4 words(int j, int lane) const {
        const int g = lane / 4;
        return load16(k + g / 4 * stride + (j * 16 + 4 * (g % 4)) * 4);
    }
};

template <class H, int MT, int TERMS>
static __device__ __forceinline__ void scores_16(const TokenBlocks &k, int dim, const float *q, int lane, float (*sum)[4][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int s = 0; s < dim / 16; s++) {
        const uint4 low = k.words(8 * s + t, lane), high = k.words(8 * s + 4 + t, lane);
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            OperandA<H, TERMS> a;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 x = *(const float2 *)(q + (16 * mt + g + i % 2 * 8) * dim + 16 * s + 2 * t + i / 2 * 8);
                a.set(i, x.x, x.y);
            }
            a.multiply(sum[mt][0], low.x, high.x);
            a.multiply(sum[mt][1], low.y, high.y);
            a.multiply(sum[mt][2], low.z, high.z);
            a.multiply(sum[mt][3], low.w, high.w);
        }
    }
}

// A of rows g and g + 8, four channels of each: at x and at x + 8 rows.
template <int TERMS>
static __device__ __forceinline__ void set_quads(OperandA<F16, TERMS> &a, const float *x, int stride) {
    const float4 first = *(const float4 *)x, second = *(const float4 *)(x + 8 * stride);
    a.set(0, first.x, first.y);
    a.set(1, second.x, second.y);
    a.set(2, first.z, first.w);
    a.set(3, second.z, second.w);
}

// scales: f16 [dim/32][16] of the first block of tokens, those of the other one scale_stride further.
template <int MT, int TERMS>
static __device__ __forceinline__ void scores_8(const TokenBlocks &k, const uint16_t *scales, int scale_stride, int dim, const float *q, int lane, float (*sum)[4][4]) {
    const int g = lane / 4, t = lane % 4;
    for (int group = 0; group < dim / 32; group++) {
        float part[MT][4][4] = {};
#pragma unroll
        for (int s = 2 * group; s < 2 * group + 2; s++) {
            const uint4 v = k.words(4 * s + t, lane);
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                OperandA<F16, TERMS> a;
                set_quads(a, q + (16 * mt + g) * dim + 16 * s + 4 * t, dim);
#pragma unroll
                for (int i = 0; i < 4; i++) a.multiply(part[mt][i], signed_halves(w[i], false), signed_halves(w[i], true));
            }
        }
        // Columns 2t and 2t + 1 of all four are tokens 8t..8t+7.
        const uint4 s = load16(scales + t / 2 * scale_stride + group * KV_LANES + t % 2 * 8);
        const float scale[2][4] = {{F16::low(s.x), F16::high(s.x), F16::low(s.y), F16::high(s.y)}, {F16::low(s.z), F16::high(s.z), F16::low(s.w), F16::high(s.w)}};
#pragma unroll
        for (int mt = 0; mt < MT; mt++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[mt][i][c] = fmaf(scale[c % 2][i], part[mt][i][c], sum[mt][i][c]);
    }
}

// factor and mask as prepare_q4 makes them.
template <int MT, int TERMS>
static __device__ __forceinline__ void scores_4(const TokenBlocks &k, const uint32_t *mask, int dim, const float *factor, int lane, float (*sum)[4][4]) {
    const int g = lane / 4, t = lane % 4;
    for (int s = 0; s < dim / 32; s++) {
        const uint4 v = k.words(4 * s + t, lane);
        const uint32_t w[4] = {v.x, v.y, v.z, v.w}, low = mask[4 * s + t];
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            OperandA<F16, TERMS> high_codes, low_codes;
            const float *at = factor + (16 * mt + g) * dim + 8 * (4 * s + t);
            set_quads(high_codes, at, dim);
            set_quads(low_codes, at + 4, dim);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                high_codes.multiply(sum[mt][i], unsigned_halves(w[i] & ~low, false), unsigned_halves(w[i] & ~low, true));
                low_codes.multiply(sum[mt][i], unsigned_halves(w[i] & low, false), unsigned_halves(w[i] & low, true));
            }
        }
    }
}

// 0xffff in each half of a word of two tokens that are in [low, high).
static __device__ __forceinline__ uint32_t inside(int token, Slots slots) {
    return (token >= slots.low && token < slots.high ? 0xffffu : 0u) | (token + 1 >= slots.low && token + 1 < slots.high ? 0xffff0000u : 0u);
}

// Weighted sums of 32 channels by a warp: sum[mt][i] is operand D whose column c is channel 4c + i. v: of a 16-bit page word 0
// of the first of them, a word row having `dim` words; of a quantized one the page, with their first channel. Tokens [from, to), multiples of 32, of which those in `slots` count. weight: [tile][128].
template <class H, int MT, int TERMS>
static __device__ __forceinline__ void sums_16(const char *v, int dim, int from, int to, const float *weight, Slots slots, int lane, float (*sum)[4][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int s = from / 16; s < to / 16; s++) {
        if (16 * s >= slots.high || 16 * s + 16 <= slots.low) continue;
        uint4 low = load16(v + ((int64_t)(8 * s + t) * dim + 4 * g) * 4), high = load16(v + ((int64_t)(8 * s + 4 + t) * dim + 4 * g) * 4);
        if (16 * s < slots.low || 16 * s + 16 > slots.high) {
            const uint32_t a = inside(16 * s + 2 * t, slots), b = inside(16 * s + 8 + 2 * t, slots);
            low = make_uint4(low.x & a, low.y & a, low.z & a, low.w & a);
            high = make_uint4(high.x & b, high.y & b, high.z & b, high.w & b);
        }
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            OperandA<H, TERMS> a;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 p = *(const float2 *)(weight + (16 * mt + g + i % 2 * 8) * KV_PAGE + 16 * s + 2 * t + i / 2 * 8);
                a.set(i, p.x, p.y);
            }
            a.multiply(sum[mt][0], low.x, high.x);
            a.multiply(sum[mt][1], low.y, high.y);
            a.multiply(sum[mt][2], low.z, high.z);
            a.multiply(sum[mt][3], low.w, high.w);
        }
    }
}

static __device__ __forceinline__ float4 halves4(const uint16_t *p) {
    const uint2 v = load8(p);
    return make_float4(F16::low(v.x), F16::high(v.x), F16::low(v.y), F16::high(v.y));
}

// p*scale for four tokens from `token` on, zero for those that do not count.
static __device__ __forceinline__ float4 folded(const float *p, const float4 &scale, int token, Slots slots) {
    const float4 x = *(const float4 *)p;
    return make_float4(token >= slots.low && token < slots.high ? x.x * scale.x : 0.f, token + 1 >= slots.low && token + 1 < slots.high ? x.y * scale.y : 0.f,
                       token + 2 >= slots.low && token + 2 < slots.high ? x.z * scale.z : 0.f,
                       token + 3 >= slots.low && token + 3 < slots.high ? x.w * scale.w : 0.f);
}

template <int TERMS> static __device__ __forceinline__ void set_rows(OperandA<F16, TERMS> &a, const float4 &first, const float4 &second) {
    a.set(0, first.x, first.y);
    a.set(1, second.x, second.y);
    a.set(2, first.z, first.w);
    a.set(3, second.z, second.w);
}

// scales: f16 [128] of these channels; `unit`: brings them near 1.
template <int MT, int TERMS>
static __device__ __forceinline__ void sums_8(const char *v, int channel, const uint16_t *scales, float unit, int from, int to, const float *weight, Slots slots, int lane,
                                              float (*sum)[4][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int s = from / 16; s < to / 16; s++) {
        if (16 * s >= slots.high || 16 * s + 16 <= slots.low) continue;
        const int token = 16 * s + 4 * t;
        const uint4 d = load16(v + kv_v8_index(token, channel + 4 * g));
        const uint32_t w[4] = {d.x, d.y, d.z, d.w};
        const float4 f = halves4(scales + token), scale = make_float4(f.x * unit, f.y * unit, f.z * unit, f.w * unit);
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            OperandA<F16, TERMS> a;
            const float *p = weight + (16 * mt + g) * KV_PAGE + token;
            set_rows(a, folded(p, scale, token, slots), folded(p + 8 * KV_PAGE, scale, token, slots));
#pragma unroll
            for (int i = 0; i < 4; i++) a.multiply(sum[mt][i], signed_halves(w[i], false), signed_halves(w[i], true));
        }
    }
}

// As sums_8; zeros: f16 [128]. What they add to each channel of rows g and g + 8 goes to rest[mt][2], times unit, in parts by lane.
template <int MT, int TERMS>
static __device__ __forceinline__ void sums_4(const char *v, int channel, const uint16_t *scales, const uint16_t *zeros, float unit, int from, int to, const float *weight,
                                              Slots slots, int lane, float (*sum)[4][4], float (*rest)[2]) {
    const int g = lane / 4, t = lane % 4;
    for (int s = from / 32; s < to / 32; s++) {
        if (32 * s >= slots.high || 32 * s + 32 <= slots.low) continue;
        const uint4 d = load16(v + kv_v4_index(32 * s + 8 * t, channel + 4 * g));
        const uint32_t w[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
        for (int half = 0; half < 2; half++) {                       // low nibbles: four tokens, high ones: the next four
            const int token = 32 * s + 8 * t + 4 * half;
            const float4 f = halves4(scales + token), z = halves4(zeros + token);
            const float4 scale = make_float4(f.x * unit, f.y * unit, f.z * unit, f.w * unit), zero = make_float4(z.x * unit, z.y * unit, z.z * unit, z.w * unit);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                OperandA<F16, TERMS> a;
                const float *p = weight + (16 * mt + g) * KV_PAGE + token;
                set_rows(a, folded(p, scale, token, slots), folded(p + 8 * KV_PAGE, scale, token, slots));
                const float4 x = folded(p, zero, token, slots), y = folded(p + 8 * KV_PAGE, zero, token, slots);
                rest[mt][0] += (x.x + x.y) + (x.z + x.w);
                rest[mt][1] += (y.x + y.y) + (y.z + y.w);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint32_t codes = w[i] >> 4 * half & 0x0f0f0f0fu;
                    a.multiply(sum[mt][i], unsigned_halves(codes, false), unsigned_halves(codes, true));
                }
            }
        }
    }
}

// The greatest of 128 scales that count, for all lanes.
static __device__ __forceinline__ float greatest(const uint16_t *scales, Slots slots, int lane) {
    const float4 s = halves4(scales + 4 * lane);
    const float x[4] = {s.x, s.y, s.z, s.w};
    float most = 0;
    for (int i = 0; i < 4; i++)
        if (4 * lane + i >= slots.low && 4 * lane + i < slots.high) most = fmaxf(most, fabsf(x[i]));
    return warp_max(most);
}

// MT: tiles of 16 queries of a block. NG: groups of 32 channels that a warp sums at most.
template <int MT, int NG, int TERMS>
static __global__ void __launch_bounds__(kAttendThreads, MT * NG == 1 ? 3 : 2) attend_tiles(kv_op_attend op, const kv_state *state, Tiles tiles, int row0, PartResults out) {
    begin_kernel();
    constexpr int kTile = 16 * MT;
    KV_DYNAMIC_SHARED(float, shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
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
    const int first = (int)blockIdx.z % tiles.pieces * kTile;
    const int queries = (end - begin) * group - first < kTile ? (end - begin) * group - first : kTile;
    if (queries <= 0) return;
    const TileLayout at(op, kTile);
    float *q = shared + at.q, *factor = shared + at.factor, *score = shared + at.score, *total = shared + at.total, *scale_of = shared + at.scale;
    float *constant = shared + at.constant, *top = shared + at.top, *length = shared + at.length, *keep = shared + at.keep;
    uint32_t *mask = (uint32_t *)(shared + at.mask);
    const int k_dtype = op.cache.k_dtype, v_dtype = op.cache.v_dtype;
    const float scale = op.softcap > 0 ? op.scale / op.softcap : op.scale;
    for (int n = warp; n < kTile; n += kTileWarps) {
        const int row = begin + (first + n) / group, head = kv_head * group + (first + n) % group;
        float *to = q + n * d, most = 0;
        for (int c = lane; c < d; c += 32) to[c] = n < queries ? op.qkv[((int64_t)row * (op.heads + 2 * op.kv_heads) + head) * d + c] * scale : 0.f;
        if (k_dtype == KV_Q8) rotate(to, d, lane);
        float power = 1;
        if (k_dtype == KV_Q8 || k_dtype == KV_F16) {
            for (int c = lane; c < d; c += 32) most = fmaxf(most, fabsf(to[c]));
            power = power_near_one(warp_max(most));
            for (int c = lane; c < d; c += 32) to[c] *= power;
        }
        for (int i = lane; i < KV_PAGE; i += 32) score[n * KV_PAGE + i] = 0;
        for (int c = lane; c < d; c += 32) total[n * d + c] = 0;
        if (lane == 0) scale_of[n] = 1 / power, top[n] = kLowest, length[n] = 0, keep[n] = 0, constant[n] = 0;
    }
    __syncthreads();

    // Where a head has few groups of channels, the warps of a group share the tokens.
    const int groups = d / 32, splits = groups > 2 ? 1 : kTileWarps / groups, my_group = groups > 2 ? warp : warp % groups;
    const int split = groups > 2 ? 0 : warp / groups, tokens_from = KV_PAGE / splits * split, tokens_to = tokens_from + KV_PAGE / splits;
    const int first_pos = state->pos[begin], last_pos = state->pos[end - 1];
    const int own = has_side(op.cache) ? first_pos / KV_PAGE * KV_PAGE : -1;
    const Side side(op.cache, table, kv_head, op.kv_heads, d);
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
            const float low = (kept ? keep[16 * mt + g] : 1.f) * change, high = (kept ? keep[16 * mt + g + 8] : 1.f) * change;
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
                        float *low = total + (16 * mt + g) * d + 32 * group_of_channels + 8 * t, *high = low + 8 * d;
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            low[i] += sum[ng][mt][i][0];
                            low[4 + i] += sum[ng][mt][i][1];
                            high[i] += sum[ng][mt][i][2];
                            high[4 + i] += sum[ng][mt][i][3];
                            sum[ng][mt][i][0] = sum[ng][mt][i][1] = sum[ng][mt][i][2] = sum[ng][mt][i][3] = 0;
                        }
                    }
                }
            __syncthreads();
        }
    };
    auto rotate_total = [&]() {
        for (int n = warp; n < queries; n += kTileWarps) rotate(total + n * d, d, lane);
        __syncthreads();
    };

    for (; page < stop; page++) {
        const int base = table.base[page];
        const char *k = k_of(op.cache, table.page[page], kv_head, d), *v = v_of(op.cache, table.page[page], kv_head, d);
        const Slots all = {slots_of(base, first_pos, op.window).low, slots_of(base, last_pos, op.window).high};
        if (all.low >= all.high) continue;
        const bool coded = k_dtype == KV_Q4 && base != own;          // else, under KV_Q4, the page is exact
        if (coded) {
            prepare_q4<kTile>(PageK4(k, d), d, q, factor, mask, constant);
            __syncthreads();
            for (int n = warp; n < kTile; n += kTileWarps) {
                float most = 0;
                for (int c = lane; c < d; c += 32) most = fmaxf(most, fabsf(factor[n * d + c]));
                const float power = power_near_one(warp_max(most));
                for (int c = lane; c < d; c += 32) factor[n * d + c] *= power;
                if (lane == 0) scale_of[n] = 1 / power;
            }
            __syncthreads();
        }
        const int token0 = 32 * warp;
        if (token0 < all.high && token0 + 32 > all.low) {
            float s[MT][4][4] = {};
            const bool sinks = coded && base == 0 && warp == 0;      // the first block is exact, the second is not
            if (k_dtype == KV_Q8)
                scores_8<MT, TERMS>({k + (int64_t)2 * warp * d * 16, (int64_t)d * 16}, (const uint16_t *)(k + KV_PAGE * d) + 2 * warp * (d / 2), d / 2, d, q, lane, s);
            else if (k_dtype == KV_F16)
                scores_16<F16, MT, TERMS>({k + (int64_t)2 * warp * d * 32, (int64_t)d * 32}, d, q, lane, s);
            else if (coded)
                scores_4<MT, TERMS>({k + (int64_t)2 * warp * d * 8, (int64_t)d * 8}, mask, d, factor, lane, s);
#pragma unroll
            for (int mt = 0; mt < MT; mt++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
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
                scores_16<Bf16, MT, TERMS>({from + (int64_t)2 * warp * d * 32, sinks ? 0 : (int64_t)d * 32}, d, q, lane, exact);
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
                for (int half = 0; half < 2; half++) {
                    const int n = 16 * mt + g + 8 * half;
                    if (n >= queries) continue;
                    float *to = score + n * KV_PAGE + token0 + 8 * t;
                    *(float4 *)to = make_float4(s[mt][0][2 * half], s[mt][1][2 * half], s[mt][2][2 * half], s[mt][3][2 * half]);
                    *(float4 *)(to + 4) = make_float4(s[mt][0][2 * half + 1], s[mt][1][2 * half + 1], s[mt][2][2 * half + 1], s[mt][3][2 * half + 1]);
                }
        }
        __syncthreads();
        for (int n = warp; n < queries; n += kTileWarps) {
            const Slots mine = slots_of(base, state->pos[begin + (first + n) / group], op.window);
            float *of = score + n * KV_PAGE, x[KV_PAGE / 32], most = kLowest;
#pragma unroll
            for (int i = 0; i < KV_PAGE / 32; i++) {
                const int slot = lane + 32 * i;
                x[i] = kLowest;
                if (slot < mine.low || slot >= mine.high) continue;
                x[i] = op.softcap > 0 ? op.softcap * tanhf(of[slot]) : of[slot];
                most = fmaxf(most, x[i]);
            }
            const float before = top[n], now = fmaxf(before, warp_max(most));
            float added = 0;
#pragma unroll
            for (int i = 0; i < KV_PAGE / 32; i++) {
                const int slot = lane + 32 * i;
                const float p = slot < mine.low || slot >= mine.high ? 0.f : expf(x[i] - now);
                of[slot] = p;
                added += p;
            }
            added = warp_sum(added);
            __syncwarp();
            if (lane == 0) {
                keep[n] = length[n] == 0 ? 0.f : expf(before - now);
                length[n] = fmaf(length[n], keep[n], added);
                top[n] = now;
            }
        }
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
            const char *from = !exact ? v : base == own ? side.v_open() : side.v_sinks();
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
                    const int bytes = dtype == KV_Q8 ? KV_PAGE * d : KV_PAGE * d / 2, of_group = dtype == KV_Q8 ? kv_q8_group(d) : kv_q4_group(d);
                    const uint16_t *scales = (const uint16_t *)(from + bytes) + channel / of_group * KV_PAGE;
                    const float near_one = power_near_one(greatest(scales, some, lane));
                    rescale(ng, true, near_one);
                    if (dtype == KV_Q8) {
                        sums_8<MT, TERMS>(from, channel, scales, near_one, tokens_from, tokens_to, score, some, lane, sum[ng]);
                    } else {
                        float rest[MT][2] = {};
                        sums_4<MT, TERMS>(from, channel, scales, scales + d / of_group * KV_PAGE, near_one, tokens_from, tokens_to, score, some, lane, sum[ng], rest);
#pragma unroll
                        for (int mt = 0; mt < MT; mt++)
#pragma unroll
                            for (int half = 0; half < 2; half++) {
                                float r = rest[mt][half];
                                r += __shfl_xor_sync(kAllLanes, r, 1);
                                r += __shfl_xor_sync(kAllLanes, r, 2);
#pragma unroll
                                for (int i = 0; i < 4; i++) sum[ng][mt][i][2 * half] += r, sum[ng][mt][i][2 * half + 1] += r;
                            }
                    }
                } else {
                    if (!exact) rescale(ng, true, 1);
                    if (dtype == KV_F16) sums_16<F16, MT, TERMS>(words, d, tokens_from, tokens_to, score, some, lane, sum[ng]);
                    else sums_16<Bf16, MT, TERMS>(words, d, tokens_from, tokens_to, score, some, lane, sum[ng]);
                }
            }
            if (exact) {
                flush();
                rotate_total();
            }
        }
        __syncthreads();                         // before the next page's scores
    }
    flush();
    const int part = tiles.parts > 1 ? blockIdx.x : 0;
    for (int n = warp; n < queries; n += kTileWarps) {
        const int row = begin + (first + n) / group - row0, head = kv_head * group + (first + n) % group;
        const int64_t slot = out.slot(row, op.heads, head, part);
        for (int c = lane; c < d; c += 32) out.o[slot * d + c] = total[n * d + c];
        if (lane == 0) out.ml[slot] = make_float2(top[n], length[n]);
    }
}

cudaError_t launch_attend_tiles(const kv_op_attend &op, const kv_state *state, const Tiles &t, int row0, const PartResults &results, dim3 grid, cudaStream_t stream) {
    const size_t shared = sizeof(float) * (size_t)TileLayout(op, t.tile).end;
    const bool wide = op.head_dim > 128;
    const auto kernel = t.tile == 32 ? (wide ? attend_tiles<2, 2, 1> : attend_tiles<2, 1, 1>) : (wide ? attend_tiles<1, 2, 2> : attend_tiles<1, 1, 2>);
    return launch_shared(kernel, grid, kAttendThreads, shared, stream, op, state, t, row0, results);
}

}  // namespace kv
