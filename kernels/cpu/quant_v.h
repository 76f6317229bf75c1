// quant_v.h - sums of V in 8 and 4 bits, weighted by probabilities. A token's scale goes into its probability, so that
// the inner loops see bare codes; the sums are of rotated V, and the caller rotates the result.
#pragma once
#include "quant_k.h"

namespace KV_NS {

static const int MAX_GROUPS = KV_MAX_QUANT_DIM / 16;

// What a page says of the scales of V: [slot][group] floats.
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

// w[slot][group] = p[slot] * scale[slot][group]
template <int G> static inline void weights_of(const float *p, const float *scale, int from, int to, float *w) {
    for (int t = from; t < to; t++)
        for (int g = 0; g < G; g++) w[t * G + g] = p[t] * scale[t * G + g];
}
static inline void weights(const float *p, const ScalesOfV &v, int from, int to, float *w) {
    switch (v.groups) {
        case 1: return weights_of<1>(p, v.scale, from, to, w);
        case 2: return weights_of<2>(p, v.scale, from, to, w);
        case 4: return weights_of<4>(p, v.scale, from, to, w);
        case 8: return weights_of<8>(p, v.scale, from, to, w);
    }
    for (int t = from; t < to; t++)
        for (int g = 0; g < v.groups; g++) w[t * v.groups + g] = p[t] * v.scale[t * v.groups + g];
}

// out[group] = sum over slots of p * zero, slots in [from, to), multiples of 16.
static inline void zero_sums(const float *p, const ScalesOfV &v, int from, int to, float *out) {
    if (v.groups == 1) {
        f32x16 s = splat(0);
        for (int t = from; t < to; t += 16) s = fma(load(p + t), load(v.zero + t), s);
        out[0] = sum(s);
        return;
    }
    for (int g = 0; g < v.groups; g++) out[g] = 0;
    for (int t = from; t < to; t++)
        for (int g = 0; g < v.groups; g++) out[g] += p[t] * v.zero[t * v.groups + g];
}

// out[q][16*b ..] = keep[q]*out + sum over slots of w * code, for NB blocks of 16 channels.
template <int NQ, int NB, int GROUP>
static inline void sums_q8_blocks(const int8_t *code, int dim, int from, int to, const float *w, int64_t w_stride, float *out,
                                  int64_t out_stride, const float *keep, const char *&ahead) {
    const int groups = dim / GROUP;
    f32x16 sum[NQ][NB];
#pragma GCC unroll 16
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) sum[i][b] = splat(0);
    for (int t = from; t < to; t++) {
        ask_for(ahead, 16 * NB);
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            const f32x16 x = load_i8(code + t * dim + 16 * b);
#pragma GCC unroll 16
            for (int i = 0; i < NQ; i++)
                sum[i][b] = fma(splat(w[i * w_stride + t * groups + b * 16 / GROUP]), x, sum[i][b]);
        }
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
    for (int i = 0; i < NQ; i++) weights(p + i * p_stride, v, from, to, w + i * w_stride);
    const int8_t *code = (const int8_t *)v.code;
    int c = 0;
    for (; c + 16 * NB <= v.dim; c += 16 * NB)
        sums_q8_blocks<NQ, NB, GROUP>(code + c, v.dim, from, to, w + c / GROUP, w_stride, out + c, out_stride, keep, ahead);
    for (; c < v.dim; c += 16)
        sums_q8_blocks<NQ, 1, GROUP>(code + c, v.dim, from, to, w + c / GROUP, w_stride, out + c, out_stride, keep, ahead);
}

// The same for NB blocks of 32 channels of nibbles, all of one group; zeros[q]: what is added to each channel. HALF: the
// block has 16 channels.
template <int NQ, int NB, bool HALF>
static inline void sums_q4_blocks(const uint8_t *code, int dim, int groups, int from, int to, const float *w, int64_t w_stride,
                                  const float *zeros, int zeros_stride, float *out, int64_t out_stride, const float *keep,
                                  const char *&ahead) {
    f32x16 even[NQ][NB], odd[NQ][NB];
#pragma GCC unroll 16
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) even[i][b] = odd[i][b] = splat(0);
    for (int t = from; t < to; t++) {
        ask_for(ahead, 16 * NB);
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            const uint8_t *at = code + t * (dim / 2) + 16 * b;
            const u32x16 bytes = HALF ? load_u8_8(at) : load_u8(at);
            const f32x16 x = nibble<0>(bytes), y = nibble<1>(bytes);
#pragma GCC unroll 16
            for (int i = 0; i < NQ; i++) {
                const f32x16 factor = splat(w[i * w_stride + t * groups]);
                even[i][b] = fma(factor, x, even[i][b]);
                odd[i][b] = fma(factor, y, odd[i][b]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < NQ; i++)
#pragma GCC unroll 16
        for (int b = 0; b < NB; b++) {
            f32x16 low, high;
            interleave(even[i][b], odd[i][b], low, high);
            const f32x16 zero = splat(zeros[i * zeros_stride]), factor = splat(keep[i]);
            float *o = out + i * out_stride + 32 * b;
            store(o, fma(load(o), factor, low + zero));
            if (!HALF) store(o + 16, fma(load(o + 16), factor, high + zero));
        }
}

template <int NQ>
static void sums_q4(const ScalesOfV &v, int from, int to, const float *p, int64_t p_stride, float *out, int64_t out_stride,
                    const float *keep, const char *ahead) {
    constexpr int NB = NQ <= 3 && blocks_for(NQ) > 1 ? 2 : 1;
    float w[NQ * KV_PAGE * (MAX_GROUPS / 4)], zeros[NQ][MAX_GROUPS];
    const int group = kv_q4_group(v.dim);
    const int64_t w_stride = KV_PAGE * v.groups;
    for (int i = 0; i < NQ; i++) {
        weights(p + i * p_stride, v, from, to, w + i * w_stride);
        zero_sums(p + i * p_stride, v, from / 16 * 16, (to + 15) / 16 * 16, zeros[i]);
    }
    const uint8_t *code = (const uint8_t *)v.code;
    int c = 0;
    for (; c + 32 * NB <= v.dim; c += 32 * NB)
        sums_q4_blocks<NQ, NB, false>(code + c / 2, v.dim, v.groups, from, to, w + c / group, w_stride, &zeros[0][c / group], MAX_GROUPS,
                                      out + c, out_stride, keep, ahead);
    for (; c + 32 <= v.dim; c += 32)
        sums_q4_blocks<NQ, 1, false>(code + c / 2, v.dim, v.groups, from, to, w + c / group, w_stride, &zeros[0][c / group], MAX_GROUPS,
                                     out + c, out_stride, keep, ahead);
    if (c < v.dim)
        sums_q4_blocks<NQ, 1, true>(code + c / 2, v.dim, v.groups, from, to, w + c / group, w_stride, &zeros[0][c / group], MAX_GROUPS,
                                    out + c, out_stride, keep, ahead);
}

}  // namespace KV_NS
