// digits.h - products of weights in bytes with activations in 16 bits, in integers: exact, so that the same sums come out
// with every instruction set. 32 activations share a scale: their largest magnitude becomes LARGEST. In 8 bits, SmolLM2-135M's
// decoded rows were 2.7e-3 in mean KL divergence from float32; in 16 they are 4e-7.
#pragma once
#include "simd.h"

#if defined(__AVX2__)

namespace KV_NS {

static constexpr int LARGEST = 127 * 256 + 127;  // splits into two signed bytes

// A group of activations as integers, and what makes them values again: x = scale*digit.
struct Group {
    char digit[64];    // with VNNI int8 high[32], low[32], digit = 256*high + low; else int16, columns 4q..4q+3 in the order 0 2 1 3
    float scale, sum;  // sum: scale times the sum of the digits
    int32_t start;     // what their sum with unsigned bytes starts from, where these are to be less an offset
};

#if defined(__AVX512F__)

static inline u32x16 low_nibbles(u32x16 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
static inline u32x16 high_nibbles(u32x16 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
static inline u32x16 flip_signs(u32x16 a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8((char)0x80))}; }

static inline float largest_magnitude(f32x16 a, f32x16 b) {  // as integers, where NaN is above all
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    return kv::bits_f32((uint32_t)_mm512_reduce_max_epi32(_mm512_max_epi32(
        _mm512_and_si512(_mm512_castps_si512(a.v), mask), _mm512_and_si512(_mm512_castps_si512(b.v), mask))));
}

// Rounds a and b, stores them as digits [part*16, part*16 + 16) and returns their sums.
static inline __m512i store_digits(Group &to, int part, f32x16 x) {
    const __m512i n = _mm512_cvtps_epi32(x.v);
#if defined(__AVX512VNNI__)
    _mm_storeu_si128((__m128i *)to.digit + part, _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8)));
    _mm_storeu_si128((__m128i *)to.digit + 2 + part, _mm512_cvtepi32_epi8(n));
#else
    _mm256_storeu_si256((__m256i *)to.digit + part, _mm512_cvtepi32_epi16(_mm512_shuffle_epi32(n, (_MM_PERM_ENUM)0xd8)));
#endif
    return n;
}
static inline int32_t store_digits(Group &to, f32x16 a, f32x16 b) {
    return _mm512_reduce_add_epi32(_mm512_add_epi32(store_digits(to, 0, a), store_digits(to, 1, b)));
}

// The sum of byte * digit over the columns of a group, for 16 weight rows.
struct DigitSum {
#if defined(__AVX512VNNI__)
    __m512i high, low;
    KV_INLINE void start(int32_t value) { high = _mm512_setzero_si512(), low = _mm512_set1_epi32(value); }
    KV_INLINE void add(u32x16 w, const Group &x, int quad) {
        int32_t h, l;
        memcpy(&h, x.digit + 4 * quad, 4);
        memcpy(&l, x.digit + 32 + 4 * quad, 4);
        high = _mm512_dpbusd_epi32(high, w.v, _mm512_set1_epi32(h));
        low = _mm512_dpbusd_epi32(low, w.v, _mm512_set1_epi32(l));
    }
    KV_INLINE f32x16 value() const { return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low))}; }
#else
    __m512i sum;
    KV_INLINE void start(int32_t value) { sum = _mm512_set1_epi32(value); }
    KV_INLINE void add(u32x16 w, const Group &x, int quad) {
        int32_t even, odd;
        memcpy(&even, x.digit + 8 * quad, 4);
        memcpy(&odd, x.digit + 8 * quad + 4, 4);
        sum = _mm512_add_epi32(sum, _mm512_add_epi32(
            _mm512_madd_epi16(_mm512_and_si512(w.v, _mm512_set1_epi32(0x00ff00ff)), _mm512_set1_epi32(even)),
            _mm512_madd_epi16(_mm512_srli_epi16(w.v, 8), _mm512_set1_epi32(odd))));
    }
    KV_INLINE f32x16 value() const { return {_mm512_cvtepi32_ps(sum)}; }
#endif
};

#else

static inline u32x16 low_nibbles(u32x16 a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
static inline u32x16 high_nibbles(u32x16 a) {
    return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
}
static inline u32x16 flip_signs(u32x16 a) {
    const __m256i sign = _mm256_set1_epi8((char)0x80);
    return {_mm256_xor_si256(a.lo, sign), _mm256_xor_si256(a.hi, sign)};
}

static inline float largest_magnitude(f32x16 a, f32x16 b) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    auto bits = [&](__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), mask); };
    const __m256i m = _mm256_max_epi32(_mm256_max_epi32(bits(a.lo), bits(a.hi)), _mm256_max_epi32(bits(b.lo), bits(b.hi)));
    __m128i q = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return kv::bits_f32((uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1))));
}

static inline __m256i store_digits(Group &to, int part, f32x16 x) {
    const __m256i a = _mm256_cvtps_epi32(x.lo), b = _mm256_cvtps_epi32(x.hi);
    const __m256i words = _mm256_packs_epi32(_mm256_shuffle_epi32(a, 0xd8), _mm256_shuffle_epi32(b, 0xd8));
    _mm256_storeu_si256((__m256i *)to.digit + part, _mm256_permute4x64_epi64(words, 0xd8));
    return _mm256_add_epi32(a, b);
}
static inline int32_t store_digits(Group &to, f32x16 a, f32x16 b) {
    const __m256i s = _mm256_add_epi32(store_digits(to, 0, a), store_digits(to, 1, b));
    __m128i q = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}

struct DigitSum {
    __m256i lo, hi;
    KV_INLINE void start(int32_t value) { lo = hi = _mm256_set1_epi32(value); }
    KV_INLINE void add(u32x16 w, const Group &x, int quad) {
        int32_t e, o;
        memcpy(&e, x.digit + 8 * quad, 4);
        memcpy(&o, x.digit + 8 * quad + 4, 4);
        const __m256i mask = _mm256_set1_epi32(0x00ff00ff), even = _mm256_set1_epi32(e), odd = _mm256_set1_epi32(o);
        lo = _mm256_add_epi32(lo, _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(w.lo, mask), even),
                                                   _mm256_madd_epi16(_mm256_srli_epi16(w.lo, 8), odd)));
        hi = _mm256_add_epi32(hi, _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(w.hi, mask), even),
                                                   _mm256_madd_epi16(_mm256_srli_epi16(w.hi, 8), odd)));
    }
    KV_INLINE f32x16 value() const { return {_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)}; }
};

#endif

// 32 activations, for weights whose bytes are `offset` too large. What is not finite makes the scale so.
static inline void to_digits(const float *x, int offset, Group &to) {
    const f32x16 a = load(x), b = load(x + 16);
    const float top = largest_magnitude(a, b), up = top > 1e-34f ? LARGEST / top : 0.f;
    to.scale = top * (1.f / LARGEST);
    const int32_t sum = store_digits(to, a * splat(up), b * splat(up));
    to.start = -offset * sum;
    to.sum = to.scale * (float)sum;
}

}  // namespace KV_NS

#endif
