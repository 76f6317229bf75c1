// attend_v.cuh - weighted sums of V of a page, from V as page.h lays it out.
//
// Whatever the format, V is 32-bit words with a few tokens of one channel in each, at least 16 channels side by side. A thread has a quad
// of channels and takes 128-bit loads of words first, first + step, ...; weight: [NQ][128] in shared memory. Slots outside
// [low, high) may hold anything and are left out.
#pragma once
#include "number.cuh"
#include "pages.cuh"

namespace kv {

// sum[NQ][4] += weight[first token + i] * value[channel][i], i < TOKENS.
template <int NQ, int TOKENS>
static __device__ __forceinline__ void add_tokens(float (*value)[TOKENS], const float *weight, int token, Slots slots, float (*sum)[4]) {
    if (token < slots.low || token + TOKENS > slots.high)
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int i = 0; i < TOKENS; i++)
                if (token + i < slots.low || token + i >= slots.high) value[c][i] = 0;
#pragma unroll
    for (int n = 0; n < NQ; n++) {
        float w[TOKENS];
#pragma unroll
        for (int i = 0; i < TOKENS; i += 2) {
            const float2 pair = *(const float2 *)(weight + n * KV_PAGE + token + i);
            w[i] = pair.x;
            w[i + 1] = pair.y;
        }
#pragma unroll
        for (int c = 0; c < 4; c++)
#pragma unroll
            for (int i = 0; i < TOKENS; i++) sum[n][c] = fmaf(w[i], value[c][i], sum[n][c]);
    }
}

template <class H, int NQ>
static __device__ __forceinline__ void sums_half(const char *v, int dim, int quad, int first, int step, const float *weight, Slots slots, float (*sum)[4]) {
    const int end = (slots.high + 1) / 2;
    first += (slots.low / 2 > first ? (slots.low / 2 - first + step - 1) / step : 0) * step;
#pragma unroll 4
    for (int j = first; j < end; j += step) {
        const uint4 d = load16(v + ((int64_t)j * dim + 4 * quad) * 4);
        float value[4][2] = {{H::low(d.x), H::high(d.x)}, {H::low(d.y), H::high(d.y)}, {H::low(d.z), H::high(d.z)}, {H::low(d.w), H::high(d.w)}};
        add_tokens<NQ, 2>(value, weight, 2 * j, slots, sum);
    }
}

template <int NQ>
static __device__ __forceinline__ void sums_f32(const char *v, int dim, int quad, int first, int step, const float *weight, Slots slots, float (*sum)[4]) {
    for (int j = first; j < (slots.high + 1) / 2; j += step) {
        const char *at = v + ((int64_t)j * dim + 4 * quad) * 8;
        const float4 a = *(const float4 *)at, b = *(const float4 *)(at + 16);
        float value[4][2] = {{a.x, a.y}, {a.z, a.w}, {b.x, b.y}, {b.z, b.w}};
        add_tokens<NQ, 2>(value, weight, 2 * j, slots, sum);
    }
}

template <int NQ>
static __device__ __forceinline__ void sums_q8(const char *v, int dim, int quad, int first, int step, const float *weight, Slots slots, float (*sum)[4]) {
    const uint16_t *scales = (const uint16_t *)(v + KV_PAGE * dim) + 4 * quad / kv_q8_group(dim) * KV_PAGE;
#pragma unroll 2
    for (int j = first; j < (slots.high + 3) / 4; j += step) {
        const uint4 d = load16(v + kv_v8_index(4 * j, 4 * quad));
        const uint2 s = load8(scales + 4 * j);
        const float scale[4] = {F16::low(s.x), F16::high(s.x), F16::low(s.y), F16::high(s.y)};
        const uint32_t w[4] = {d.x, d.y, d.z, d.w};
        float value[4][4];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            value[c][0] = scale[0] * signed_byte<0>(w[c]);
            value[c][1] = scale[1] * signed_byte<1>(w[c]);
            value[c][2] = scale[2] * signed_byte<2>(w[c]);
            value[c][3] = scale[3] * signed_byte<3>(w[c]);
        }
        add_tokens<NQ, 4>(value, weight, 4 * j, slots, sum);
    }
}

template <int NQ>
static __device__ __forceinline__ void sums_q4(const char *v, int dim, int quad, int first, int step, const float *weight, Slots slots, float (*sum)[4]) {
    const int groups = dim / kv_q4_group(dim);
    const uint16_t *scales = (const uint16_t *)(v + KV_PAGE * dim / 2) + 4 * quad / kv_q4_group(dim) * KV_PAGE, *zeros = scales + groups * KV_PAGE;
    for (int j = first; j < (slots.high + 7) / 8; j += step) {
        const uint4 d = load16(v + kv_v4_index(8 * j, 4 * quad));
        const uint32_t w[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
        for (int half = 0; half < 2; half++) {                     // low nibbles: four tokens, high ones: the next four
            const uint2 s = load8(scales + 8 * j + 4 * half), z = load8(zeros + 8 * j + 4 * half);
            const float scale[4] = {F16::low(s.x), F16::high(s.x), F16::low(s.y), F16::high(s.y)};
            const float zero[4] = {F16::low(z.x), F16::high(z.x), F16::low(z.y), F16::high(z.y)};
            float value[4][4];
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const uint32_t codes = w[c] >> 4 * half & 0x0f0f0f0fu;
                value[c][0] = fmaf(scale[0], unsigned_byte<0>(codes), zero[0]);
                value[c][1] = fmaf(scale[1], unsigned_byte<1>(codes), zero[1]);
                value[c][2] = fmaf(scale[2], unsigned_byte<2>(codes), zero[2]);
                value[c][3] = fmaf(scale[3], unsigned_byte<3>(codes), zero[3]);
            }
            add_tokens<NQ, 4>(value, weight, 8 * j + 4 * half, slots, sum);
        }
    }
}

}  // namespace kv
