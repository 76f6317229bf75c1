// attend_tiles.cuh - scores and weighted sums of a page on the tensor cores, by one warp: cached words become operands as they
// are loaded. MT: tiles of 16 queries. TERMS: of the operands that are made from floats, HALF: their terms share one operand, for 8 queries (mma.cuh).
#pragma once
#include "attend.cuh"
#include "operands.cuh"
#include "stage.cuh"

namespace kv {

// Scores of 32 tokens by a warp: sum[mt][i] is operand D whose column c is token 4c + i. Words j of the tokens' blocks are at
// k (tokens 0 to 15) and k + stride (the others).
struct TokenBlocks {
    const char *k;
    int64_t stride;
    __device__ __forceinline__ uint4 words(int j, int lane) const {
        const int g = lane / 4;
        return load16(k + g / 4 * stride + (j * 16 + 4 * (g % 4)) * 4);
    }
    // Words 4s + lane%4 in turn s.
    __device__ __forceinline__ Words quads(int lane) const {
        const int g = lane / 4;
        return {k + g / 4 * stride + (lane % 4 * 16 + 4 * (g % 4)) * 4, 256};
    }
};
// The same of 32 channels of V of a quantized page, from the first of them and `token` on: 16 tokens of Q8 in a turn, 32 of Q4.
static __device__ __forceinline__ Words quads_of_v(const char *v, int dtype, int channel, int token, int lane) {
    const int g = lane / 4, t = lane % 4;
    return {v + (dtype == KV_Q8 ? kv_v8_index(token + 4 * t, channel + 4 * g) : kv_v4_index(token + 8 * t, channel + 4 * g)), 256};
}

// q: PackedRows or LooseRows.
template <int MT, bool HALF, class Rows>
static __device__ __forceinline__ void scores_16(const TokenBlocks &k, int dim, const Rows &q, int lane, float (*sum)[4][4]) {
    const int t = lane % 4;
#pragma unroll 1
    for (int s = 0; s < dim / 16; s++) {
        const uint4 low = k.words(8 * s + t, lane), high = k.words(8 * s + 4 + t, lane);
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            const auto a = q.at(mt, s, lane);
            a.multiply(sum[mt][0], low.x, high.x);
            a.multiply(sum[mt][1], low.y, high.y);
            a.multiply(sum[mt][2], low.z, high.z);
            a.multiply(sum[mt][3], low.w, high.w);
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * MT; i++) add_terms<HALF>(sum[i / 4][i % 4]);
}

// k: the words that quads() gives. scales: f16 [dim/32][16] of the first block of tokens, those of the other one scale_stride further.
template <int MT, int TERMS, bool HALF>
static __device__ __forceinline__ void scores_8(const Words &k, const uint16_t *scales, int scale_stride, int dim, const PackedRows<F16, TERMS, HALF> &q,
                                                int lane, float (*sum)[4][4]) {
    const int t = lane % 4;
    for (int group = 0; group < dim / 32; group++) {
        float part[MT][4][4] = {};
#pragma unroll
        for (int s = 2 * group; s < 2 * group + 2; s++) {
            const uint4 v = k(s);
            const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                const auto a = q.at(mt, s, lane);
#pragma unroll
                for (int i = 0; i < 4; i++) a.multiply(part[mt][i], signed_halves(w[i], false), signed_halves(w[i], true));
            }
        }
        // Columns 2t and 2t + 1 of all four are tokens 8t..8t+7.
        const uint4 s = load16(scales + t / 2 * scale_stride + group * KV_LANES + t % 2 * 8);
        const float scale[2][4] = {{F16::low(s.x), F16::high(s.x), F16::low(s.y), F16::high(s.y)},
                                   {F16::low(s.z), F16::high(s.z), F16::low(s.w), F16::high(s.w)}};
#pragma unroll
        for (int mt = 0; mt < MT; mt++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                add_terms<HALF>(part[mt][i]);
#pragma unroll
                for (int c = 0; c < (HALF ? 2 : 4); c++) sum[mt][i][c] = fmaf(scale[c % 2][i], part[mt][i][c], sum[mt][i][c]);
            }
    }
}

