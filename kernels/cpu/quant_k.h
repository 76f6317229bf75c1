// quant_k.h - scores of queries against K in 8 and 4 bits: codes become floats in registers, all scales stay outside of
// the inner loops.
#pragma once
#include <type_traits>

#include "quant_pages.h"

namespace KV_NS {

// Blocks of 16 at once for a number of queries: what fits the registers.
#if defined(__AVX512F__)
static constexpr int blocks_for(int queries) { return queries <= 3 ? 4 : queries <= 6 ? 2 : 1; }
#define KV_COUNTS(X) X(1) X(2) X(3) X(4) X(6) X(8) X(12)
#else
static constexpr int blocks_for(int queries) { return queries == 1 ? 4 : queries == 2 ? 2 : 1; }
#define KV_COUNTS(X) X(1) X(2) X(3)
#endif

static inline void ask_for(const char *&ahead, int bytes) {
    if (ahead) __builtin_prefetch(ahead, 0, 2), ahead += bytes;
}

// f(0), f(1), f(2), f(3) with the number known to the compiler: which of four bytes.
template <class F> static inline __attribute__((always_inline)) void four(F f) {
    f(std::integral_constant<int, 0>()), f(std::integral_constant<int, 1>());
    f(std::integral_constant<int, 2>()), f(std::integral_constant<int, 3>());
}

// Q8: s[q][16*b + lane] = sum over groups of scale * sum over channels of q*code. q is rotated, as the codes are.
template <int NQ, int NB, int GROUP>
static inline void scores_q8_blocks(const char *code, const uint16_t *scale, int dim, const float *q, int64_t q_stride,
                                    float *s, int64_t s_stride, const char *&ahead) {
    for (int g = 0; g < dim / GROUP; g++) {
        f32x16 sum[NQ][NB];
#pragma GCC unroll 16
        for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
            for (int b = 0; b < NB; b++) sum[i][b] = splat(0);
        for (int c = g * GROUP; c < g * GROUP + GROUP; c += 4) {
            ask_for(ahead, 64 * NB);
            u32x16 word[NB];
#pragma GCC unroll 16
            for (int b = 0; b < NB; b++) word[b] = load_words(code + (b * dim + c) * 16);
            four([&](auto byte) __attribute__((always_inline)) {
#pragma GCC unroll 16
                for (int b = 0; b < NB; b++) {
                    const f32x16 x = byte_2p24<byte>(word[b]);
#pragma GCC unroll 16
                    for (int i = 0; i < NQ; i++) sum[i][b] = fma(splat(q[i * q_stride + c + byte]), x, sum[i][b]);
                }
            });
        }
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            const f32x16 factor = load_f16(scale + (b * (dim / GROUP) + g) * 16) * splat(0x1p-24f);
#pragma GCC unroll 16
            for (int i = 0; i < NQ; i++) {
                float *to = s + i * s_stride + 16 * b;
                store(to, fma(sum[i][b], factor, g ? load(to) : splat(0)));
            }
        }
    }
}

template <int NQ, int GROUP>
static void scores_q8(const char *page, int dim, int from, int to, const float *q, int64_t q_stride, float *s, int64_t s_stride,
                      const char *ahead) {
    constexpr int NB = blocks_for(NQ);
    const uint16_t *scale = (const uint16_t *)(page + KV_PAGE * dim);
    const int row = dim / GROUP * 16;
    for (; from + NB <= to; from += NB)
        scores_q8_blocks<NQ, NB, GROUP>(page + from * dim * 16, scale + from * row, dim, q, q_stride, s + 16 * from, s_stride, ahead);
    for (; from < to; from++)
        scores_q8_blocks<NQ, 1, GROUP>(page + from * dim * 16, scale + from * row, dim, q, q_stride, s + 16 * from, s_stride, ahead);
}

// What a Q4 page of K says of its channels.
struct PairedChannels {
    float scale[KV_MAX_QUANT_DIM], zero[KV_MAX_QUANT_DIM];
    int32_t high[KV_MAX_QUANT_DIM / 2], low[KV_MAX_QUANT_DIM / 2];   // channels of a row of bytes
    float down[KV_MAX_QUANT_DIM / 2];                               // 2^-(bits of the low channel)
    uint32_t mask[KV_MAX_QUANT_DIM / 2];                            // those bits
    const char *pairs;
    int dim;

