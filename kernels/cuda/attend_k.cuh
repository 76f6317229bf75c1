// attend_k.cuh - scores of a block of 16 tokens, by one warp, from K as page.h lays it out.
//
// Whatever the format, a block is [words][16 tokens] of 32-bit words with a few channels of one token in each. A lane takes
// one 128-bit load at a time: word lane/4 of the next eight, tokens 4*(lane%4)..4*(lane%4)+3. q: [NQ][q_stride] in shared
// memory; score[NQ][4]: sums of the lane's words, added up over the lanes by the caller.
#pragma once
#include "number.cuh"
#include "pages.cuh"

namespace kv {

template <class H, int NQ>
static __device__ __forceinline__ void scores_half(const char *block, int dim, const float *q, int lane, float (*score)[4]) {
#pragma unroll 4
    for (int j = lane / 4; j < dim / 2; j += 8) {
        const uint4 v = load16(block + (j * 16 + 4 * (lane % 4)) * 4);
#pragma unroll
        for (int n = 0; n < NQ; n++) {
            const float2 f = *(const float2 *)(q + n * dim + 2 * j);
            score[n][0] = fmaf(H::high(v.x), f.y, fmaf(H::low(v.x), f.x, score[n][0]));
            score[n][1] = fmaf(H::high(v.y), f.y, fmaf(H::low(v.y), f.x, score[n][1]));
            score[n][2] = fmaf(H::high(v.z), f.y, fmaf(H::low(v.z), f.x, score[n][2]));
            score[n][3] = fmaf(H::high(v.w), f.y, fmaf(H::low(v.w), f.x, score[n][3]));
        }
    }
}

// Two words a pair of channels, so a lane's four tokens are two loads.
template <int NQ>
static __device__ __forceinline__ void scores_f32(const char *block, int dim, const float *q, int lane, float (*score)[4]) {
    for (int j = lane / 4; j < dim / 2; j += 8) {
        const float4 a = *(const float4 *)(block + (j * 16 + 4 * (lane % 4)) * 8), b = *(const float4 *)(block + (j * 16 + 4 * (lane % 4) + 2) * 8);
#pragma unroll
        for (int n = 0; n < NQ; n++) {
            const float2 f = *(const float2 *)(q + n * dim + 2 * j);
            score[n][0] = fmaf(a.y, f.y, fmaf(a.x, f.x, score[n][0]));
            score[n][1] = fmaf(a.w, f.y, fmaf(a.z, f.x, score[n][1]));
            score[n][2] = fmaf(b.y, f.y, fmaf(b.x, f.x, score[n][2]));
            score[n][3] = fmaf(b.w, f.y, fmaf(b.z, f.x, score[n][3]));
        }
    }
}

// Sum over four channels or pairs of a word: bytes b0..b3 with factors f.
template <bool SIGNED>
static __device__ __forceinline__ float byte_products(uint32_t word, const float4 &f) {
    float s;
    if (SIGNED) {
        s = signed_byte<0>(word) * f.x;
        s = fmaf(signed_byte<1>(word), f.y, s);
        s = fmaf(signed_byte<2>(word), f.z, s);
        return fmaf(signed_byte<3>(word), f.w, s);
    }
    s = unsigned_byte<0>(word) * f.x;
    s = fmaf(unsigned_byte<1>(word), f.y, s);
    s = fmaf(unsigned_byte<2>(word), f.z, s);
    return fmaf(unsigned_byte<3>(word), f.w, s);
}

// scales: f16 [dim/group][16] of the block.
template <int NQ>
static __device__ __forceinline__ void scores_q8(const char *block, const uint16_t *scales, int dim, const float *q, int lane, float (*score)[4]) {
    const int group = kv_q8_group(dim);
#pragma unroll 4
    for (int j = lane / 4; j < dim / 4; j += 8) {
        const uint4 v = load16(block + (j * 16 + 4 * (lane % 4)) * 4);
        const uint2 s = load8(scales + 4 * j / group * KV_LANES + 4 * (lane % 4));
#pragma unroll
        for (int n = 0; n < NQ; n++) {
            const float4 f = *(const float4 *)(q + n * dim + 4 * j);
            score[n][0] = fmaf(F16::low(s.x), byte_products<true>(v.x, f), score[n][0]);
            score[n][1] = fmaf(F16::high(s.x), byte_products<true>(v.y, f), score[n][1]);
            score[n][2] = fmaf(F16::low(s.y), byte_products<true>(v.z, f), score[n][2]);
            score[n][3] = fmaf(F16::high(s.y), byte_products<true>(v.w, f), score[n][3]);
        }
    }
}

// A Q4 page's scales make q into factors of the codes as they lie in the bytes: word j of four pairs has the factors
// factor[n][8j..8j+3] of its high codes, which are not shifted down, and [8j+4..8j+7] of the low ones, those in mask[j].
template <int NQ>
static __device__ __forceinline__ void scores_q4(const char *block, const uint32_t *mask, int dim, const float *factor, int lane, float (*score)[4]) {
#pragma unroll 2
    for (int j = lane / 4; j < dim / 8; j += 8) {
        const uint4 v = load16(block + (j * 16 + 4 * (lane % 4)) * 4);
        const uint32_t low = mask[j], w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int n = 0; n < NQ; n++) {
            const float4 f = *(const float4 *)(factor + n * dim + 8 * j), g = *(const float4 *)(factor + n * dim + 8 * j + 4);
#pragma unroll
            for (int t = 0; t < 4; t++) score[n][t] += byte_products<false>(w[t] & ~low, f) + byte_products<false>(w[t] & low, g);
        }
    }
}

// What follows the codes of one head's Q4 page of K.
struct PageK4 {
    const uint16_t *scale, *zero;
    const uint8_t *chan, *split;
    __device__ __forceinline__ PageK4(const char *behind_codes, int dim)
        : scale((const uint16_t *)behind_codes), zero(scale + dim), chan((const uint8_t *)(zero + dim)), split(chan + dim) {}
};

// factor[NQ][dim], mask[dim/8] and constant[NQ] (the sum of zero*q) of a page, by all threads of the block; barriers are the caller's.
template <int NQ>
static __device__ __forceinline__ void prepare_q4(const PageK4 &page, int dim, const float *q, float *factor, uint32_t *mask, float *constant) {
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < dim / 2; i += blockDim.x) {
        const int shift = 8 - page.split[i], high = page.chan[2 * i], low = page.chan[2 * i + 1];
        const float a = f16_to_f32(page.scale[high]) / (float)(1 << shift), b = f16_to_f32(page.scale[low]);
        ((uint8_t *)mask)[i] = (uint8_t)((1 << shift) - 1);
        float *to = factor + i / 4 * 8 + i % 4;
        for (int n = 0; n < NQ; n++) {
            to[n * dim] = a * q[n * dim + high];
            to[n * dim + 4] = b * q[n * dim + low];
        }
    }
    for (int n = threadIdx.x / 32; n < NQ; n += blockDim.x / 32) {
        float sum = 0;
        for (int c = lane; c < dim; c += 32) sum = fmaf(f16_to_f32(page.zero[c]), q[n * dim + c], sum);
        for (int with = 16; with > 0; with /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, with);
        if (lane == 0) constant[n] = sum;
    }
}

}  // namespace kv
