// quant_v.h - sums of V in 8 and 4 bits, weighted by probabilities. A token's scale goes into its probability, so that
// the inner loops see bare codes; the sums are of rotated V, and the caller rotates the result.
#pragma once
#include "quant_k.h"

namespace KV_NS {

static const int MAX_GROUPS = KV_MAX_QUANT_DIM / 16;

// What a page says of the scales of V: [group][slot] floats.
struct ScalesOfV {
    float scale[KV_PAGE * MAX_GROUPS], zero[KV_PAGE * MAX_GROUPS / 2];
    const char *code;
    int dim, groups;

    void read_q8(const char *page, int d) { read(page, page + KV_PAGE * d, d, d / kv_q8_group(d)); }
    void read_q4(const char *page, int d) {
        read(page, page + KV_PAGE * d / 2, d, d / kv_q4_group(d));
        const uint16_t *from = (const uint16_t *)(page + KV_PAGE * d / 2) + KV_PAGE * groups;
        for (int i = 0; i < KV_PAGE * groups; i += 16) store(zero + i, load_f16(from + i));
    }

private:
    void read(const char *page, const char *scales, int d, int n) {
        code = page, dim = d, groups = n;
        for (int i = 0; i < KV_PAGE * groups; i += 16) store(scale + i, load_f16((const uint16_t *)scales + i));
    }
};

// w[group][slot] = p[slot] * scale[group][slot] * factor for the slots [from, to), 0 for the others in blocks of 16 around them.
static inline void weights(const float *p, const ScalesOfV &v, int from, int to, float factor, float *w) {
    for (int g = 0; g < v.groups; g++, w += KV_PAGE)
        for (int b = from / 16; b < (to + 15) / 16; b++) {
            const f32x16 x = load(p + 16 * b) * (load(v.scale + g * KV_PAGE + 16 * b) * splat(factor));
            store(w + 16 * b, slots_inside(b, from, to, x, splat(0)));
        }
}

// Sum over the slots [from, to) of p * zero.
static inline float zero_sum(const float *p, const float *zero, int from, int to) {
    f32x16 s = splat(0);
    for (int b = from / 16; b < (to + 15) / 16; b++)
        s = s + slots_inside(b, from, to, load(p + 16 * b) * load(zero + 16 * b), splat(0));
    return sum(s);
}

// out[q][16*b ..] = keep[q]*out + sum over slots of w * code, for NB blocks of 16 channels. w has 2^-24 in it and is zero
// in the slots before `from` and after `to` that share four with them.
template <int NQ, int NB, int GROUP>
static inline void sums_q8_blocks(const char *code, int from, int to, const float *w, int64_t w_stride, float *out,
                                  int64_t out_stride, const float *keep, const char *&ahead) {
    f32x16 sum[NQ][NB];
#pragma GCC unroll 16
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) sum[i][b] = splat(0);
    for (int t = from / 4 * 4; t < to; t += 4) {
        ask_for(ahead, 64 * NB);
        u32x16 word[NB];
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) word[b] = load_words(code + (b * (KV_PAGE / 4) + t / 4) * 64);
        four([&](auto byte) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int b = 0; b < NB; b++) {
                const f32x16 x = byte_2p24<byte>(word[b]);
#pragma GCC unroll 16
                for (int i = 0; i < NQ; i++)
                    sum[i][b] = fma(splat(w[i * w_stride + b * 16 / GROUP * KV_PAGE + t + byte]), x, sum[i][b]);
            }
        });
    }
#pragma GCC unroll 16
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            float *o = out + i * out_stride + 16 * b;
            store(o, fma(load(o), splat(keep[i]), sum[i][b]));
        }
}

template <int NQ, int GROUP>
static void sums_q8(const ScalesOfV &v, int from, int to, const float *p, int64_t p_stride, float *out, int64_t out_stride,
                    const float *keep, const char *ahead) {
    constexpr int NB = blocks_for(NQ);
    float w[NQ * KV_PAGE * MAX_GROUPS];
    const int64_t w_stride = KV_PAGE * v.groups;
    for (int i = 0; i < NQ; i++) weights(p + i * p_stride, v, from, to, 0x1p-24f, w + i * w_stride);
    int c = 0;
    for (; c + 16 * NB <= v.dim; c += 16 * NB)
        sums_q8_blocks<NQ, NB, GROUP>(v.code + c * KV_PAGE, from, to, w + c / GROUP * KV_PAGE, w_stride, out + c, out_stride, keep, ahead);
    for (; c < v.dim; c += 16)
        sums_q8_blocks<NQ, 1, GROUP>(v.code + c * KV_PAGE, from, to, w + c / GROUP * KV_PAGE, w_stride, out + c, out_stride, keep, ahead);
}

// The same for nibbles, NB blocks of 16 channels of one group; zeros[q]: what is added to each channel.
template <int NQ, int NB>
static inline void sums_q4_blocks(const char *code, int from, int to, const float *w, int64_t w_stride, const float *zeros,
                                  int zeros_stride, float *out, int64_t out_stride, const float *keep, const char *&ahead) {
    f32x16 sum[NQ][NB];
#pragma GCC unroll 16
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) sum[i][b] = splat(zeros[i * zeros_stride]);
    for (int t = from / 8 * 8; t < to; t += 8) {
        ask_for(ahead, 64 * NB);
        u32x16 word[NB];
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) word[b] = load_words(code + (b * (KV_PAGE / 8) + t / 8) * 64);
        four([&](auto byte) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int b = 0; b < NB; b++) {
                const f32x16 x = nibble<2 * byte>(word[b]), y = nibble<2 * byte + 1>(word[b]);
#pragma GCC unroll 16
                for (int i = 0; i < NQ; i++)
                    sum[i][b] = fma(splat(w[i * w_stride + t + 4 + byte]), y, fma(splat(w[i * w_stride + t + byte]), x, sum[i][b]));
            }
        });
    }
#pragma GCC unroll 16
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            float *o = out + i * out_stride + 16 * b;
            store(o, fma(load(o), splat(keep[i]), sum[i][b]));
        }
}

template <int NQ>
static void sums_q4(const ScalesOfV &v, int from, int to, const float *p, int64_t p_stride, float *out, int64_t out_stride,
                    const float *keep, const char *ahead) {
    constexpr int NB = blocks_for(NQ);
    float w[NQ * KV_PAGE * (MAX_GROUPS / 4)], zeros[NQ][MAX_GROUPS];
    const int group = kv_q4_group(v.dim);
    const int64_t w_stride = KV_PAGE * v.groups;
    for (int i = 0; i < NQ; i++) {
        weights(p + i * p_stride, v, from, to, 1, w + i * w_stride);
        for (int g = 0; g < v.groups; g++) zeros[i][g] = zero_sum(p + i * p_stride, v.zero + g * KV_PAGE, from, to);
    }
    int c = 0;
    for (; group % (16 * NB) == 0 && c + 16 * NB <= v.dim; c += 16 * NB)
        sums_q4_blocks<NQ, NB>(v.code + c * KV_PAGE / 2, from, to, w + c / group * KV_PAGE, w_stride, &zeros[0][c / group], MAX_GROUPS,
                               out + c, out_stride, keep, ahead);
    for (; c < v.dim; c += 16)
        sums_q4_blocks<NQ, 1>(v.code + c * KV_PAGE / 2, from, to, w + c / group * KV_PAGE, w_stride, &zeros[0][c / group], MAX_GROUPS,
                              out + c, out_stride, keep, ahead);
}

}  // namespace KV_NS
