// weight.cuh - the packed weights of page.h as a warp reads them. A tile is what a warp takes of a block of 16 rows with one
// 128-bit load per lane; lane l has rows 4*(l%4)..4*(l%4)+3 of it. dot() adds the products of the lane's columns with a row.
#pragma once
#include "../page.h"
#include "number.cuh"

namespace kv {

// A row of activations as it lies, from a column on.
struct PlainRow {
    const float *x;
    __device__ __forceinline__ PlainRow from(int column) const { return {x + column}; }
    __device__ __forceinline__ float one(int i) const { return x[i]; }
    __device__ __forceinline__ float2 two(int i) const { return *(const float2 *)(x + i); }
    __device__ __forceinline__ float4 four(int i) const { return *(const float4 *)(x + i); }
};
// A row times the weights of an RMSNorm, which leaves a factor of the whole row to be multiplied with at the end.
struct NormedRow {
    const float *x, *w;
    float offset;
    __device__ __forceinline__ NormedRow from(int column) const { return {x + column, w + column, offset}; }
    __device__ __forceinline__ float one(int i) const { return x[i] * (w[i] + offset); }
    __device__ __forceinline__ float2 two(int i) const {
        const float2 a = *(const float2 *)(x + i), b = *(const float2 *)(w + i);
        return make_float2(a.x * (b.x + offset), a.y * (b.y + offset));
    }
    __device__ __forceinline__ float4 four(int i) const {
        const float4 a = *(const float4 *)(x + i), b = *(const float4 *)(w + i);
        return make_float4(a.x * (b.x + offset), a.y * (b.y + offset), a.z * (b.z + offset), a.w * (b.w + offset));
    }
};

// x begins at the tile's first column. dot() for columns below `left` alone, where a tile may reach past the last one.
struct TileF32 {
    static constexpr int kColumns = 8, kBytes = 512;
    struct Data { uint4 v; };
    static __device__ __forceinline__ Data load(const uint8_t *tile, int lane, int) { return {load16(tile + 16 * lane)}; }
    template <class Row> static __device__ __forceinline__ void dot(const Data &d, const Row &x, int lane, int, float *sum) {
        const float f = x.one(lane / 4);
        sum[0] = fmaf(__uint_as_float(d.v.x), f, sum[0]);
        sum[1] = fmaf(__uint_as_float(d.v.y), f, sum[1]);
        sum[2] = fmaf(__uint_as_float(d.v.z), f, sum[2]);
        sum[3] = fmaf(__uint_as_float(d.v.w), f, sum[3]);
    }
};

template <class H> struct TileHalf {
    static constexpr int kColumns = 16, kBytes = 512;
    struct Data { uint4 v; };
    static __device__ __forceinline__ Data load(const uint8_t *tile, int lane, int) { return {load16(tile + 16 * lane)}; }
    template <class Row> static __device__ __forceinline__ void dot(const Data &d, const Row &x, int lane, int, float *sum) {
        const float2 f = x.two(2 * (lane / 4));
        const uint32_t w[4] = {d.v.x, d.v.y, d.v.z, d.v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = fmaf(H::high(w[i]), f.y, fmaf(H::low(w[i]), f.x, sum[i]));
    }
};

struct TileQ8 {
    static constexpr int kColumns = 32, kBytes = KV_Q8_BLOCK;
    struct Data { uint4 v; uint2 scale; };
    static __device__ __forceinline__ Data load(const uint8_t *tile, int lane, int) {
        return {load16(tile + 32 + 16 * lane), load8(tile + 8 * (lane % 4))};
    }
    template <class Row> static __device__ __forceinline__ void dot(const Data &d, const Row &x, int lane, int, float *sum) {
        const float4 f = x.four(4 * (lane / 4));
        const uint32_t w[4] = {d.v.x, d.v.y, d.v.z, d.v.w};
        const float scale[4] = {F16::low(d.scale.x), F16::high(d.scale.x), F16::low(d.scale.y), F16::high(d.scale.y)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float s = signed_byte<0>(w[i]) * f.x;
            s = fmaf(signed_byte<1>(w[i]), f.y, s);
            s = fmaf(signed_byte<2>(w[i]), f.z, s);
            s = fmaf(signed_byte<3>(w[i]), f.w, s);
            sum[i] = fmaf(scale[i], s, sum[i]);
        }
    }
};

// What a lane has of a tile of two blocks of 32 columns: lanes 0 to 15 have the first. `past` the last column it counts nothing.
struct Columns4 {
    bool past;
    float4 f, g;
    float all;                                  // sum of f and g
    template <class Row> __device__ __forceinline__ Columns4(const Row &x, int lane, int left) : past(lane >= 16 && left <= 32) {
        const int from = (past ? 0 : 32 * (lane / 16)) + 8 * (lane % 16 / 4);
        f = x.four(from);
        g = x.four(from + 4);
        all = ((f.x + f.y) + (f.z + f.w)) + ((g.x + g.y) + (g.z + g.w));
    }
    __device__ __forceinline__ uint2 counted(const uint2 &halves) const { return past ? make_uint2(0, 0) : halves; }
    // The nibbles of a row's word, each less `zero`, times the columns. 8 + c/2 is the float that a nibble is made without a subtraction.
    __device__ __forceinline__ float times(uint32_t word, float zero) const {
        const uint32_t low = word << 3 & 0x78787878u, high = word >> 1 & 0x78787878u;
        float s = fmaf(nibble_from_8<0>(low), f.x, -(8 + zero / 2) * all);
        s = fmaf(nibble_from_8<1>(low), f.y, s);
        s = fmaf(nibble_from_8<2>(low), f.z, s);
        s = fmaf(nibble_from_8<3>(low), f.w, s);
        s = fmaf(nibble_from_8<0>(high), g.x, s);
        s = fmaf(nibble_from_8<1>(high), g.y, s);
        s = fmaf(nibble_from_8<2>(high), g.z, s);
        s = fmaf(nibble_from_8<3>(high), g.w, s);
        return s + s;
    }
};

struct TileQ4 {
    static constexpr int kColumns = 64, kBytes = 2 * KV_Q4_BLOCK;
    struct Data { uint4 v; uint2 scale, min; };
    static __device__ __forceinline__ Data load(const uint8_t *tile, int lane, int left) {
        const uint8_t *block = tile + (lane >= 16 && left > 32 ? KV_Q4_BLOCK : 0);     // past the last column: anything
        return {load16(block + 64 + 16 * (lane % 16)), load8(block + 8 * (lane % 4)), load8(block + 32 + 8 * (lane % 4))};
    }
    template <class Row> static __device__ __forceinline__ void dot(const Data &d, const Row &x, int lane, int left, float *sum) {
        const Columns4 columns(x, lane, left);
        const uint2 scales = columns.counted(d.scale), mins = columns.counted(d.min);
        const uint32_t w[4] = {d.v.x, d.v.y, d.v.z, d.v.w};
        const float scale[4] = {F16::low(scales.x), F16::high(scales.x), F16::low(scales.y), F16::high(scales.y)};
        const float min[4] = {F16::low(mins.x), F16::high(mins.x), F16::low(mins.y), F16::high(mins.y)};
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = fmaf(scale[i], columns.times(w[i], 0), fmaf(min[i], columns.all, sum[i]));
    }
};

// The same without a minimum: nibbles less 8 are the digits.
struct TileQ4S {
    static constexpr int kColumns = 64, kBytes = 2 * KV_Q4S_BLOCK;
    struct Data { uint4 v; uint2 scale; };
    static __device__ __forceinline__ Data load(const uint8_t *tile, int lane, int left) {
        const uint8_t *block = tile + (lane >= 16 && left > 32 ? KV_Q4S_BLOCK : 0);
        return {load16(block + 32 + 16 * (lane % 16)), load8(block + 8 * (lane % 4))};
    }
    template <class Row> static __device__ __forceinline__ void dot(const Data &d, const Row &x, int lane, int left, float *sum) {
        const Columns4 columns(x, lane, left);
        const uint2 scales = columns.counted(d.scale);
        const uint32_t w[4] = {d.v.x, d.v.y, d.v.z, d.v.w};
        const float scale[4] = {F16::low(scales.x), F16::high(scales.x), F16::low(scales.y), F16::high(scales.y)};
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = fmaf(scale[i], columns.times(w[i], 8), sum[i]);
    }
};

// Bytes of a block of 16 rows with k columns.
static __host__ __device__ __forceinline__ int64_t weight_block_bytes(int dtype, int64_t k) {
    switch (dtype) {
    case KV_F32: return k * 64;
    case KV_Q8: return k / KV_GROUP * KV_Q8_BLOCK;
    case KV_Q4: return k / KV_GROUP * KV_Q4_BLOCK;
    case KV_Q4S: return k / KV_GROUP * KV_Q4S_BLOCK;
    default: return k * 32;
    }
}

// The pair of values in columns c, c+1 (c even) of a row.
static __device__ __forceinline__ float2 weight_pair(const kv_weight &w, int64_t row, int c) {
    const int lane = (int)(row % KV_LANES);
    const uint8_t *block = (const uint8_t *)w.data + row / KV_LANES * weight_block_bytes(w.dtype, w.k);
    switch (w.dtype) {
    case KV_F32: {
        const float *at = (const float *)block + (int64_t)c * KV_LANES + lane;
        return make_float2(at[0], at[KV_LANES]);
    }
    case KV_Q8: {
        const uint8_t *unit = block + (int64_t)(c / KV_GROUP) * KV_Q8_BLOCK;
        const float scale = f16_to_f32(((const uint16_t *)unit)[lane]);
        const int i = c % KV_GROUP;
        const int8_t *q = (const int8_t *)unit + 32 + 64 * (i / 4) + 4 * lane + i % 4;
        return make_float2(scale * q[0], scale * q[1]);
    }
    case KV_Q4: {
        const uint8_t *unit = block + (int64_t)(c / KV_GROUP) * KV_Q4_BLOCK;
        const float scale = f16_to_f32(((const uint16_t *)unit)[lane]), min = f16_to_f32(((const uint16_t *)unit)[16 + lane]);
        const int i = c % KV_GROUP, shift = i % 8 / 4 * 4;
        const uint8_t *q = unit + 64 + 64 * (i / 8) + 4 * lane + i % 4;
        return make_float2(scale * (q[0] >> shift & 15) + min, scale * (q[1] >> shift & 15) + min);
    }
    case KV_Q4S: {
        const uint8_t *unit = block + (int64_t)(c / KV_GROUP) * KV_Q4S_BLOCK;
        const float scale = f16_to_f32(((const uint16_t *)unit)[lane]);
        const int i = c % KV_GROUP, shift = i % 8 / 4 * 4;
        const uint8_t *q = unit + 32 + 64 * (i / 8) + 4 * lane + i % 4;
        return make_float2(scale * ((q[0] >> shift & 15) - 8), scale * ((q[1] >> shift & 15) - 8));
    }
    default: {
        const uint32_t word = ((const uint32_t *)block)[(int64_t)(c / 2) * KV_LANES + lane];
        return w.dtype == KV_BF16 ? make_float2(Bf16::low(word), Bf16::high(word)) : make_float2(F16::low(word), F16::high(word));
    }
    }
}

}  // namespace kv