// k: the words that quads() gives. factor and mask as prepare_q4 makes them.
template <int MT, int TERMS, bool HALF>
static __device__ __forceinline__ void scores_4(const Words &k, const uint32_t *mask, int dim, const PackedRows<F16, TERMS, HALF> &factor, int lane,
                                                float (*sum)[4][4]) {
    const int t = lane % 4;
    for (int s = 0; s < dim / 32; s++) {
        const uint4 v = k(s);
        const uint32_t w[4] = {v.x, v.y, v.z, v.w}, low = mask[4 * s + t];
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            const auto high_codes = factor.at(mt, 2 * s, lane), low_codes = factor.at(mt, 2 * s + 1, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                high_codes.multiply(sum[mt][i], unsigned_halves(w[i] & ~low, false), unsigned_halves(w[i] & ~low, true));
                low_codes.multiply(sum[mt][i], unsigned_halves(w[i] & low, false), unsigned_halves(w[i] & low, true));
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * MT; i++) add_terms<HALF>(sum[i / 4][i % 4]);
}

// 0xffff in each half of a word of two tokens that are in [low, high).
static __device__ __forceinline__ uint32_t inside(int token, Slots slots) {
    return (token >= slots.low && token < slots.high ? 0xffffu : 0u) |
           (token + 1 >= slots.low && token + 1 < slots.high ? 0xffff0000u : 0u);
}

// Weighted sums of 32 channels by a warp: sum[mt][i] is operand D whose column c is channel 4c + i. v: of a 16-bit page word 0
// of the first of them, a word row having `dim` words; of a quantized one the words that quads_of_v() gives from `from` on.
// Tokens [from, to), multiples of 32, of which those in `slots` count. weight: PackedRows or LooseRows, of floats [tile][stride].
template <int MT, class Rows>
static __device__ __forceinline__ void sums_16(const char *v, int dim, int from, int to, const Rows &weight, Slots slots, int lane, float (*sum)[4][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int s = from / 16; s < to / 16; s++) {
        if (16 * s >= slots.high || 16 * s + 16 <= slots.low) continue;
        uint4 low = load16(v + ((int64_t)(8 * s + t) * dim + 4 * g) * 4);
        uint4 high = load16(v + ((int64_t)(8 * s + 4 + t) * dim + 4 * g) * 4);
        if (16 * s < slots.low || 16 * s + 16 > slots.high) {
            const uint32_t a = inside(16 * s + 2 * t, slots), b = inside(16 * s + 8 + 2 * t, slots);
            low = make_uint4(low.x & a, low.y & a, low.z & a, low.w & a);
            high = make_uint4(high.x & b, high.y & b, high.z & b, high.w & b);
        }
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            const auto a = weight.at(mt, s, lane);
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

// x for the four tokens from `token` on, zero for those that do not count.
static __device__ __forceinline__ float4 counted(const float4 &x, int token, Slots slots) {
    return make_float4(token >= slots.low && token < slots.high ? x.x : 0.f, token + 1 >= slots.low && token + 1 < slots.high ? x.y : 0.f,
                       token + 2 >= slots.low && token + 2 < slots.high ? x.z : 0.f, token + 3 >= slots.low && token + 3 < slots.high ? x.w : 0.f);
}

// p*scale for four tokens; p is a number for every token of a page.
static __device__ __forceinline__ float4 folded(const float *p, const float4 &scale) {
    const float4 x = *(const float4 *)p;
    return make_float4(x.x * scale.x, x.y * scale.y, x.z * scale.z, x.w * scale.w);
}
static __device__ __forceinline__ float dot(const float *p, const float4 &y) {
    const float4 x = *(const float4 *)p;
    return fmaf(x.x, y.x, x.y * y.y) + fmaf(x.z, y.z, x.w * y.w);
}

template <int TERMS, bool HALF> static __device__ __forceinline__ void set_rows(OperandA<F16, TERMS, HALF> &a, const float4 &first, const float4 &second) {
    a.set(0, first.x, first.y);
    a.set(1, second.x, second.y);
    a.set(2, first.z, first.w);
    a.set(3, second.z, second.w);
}

// scales: f16 [128] of these channels; `unit`: brings them near 1.
template <int MT, int TERMS, bool HALF>
static __device__ __forceinline__ void sums_8(const Words &v, const uint16_t *scales, float unit, int from, int to,
                                              const float *weight, int stride, Slots slots, int lane, float (*sum)[4][4]) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int s = from / 16; s < to / 16; s++) {
        if (16 * s >= slots.high || 16 * s + 16 <= slots.low) continue;
        const int token = 16 * s + 4 * t;
        const uint4 d = v(s - from / 16);
        const uint32_t w[4] = {d.x, d.y, d.z, d.w};
        const float4 f = counted(halves4(scales + token), token, slots), scale = make_float4(f.x * unit, f.y * unit, f.z * unit, f.w * unit);
#pragma unroll
        for (int mt = 0; mt < MT; mt++) {
            OperandA<F16, TERMS, HALF> a;
            const float *p = weight + (16 * mt + g) * stride + token;
            set_rows(a, folded(p, scale), folded(HALF ? p : p + 8 * stride, scale));
#pragma unroll
            for (int i = 0; i < 4; i++) a.multiply(sum[mt][i], signed_halves(w[i], false), signed_halves(w[i], true));
        }
    }
}

// As sums_8; zeros: f16 [128]. What they add to each channel of rows g and g + 8 goes to rest[mt][2], in parts by lane.
template <int MT, int TERMS, bool HALF>
static __device__ __forceinline__ void sums_4(const Words &v, const uint16_t *scales, const uint16_t *zeros, float unit,
                                              int from, int to, const float *weight, int stride, Slots slots, int lane, float (*sum)[4][4], float (*rest)[2]) {
    const int g = lane / 4, t = lane % 4;
    for (int s = from / 32; s < to / 32; s++) {
        if (32 * s >= slots.high || 32 * s + 32 <= slots.low) continue;
        const uint4 d = v(s - from / 32);
        const uint32_t w[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
        for (int half = 0; half < 2; half++) {                       // low nibbles: four tokens, high ones: the next four
            const int token = 32 * s + 8 * t + 4 * half;
            const float4 f = counted(halves4(scales + token), token, slots), zero = counted(halves4(zeros + token), token, slots);
            const float4 scale = make_float4(f.x * unit, f.y * unit, f.z * unit, f.w * unit);
#pragma unroll
            for (int mt = 0; mt < MT; mt++) {
                OperandA<F16, TERMS, HALF> a;
                const float *p = weight + (16 * mt + g) * stride + token;
                set_rows(a, folded(p, scale), folded(HALF ? p : p + 8 * stride, scale));
                rest[mt][0] += dot(p, zero);
                if (!HALF) rest[mt][1] += dot(p + 8 * stride, zero);
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

}  // namespace kv
