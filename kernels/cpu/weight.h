// weight.h - the packed weight formats of page.h as vectors: what decode, the prefill panels and no one else read.
// A unit is 32 columns of a block of 16 rows. pairs(unit, f) calls f(column, even, odd) for columns 0,1 to 30,31 (in the
// order that suits the format) with 16 rows in the lanes; value = step(unit)*digit (+ min(unit)) in scaled formats.
// quads(unit, f), of scaled formats (AVX2 and up), calls f(q, w) with columns 4q..4q+3 as unsigned bytes of one word a row;
// value = scale(unit)*(byte - OFFSET) (+ min(unit)).
#pragma once
#include "../page.h"
#include "digits.h"

namespace KV_NS {

struct WeightF32 {
    static constexpr int64_t UNIT = KV_GROUP * 64;
    static constexpr bool SCALED = false, MIN = false;
    template <class F> static KV_INLINE void pairs(const uint8_t *unit, F f) {
#pragma GCC unroll 16
        for (int c = 0; c < KV_GROUP; c += 2) f(c, load((const float *)(unit + 64 * c)), load((const float *)(unit + 64 * c + 64)));
    }
};

struct WeightF16 {
    static constexpr int64_t UNIT = KV_GROUP * 32;
    static constexpr bool SCALED = false, MIN = false;
    template <class F> static KV_INLINE void pairs(const uint8_t *unit, F f) {
#pragma GCC unroll 16
        for (int c = 0; c < KV_GROUP; c += 2) {
            f32x16 even, odd;
            load_f16_pairs((const uint16_t *)(unit + 32 * c), even, odd);
            f(c, even, odd);
        }
    }
};

struct WeightBF16 {
    static constexpr int64_t UNIT = KV_GROUP * 32;
    static constexpr bool SCALED = false, MIN = false;
    template <class F> static KV_INLINE void pairs(const uint8_t *unit, F f) {
#pragma GCC unroll 16
        for (int c = 0; c < KV_GROUP; c += 2) {
            f32x16 even, odd;
            load_bf16_pairs((const uint16_t *)(unit + 32 * c), even, odd);
            f(c, even, odd);
        }
    }
};

struct WeightQ8 {
    static constexpr int64_t UNIT = KV_Q8_BLOCK;
    static constexpr bool SCALED = true, MIN = false;
    static constexpr int OFFSET = 128;
    static KV_INLINE f32x16 scale(const uint8_t *unit) { return load_f16((const uint16_t *)unit); }
    static KV_INLINE f32x16 step(const uint8_t *unit) { return scale(unit) * splat(0x1p-24f); }
    template <class F> static KV_INLINE void pairs(const uint8_t *unit, F f) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            u32x16 q = load_words(unit + 32 + 64 * j);
            f(4 * j, byte_2p24<0>(q), byte_2p24<1>(q));
            f(4 * j + 2, byte_2p24<2>(q), byte_2p24<3>(q));
        }
    }
#if defined(__AVX2__)
    template <class F> static KV_INLINE void quads(const uint8_t *unit, F f) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) f(j, flip_signs(load_words(unit + 32 + 64 * j)));
    }
#endif
};

// 32 columns of nibbles, which lie alike in both formats of 4 bits; a pair's digit is the nibble less ZERO.
template <int ZERO, class F> static KV_INLINE void nibble_pairs(const uint8_t *words, F f) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        u32x16 q = load_words(words + 64 * j);
        f(8 * j, nibble<0, ZERO>(q), nibble<2, ZERO>(q));
        f(8 * j + 2, nibble<4, ZERO>(q), nibble<6, ZERO>(q));
        f(8 * j + 4, nibble<1, ZERO>(q), nibble<3, ZERO>(q));
        f(8 * j + 6, nibble<5, ZERO>(q), nibble<7, ZERO>(q));
    }
}
#if defined(__AVX2__)
template <class F> static KV_INLINE void nibble_quads(const uint8_t *words, F f) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        u32x16 q = load_words(words + 64 * j);
        f(2 * j, low_nibbles(q));
        f(2 * j + 1, high_nibbles(q));
    }
}
#endif

struct WeightQ4 {
    static constexpr int64_t UNIT = KV_Q4_BLOCK;
    static constexpr bool SCALED = true, MIN = true;
    static constexpr int OFFSET = 0;
    static KV_INLINE f32x16 scale(const uint8_t *unit) { return load_f16((const uint16_t *)unit); }
    static KV_INLINE f32x16 step(const uint8_t *unit) { return scale(unit); }
    static KV_INLINE f32x16 min(const uint8_t *unit) { return load_f16((const uint16_t *)(unit + 32)); }
    template <class F> static KV_INLINE void pairs(const uint8_t *unit, F f) { nibble_pairs<0>(unit + 64, f); }
#if defined(__AVX2__)
    template <class F> static KV_INLINE void quads(const uint8_t *unit, F f) { nibble_quads(unit + 64, f); }
#endif
};

struct WeightQ4S {
    static constexpr int64_t UNIT = KV_Q4S_BLOCK;
    static constexpr bool SCALED = true, MIN = false;
    static constexpr int OFFSET = 8;
    static KV_INLINE f32x16 scale(const uint8_t *unit) { return load_f16((const uint16_t *)unit); }
    static KV_INLINE f32x16 step(const uint8_t *unit) { return scale(unit); }
    template <class F> static KV_INLINE void pairs(const uint8_t *unit, F f) { nibble_pairs<OFFSET>(unit + 32, f); }
#if defined(__AVX2__)
    template <class F> static KV_INLINE void quads(const uint8_t *unit, F f) { nibble_quads(unit + 32, f); }
#endif
};

// Calls f(WeightXX{}) for the format of w; dtype is one that kv_pack_bytes knows.
template <class F> static KV_INLINE void with_format(int32_t dtype, F f) {
    switch (dtype) {
        case KV_F32: f(WeightF32{}); break;
        case KV_F16: f(WeightF16{}); break;
        case KV_BF16: f(WeightBF16{}); break;
        case KV_Q8: f(WeightQ8{}); break;
        case KV_Q4: f(WeightQ4{}); break;
        case KV_Q4S: f(WeightQ4S{}); break;
        default: break;
    }
}

}  // namespace KV_NS