    void read(const char *page, int d) {
        dim = d;
        pairs = page;
        const uint16_t *scales = (const uint16_t *)(page + (int64_t)KV_PAGE * d / 2);
        for (int c = 0; c < d; c += 16) {
            store(scale + c, load_f16(scales + c));
            store(zero + c, load_f16(scales + d + c));
        }
        const uint8_t *chan = (const uint8_t *)(scales + 2 * d), *split = chan + d;
        for (int i = 0; i < d / 2; i++) {
            // Bytes of a damaged page must not lead outside of the head.
            high[i] = chan[2 * i] < d ? chan[2 * i] : 0;
            low[i] = chan[2 * i + 1] < d ? chan[2 * i + 1] : 0;
            const uint32_t bits = (8u - split[i]) & 7;
            mask[i] = (1u << bits) - 1;
            down[i] = kv::bits_f32((127 - bits) << 23);
        }
    }
};

// Q4: a byte is high*2^bits + low, so that with h = q*scale of the high channel and l of the low one
// h*high + l*low = a*byte + b*low for a = h*2^-bits, b = l - a. `factors` holds a and b side by side per row.
static inline float factors_q4(const PairedChannels &page, const float *q, float *factors) {
    float scaled[KV_MAX_QUANT_DIM];
    f32x16 zeros = splat(0);
    for (int c = 0; c < page.dim; c += 16) {
        const f32x16 x = load(q + c);
        store(scaled + c, x * load(page.scale + c));
        zeros = fma(x, load(page.zero + c), zeros);
    }
    int i = 0;
    for (; i + 16 <= page.dim / 2; i += 16) {
        const f32x16 a = gather(scaled, page.high + i) * load(page.down + i);
        f32x16 first, second;
        interleave(a, gather(scaled, page.low + i) - a, first, second);
        store(factors + 2 * i, first);
        store(factors + 2 * i + 16, second);
    }
    for (; i < page.dim / 2; i++) {
        factors[2 * i] = scaled[page.high[i]] * page.down[i];
        factors[2 * i + 1] = scaled[page.low[i]] - factors[2 * i];
    }
    return sum(zeros);
}

template <int NQ, int NB>
static inline void scores_q4_blocks(const PairedChannels &page, int block, const float (*factors)[KV_MAX_QUANT_DIM],
                                    const float *zeros, float *s, int64_t s_stride, const char *&ahead) {
    f32x16 sum[NQ][NB];
#pragma GCC unroll 16
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) sum[i][b] = splat(zeros[i]);
    const char *at = page.pairs + block * page.dim * 8;
    for (int r = 0; r < page.dim / 2; r += 4, at += 64) {
        ask_for(ahead, 64 * NB);
        u32x16 word[NB];
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) word[b] = load_words(at + b * page.dim * 8);
        four([&](auto byte) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int b = 0; b < NB; b++) {
                const u32x16 one = shifted<8 * byte>(word[b]);
                const f32x16 x = whole(low_bits(one, 255)), y = whole(low_bits(one, page.mask[r + byte]));
#pragma GCC unroll 16
                for (int i = 0; i < NQ; i++)
                    sum[i][b] = fma(splat(factors[i][2 * (r + byte) + 1]), y, fma(splat(factors[i][2 * (r + byte)]), x, sum[i][b]));
            }
        });
    }
#pragma GCC unroll 16
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) store(s + i * s_stride + 16 * (block + b), sum[i][b]);
}

template <int NQ>
static void scores_q4(const PairedChannels &page, int from, int to, const float *q, int64_t q_stride, float *s,
                      int64_t s_stride, const char *ahead) {
    constexpr int NB = blocks_for(NQ);
    float factors[NQ][KV_MAX_QUANT_DIM], zeros[NQ];
    for (int i = 0; i < NQ; i++) zeros[i] = factors_q4(page, q + i * q_stride, factors[i]);
    for (; from + NB <= to; from += NB) scores_q4_blocks<NQ, NB>(page, from, factors, zeros, s, s_stride, ahead);
    for (; from < to; from++) scores_q4_blocks<NQ, 1>(page, from, factors, zeros, s, s_stride, ahead);
}

}  // namespace KV_NS
