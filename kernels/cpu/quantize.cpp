// quantize.cpp - see quantize.h. Compiled without fused multiply-add, so that every machine packs the same bytes.
#include "quantize.h"

#include <cmath>
#include <cstring>

#include "../kvrun.h"
#include "half.h"

namespace {

constexpr int N = KV_GROUP;
constexpr float MAGIC = 12582912.f;              // 1.5*2^23: adding it leaves the nearest integer in the low bits
constexpr uint16_t NOT_A_NUMBER = 0x7e00;

struct Range { float low, high; };               // NaN anywhere: both NaN

Range range_of(const float *x) {
    Range r{x[0], x[0]};
    float poison = 0;                            // stays 0 unless something is not finite
    for (int i = 0; i < N; i++) {
        r.low = x[i] < r.low ? x[i] : r.low;
        r.high = x[i] > r.high ? x[i] : r.high;
        poison += x[i] * 0.f;
    }
    if (poison != 0 || poison != poison) r.low = r.high = NAN;
    return r;
}

// digit[i] = the nearest of 0..15 to (x[i] - min)*inverse
void round_to(const float *x, float min, float inverse, float *digit) {
    for (int i = 0; i < N; i++) {
        float q = (x[i] - min) * inverse;
        q = q > 0 ? q : 0;
        q = q < 15 ? q : 15;
        digit[i] = (q + MAGIC) - MAGIC;
    }
}

float squared_error(const float *x, const float *digit, float scale, float min) {
    float lanes[8] = {};
    for (int i = 0; i < N; i += 8)
        for (int l = 0; l < 8; l++) {
            const float d = scale * digit[i + l] + min - x[i + l];
            lanes[l] += d * d;
        }
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// The scale and the minimum of least squared error for given digits; false where all digits are equal.
bool refit(const float *x, const float *digit, float &scale, float &min) {
    float sq[8] = {}, sqq[8] = {}, sx[8] = {}, sqx[8] = {};
    for (int i = 0; i < N; i += 8)
        for (int l = 0; l < 8; l++) {
            const float q = digit[i + l], v = x[i + l];
            sq[l] += q;
            sqq[l] += q * q;
            sx[l] += v;
            sqx[l] += q * v;
        }
    double q = 0, qq = 0, v = 0, qv = 0;
    for (int l = 0; l < 8; l++) q += sq[l], qq += sqq[l], v += sx[l], qv += sqx[l];
    const double det = N * qq - q * q;
    if (!(det > 0)) return false;
    scale = (float)((N * qv - q * v) / det);
    min = (float)((qq * v - q * qv) / det);
    return true;
}

}  // namespace

void kv::quantize_q8(const float *x, uint16_t *scale, int8_t *q) {
    const Range r = range_of(x);
    const float top = -r.low > r.high ? -r.low : r.high;
    *scale = top == top ? f32_to_f16(top / 127) : NOT_A_NUMBER;
    const float step = f16_to_f32(*scale), inverse = step > 0 ? 1 / step : 0;
    for (int i = 0; i < N; i++) {
        float v = x[i] * inverse;
        v = v > -127 ? v : -127;
        v = v < 127 ? v : 127;
        q[i] = (int8_t)(int)((v + MAGIC) - MAGIC);
    }
}

// A grid of ranges, each with its digits and then the best line through them, as in llama.cpp's make_qkx2_quants; the
// winner is rounded to halves before the digits are fixed.
void kv::quantize_q4(const float *x, uint16_t *scale, uint16_t *min, uint8_t *q) {
    constexpr float STRETCH = 0.1f;              // in digits: a range smaller by this many clips its ends
    constexpr int FEWEST = -4, MOST = 16;
    const Range r = range_of(x);
    float digit[N], best_scale = 0, best_min = r.low, best = INFINITY;
    if (!(r.high > r.low)) {                     // all equal, or not finite
        *scale = r.low == r.low ? 0 : NOT_A_NUMBER;
        *min = f32_to_f16(r.low);
        memset(q, 0, N);
        return;
    }
    const float width = r.high - r.low;
    for (int i = FEWEST; i <= MOST; i++) {
        const float steps = 15 + STRETCH * i;
        float s = width / steps, m = r.low + (steps > 15 ? 0.5f * (width - 15 * s) : 0);
        round_to(x, m, steps / width, digit);
        if (!refit(x, digit, s, m)) continue;
        const float error = squared_error(x, digit, s, m);
        if (error < best) best = error, best_scale = s, best_min = m;
    }
    *scale = f32_to_f16(best_scale);
    *min = f32_to_f16(best_min);
    const float s = f16_to_f32(*scale);
    round_to(x, f16_to_f32(*min), s > 0 ? 1 / s : 0, digit);
    for (int i = 0; i < N; i++) q[i] = (uint8_t)(int)digit[i];
}
