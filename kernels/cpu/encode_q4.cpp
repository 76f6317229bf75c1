// encode_q4.cpp - a full page of K or V into 4 bits.
#include "encode.h"
#include "rotate.h"

namespace KV_NS {

static const int N = KV_LANES;             // channels that are worked on side by side
static const int ROUNDS = 3;               // least-squares fits of scale and zero

void add_squares(float *qsq, const float *q, int heads, int dim, bool anew) {
    if (anew) memset(qsq, 0, sizeof(float) * (size_t)dim);
    for (int h = 0; h < heads; h++, q += dim)
        for (int c = 0; c < dim; c++) {
            const float square = q[c] * q[c];
            qsq[c] += square;
        }
}

// Channels [from, from + N) of a K page as x[slot][channel].
static void load_channels(float (*x)[N], const uint16_t *open, int from, int dim, int first) {
    for (int t = 0; t < KV_PAGE; t++)
        for (int i = 0; i < N; i += 2) {
            const uint16_t *pair = open + kv_k_index(t, from + i, dim);
            x[t][i] = whole_bf16(pair[0]);
            x[t][i + 1] = whole_bf16(pair[1]);
        }
    for (int t = 0; t < first; t++) memcpy(x[t], x[first], sizeof x[t]);
}

// Squared error of a b-bit grid, relative to that of the middle of the range.
static double cost(int bits) {
    const double top = (1 << bits) - 1;
    return bits ? 1 / (top * top) : 1;
}

// Pairs the most important channel with the least important one, and so on; chan [dim/2][2], split [dim/2].
static void pair_channels(const double *importance, int dim, uint8_t *chan, uint8_t *split) {
    const int pairs = dim / 2;
    for (int c = 0; c < dim; c++) {
        int rank = 0;
        for (int j = 0; j < dim; j++) rank += importance[j] > importance[c] || (importance[j] == importance[c] && j < c);
        if (rank < pairs) chan[2 * rank] = (uint8_t)c;
        else chan[2 * (dim - 1 - rank) + 1] = (uint8_t)c;
    }
    for (int i = 0; i < pairs; i++) {
        const double high = importance[chan[2 * i]], low = importance[chan[2 * i + 1]];
        double best = 0;
        for (int s = 4; s <= 8; s++) {
            const double error = high * cost(s) + low * cost(8 - s);
            if (s > 4 && !(error < best)) continue;
            best = error;
            split[i] = (uint8_t)s;
        }
    }
}

static void codes_of(float (*code)[N], const float (*x)[N], const float *scale, const float *zero, const float *top) {
    float divisor[N], most[N];               // where the scale is zero or NaN the codes are 0
    for (int i = 0; i < N; i++) {
        const bool good = scale[i] > 0;
        divisor[i] = good ? scale[i] : 1.f;
        most[i] = good ? top[i] : 0.f;
    }
    for (int t = 0; t < KV_PAGE; t++)
        for (int i = 0; i < N; i++) code[t][i] = clamped_rint((x[t][i] - zero[i]) / divisor[i], 0.f, most[i]);
}

struct Fit { uint16_t scale[N], zero[N]; };

// Least-squares scale and zero of N channels, and their codes. low, span: of the channels; top: the highest code.
static void fit(const float (*x)[N], const float *low, const float *span, const bool *finite, const float *top,
                float (*code)[N], Fit &out) {
    float scale[N], zero[N];
    for (int i = 0; i < N; i++) {
        out.scale[i] = top[i] > 0 ? clamped_f16(span[i] / top[i]) : 0;
        const float half = 0.5f * span[i];
        out.zero[i] = clamped_f16(out.scale[i] ? low[i] : low[i] + half);
        if (!finite[i]) out.scale[i] = out.zero[i] = F16_NAN;
        scale[i] = kv::f16_to_f32(out.scale[i]);
        zero[i] = kv::f16_to_f32(out.zero[i]);
    }
    codes_of(code, x, scale, zero, top);
    double sx[N] = {};
    for (int t = 0; t < KV_PAGE; t++)
        for (int i = 0; i < N; i++) sx[i] += x[t][i];
    for (int round = 0; round < ROUNDS; round++) {
        double scx[N] = {};
        float sc[N] = {}, scc[N] = {};       // sums of at most 128 * 255^2: exact
        for (int t = 0; t < KV_PAGE; t++)
            for (int i = 0; i < N; i++) {
                const double product = (double)code[t][i] * x[t][i];
                const float square = code[t][i] * code[t][i];
                scx[i] += product;
                sc[i] += code[t][i];
                scc[i] += square;
            }
        for (int i = 0; i < N; i++) {
            const double n = KV_PAGE, c = sc[i], variance = n * scc[i] - c * c;
            if (!(scale[i] > 0 && variance > 0)) continue;
            const uint16_t s = clamped_f16((float)((n * scx[i] - c * sx[i]) / variance));
            if (s == 0 || s & 0x8000) continue;
            out.scale[i] = s;
            scale[i] = kv::f16_to_f32(s);
            out.zero[i] = clamped_f16((float)((sx[i] - (double)scale[i] * c) / n));
            zero[i] = kv::f16_to_f32(out.zero[i]);
        }
        codes_of(code, x, scale, zero, top);
    }
}

void encode_k_q4(char *page, const uint16_t *open, const float *qsq, int dim, int first) {
    alignas(64) float x[KV_PAGE][N], code[KV_PAGE][N];
    float low[KV_MAX_QUANT_DIM], span[KV_MAX_QUANT_DIM], top[KV_MAX_QUANT_DIM];
    double importance[KV_MAX_QUANT_DIM];
    bool finite[KV_MAX_QUANT_DIM];
    for (int from = 0; from < dim; from += N) {
        load_channels(x, open, from, dim, first);
        float high[N];
        bool good[N];
        for (int i = 0; i < N; i++) low[from + i] = high[i] = x[0][i], good[i] = true;
        for (int t = 0; t < KV_PAGE; t++)
            for (int i = 0; i < N; i++) {
                low[from + i] = x[t][i] < low[from + i] ? x[t][i] : low[from + i];
                high[i] = x[t][i] > high[i] ? x[t][i] : high[i];
                good[i] &= finite_bits(x[t][i]);
            }
        for (int i = 0; i < N; i++) {
            const double range = (double)high[i] - (double)low[from + i];
            const double w = (double)qsq[from + i] * range * range;
            span[from + i] = high[i] - low[from + i];
            finite[from + i] = good[i];
            importance[from + i] = good[i] && w <= 1.7976931348623157e308 ? w : 0;
        }
    }
    uint8_t *pairs = (uint8_t *)page;
    uint16_t *scale = (uint16_t *)(page + (int64_t)KV_PAGE * dim / 2), *zero = scale + dim;
    uint8_t *chan = (uint8_t *)(zero + dim), *split = chan + dim, *end = split + dim / 2;
    memset(end, 0, (size_t)(page + kv_head_bytes(KV_Q4, dim, 0) - (char *)end));
    pair_channels(importance, dim, chan, split);
    uint8_t pair_of[KV_MAX_QUANT_DIM], shift_of[KV_MAX_QUANT_DIM];
    for (int i = 0; i < dim / 2; i++) {
        const int high = chan[2 * i], other = chan[2 * i + 1];
        pair_of[high] = pair_of[other] = (uint8_t)i;
        shift_of[high] = (uint8_t)(8 - split[i]);
        shift_of[other] = 0;
        top[high] = (float)((1 << split[i]) - 1);
        top[other] = (float)((1 << (8 - split[i])) - 1);
    }
    memset(pairs, 0, (size_t)KV_PAGE * dim / 2);
    for (int from = 0; from < dim; from += N) {
        Fit found;
        load_channels(x, open, from, dim, first);
        fit(x, low + from, span + from, finite + from, top + from, code, found);
        memcpy(scale + from, found.scale, sizeof found.scale);
        memcpy(zero + from, found.zero, sizeof found.zero);
        for (int i = 0; i < N; i++)
            for (int t = 0; t < KV_PAGE; t++) {
                uint8_t *byte = pairs + kv_k4_index(t, pair_of[from + i], dim);
                *byte = (uint8_t)(*byte | (int)code[t][i] << shift_of[from + i]);
            }
    }
}

void encode_v_q4(char *page, const uint16_t *open, int dim) {
    alignas(64) float y[KV_MAX_QUANT_DIM];
    const int group = kv_q4_group(dim), groups = dim / group;
    uint16_t *scales = (uint16_t *)(page + (int64_t)KV_PAGE * dim / 2), *zeros = scales + KV_PAGE * groups;
    for (int t = 0; t < KV_PAGE; t++) {
        for (int c = 0; c < dim; c++) y[c] = whole_bf16(open[kv_v_index(t, c, dim)]);
        rotate(y, dim);
        for (int g = 0; g < groups; g++) {
            const float *z = y + g * group;
            float low = z[0], high = z[0];
            bool finite = true;
            for (int i = 0; i < group; i++) finite &= finite_bits(z[i]);
            f32x16 lows = load(z), highs = lows;
            for (int i = 16; i < group; i += 16) lows = min(lows, load(z + i)), highs = max(highs, load(z + i));
            high = max(highs);
            low = -max(splat(0) - lows);
            const float span = high - low, half = 0.5f * span;
            uint16_t scale = clamped_f16(span / 15.f), zero = clamped_f16(scale ? low : low + half);
            if (!finite) scale = zero = F16_NAN;
            scales[g * KV_PAGE + t] = scale;
            zeros[g * KV_PAGE + t] = zero;
            const float s = kv::f16_to_f32(scale), from = kv::f16_to_f32(zero);
            uint8_t code[KV_MAX_QUANT_DIM];
            if (s > 0)
                for (int i = 0; i < group; i++) code[i] = (uint8_t)clamped_rint((z[i] - from) / s, 0.f, 15.f);
            else
                memset(code, 0, group);
            for (int i = 0; i < group; i++) {
                uint8_t *byte = (uint8_t *)page + kv_v4_index(t, g * group + i);
                *byte = (uint8_t)(t / 4 % 2 ? *byte | code[i] << 4 : code[i]);
            }
        }
    }
}

}  // namespace KV_NS
