// quantize.cpp - see quantize.h. Compiled without fused multiply-add, so that every machine packs the same bytes.
//
// Both formats try several steps; for each, the digits are rounded and the best scale (and minimum) for them follows by
// least squares, as in llama.cpp's make_qkx2_quants. Its squared error is known from the sums alone.
//
// Weights that were quantized before lie on a coarse grid, low + j*step with j in 0..31. Eight bits have room for several digits
// to such a step: with a whole number of them, only the place of the whole grid is rounded, and no value on its own.
#include "quantize.h"

#include <cmath>
#include <cstring>
#include <numeric>

#include "../kvrun.h"
#include "half.h"

// Wider vectors where the CPU has them; the arithmetic is the same lane by lane.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

namespace {

constexpr int N = KV_GROUP, LANES = 8;
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

struct Sums { double q, qq, x, qx, xx; };        // over a group: digits, values and their products

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

double total(const Lanes &a) { return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7])); }

// digit[i] = the nearest of low..high to x[i]*inverse + start
inline __attribute__((always_inline)) Sums round_to(const float *x, float inverse, float start, float low, float high, float *digit) {
    const Lanes zero{}, bottom = zero + low, top = zero + high;
    Lanes q = zero, qq = zero, sx = zero, qx = zero, xx = zero;
#pragma GCC unroll 4
    for (int i = 0; i < N; i += LANES) {
        Lanes v, d;
        memcpy(&v, x + i, sizeof v);
        d = v * inverse + start;
        d = d > bottom ? d : bottom;
        d = d < top ? d : top;
        d = (d + MAGIC) - MAGIC;
        memcpy(digit + i, &d, sizeof d);
        q += d;
        qq += d * d;
        sx += v;
        qx += d * v;
        xx += v * v;
    }
    return {total(q), total(qq), total(sx), total(qx), total(xx)};
}

double squared_error(const Sums &s, double scale, double min) {
    return s.xx - 2 * scale * s.qx - 2 * min * s.x + scale * scale * s.qq + 2 * scale * min * s.q + N * min * min;
}

// J, if all values lie on low + j*(high - low)/J; else 0. Of 16..31, which have multiples of all below.
inline __attribute__((always_inline)) int grid_of(const float *x, Range r) {
    constexpr float NEAR = 0.2f;                 // in steps of the grid: what bfloat16 may have moved a value by, and its ends
    constexpr int FEWEST = 16;
    const float inverse = 1 / (r.high - r.low);
    if (!(inverse > 0 && inverse < INFINITY)) return 0;
    const Lanes zero{}, fewer = {16, 17, 18, 19, 20, 21, 22, 23}, more = fewer + LANES;
    Lanes off_fewer = zero, off_more = zero;     // squared distance of the value farthest from each grid
    for (int i = 0; i < N; i += LANES) {         // most groups end with the first eight values
        for (int c = i; c < i + LANES; c++) {
            const Lanes y = zero + (x[c] - r.low) * inverse;
            Lanes a = y * fewer, b = y * more;
            a -= (a + MAGIC) - MAGIC;
            b -= (b + MAGIC) - MAGIC;
            a *= a;
            b *= b;
            off_fewer = a > off_fewer ? a : off_fewer;
            off_more = b > off_more ? b : off_more;
        }
        const Lanes off = off_fewer < off_more ? off_fewer : off_more;
        bool any = false;
        for (int l = 0; l < LANES; l++) any |= off[l] < NEAR * NEAR;
        if (!any) return 0;
    }
    for (int l = 0; l < 2 * LANES; l++)
        if ((l < LANES ? off_fewer[l] : off_more[l - LANES]) < NEAR * NEAR) return FEWEST + l;
    return 0;
}

// Takes a whole number of digits to each of `steps` steps of a grid, if that errs by less than `best`.
void quantize_grid(const float *x, Range r, int steps, double best, uint16_t *scale, int8_t *q) {
    constexpr int TRIES = 16;
    const double inverse = steps / ((double)r.high - r.low);
    int place[N], common = steps;
    for (int c = 0; c < N; c++) {
        place[c] = (int)(((double)x[c] - r.low) * inverse + 0.5);
        if (common > 1) common = std::gcd(common, place[c]);
    }
    steps /= common;
    Sums s{};
    for (int c = 0; c < N; c++) {
        const double j = place[c] /= common, v = x[c];
        s.q += j, s.qq += j * j, s.x += v, s.qx += j * v, s.xx += v * v;
    }
    // Where zero lies, in steps, by the line of least squares through all values: the ends alone are as rounded as the rest.
    const double step = (N * s.qx - s.q * s.x) / (N * s.qq - s.q * s.q), zero = (step * s.q - s.x) / (N * step);
    int digits = 0, first = 0;
    for (int n = 254 / steps, tries = TRIES; n > 0 && tries > 0; n--) {
        const double k = std::nearbyint(-n * zero);              // the digit of the lowest value
        if (!(k >= -127 && k + n * steps <= 127)) continue;
        tries--;
        const Sums d{n * s.q + k * N, n * n * s.qq + 2 * n * k * s.q + k * k * N, s.x, n * s.qx + k * s.x, s.xx};
        const uint16_t half = kv::f32_to_f16((float)(d.qx / d.qq));
        const double error = squared_error(d, kv::f16_to_f32(half), 0);
        if (error < best) best = error, *scale = half, digits = n, first = (int)k;
    }
    if (digits > 0)
        for (int c = 0; c < N; c++) q[c] = (int8_t)(first + digits * place[c]);
}

}  // namespace

WIDE void kv::quantize_q8(const float *x, uint16_t *scale, int8_t *q) {
    constexpr float STEP = 0.25f;                // in digits: how much less of them the largest magnitude takes each time
    constexpr int TRIES = 16;
    const Range r = range_of(x);
    const float top = -r.low > r.high ? -r.low : r.high;
    *scale = 0;
    memset(q, 0, N);
    if (!(top > 0)) {                            // all zero, or not finite
        if (top != top) *scale = NOT_A_NUMBER;
        return;
    }
    float digit[N];
    double best = INFINITY;
    const int steps = grid_of(x, r), tries = steps ? TRIES / 2 : TRIES;   // a grid has more below
    for (int i = 0; i < tries; i++) {
        const Sums s = round_to(x, (127 - STEP * i) / top, 0, -127, 127, digit);
        const uint16_t half = f32_to_f16((float)(s.qx / s.qq));
        const double error = squared_error(s, f16_to_f32(half), 0);
        if (error < best) {
            best = error;
            *scale = half;
            for (int c = 0; c < N; c++) q[c] = (int8_t)(int)digit[c];
        }
    }
    if (steps) quantize_grid(x, r, steps, best, scale, q);
}

WIDE void kv::quantize_q4(const float *x, uint16_t *scale, uint16_t *min, uint8_t *q) {
    constexpr float STEP = 0.1f;                 // in digits: a range that takes more than 15 of them clips its ends
    constexpr int FEWEST = -4, MOST = 20, POLISH = 2;
    const Range r = range_of(x);
    memset(q, 0, N);
    *scale = r.low == r.low ? 0 : NOT_A_NUMBER;
    *min = f32_to_f16(r.low);
    if (!(r.high > r.low)) return;               // all equal, or not finite
    float y[N], digit[N];                        // counted from the lowest, so that large values of little range keep their bits
    for (int c = 0; c < N; c++) y[c] = x[c] - r.low;
    const float width = r.high - r.low;
    double best = INFINITY;
    float s = width / 15, m = 0;
    for (int i = FEWEST; i <= MOST; i++) {
        const float steps = 15 + STEP * i;
        const Sums a = round_to(y, steps / width, steps > 15 ? 0.5f * (15 - steps) : 0, 0, 15, digit);
        const double det = N * a.qq - a.q * a.q;
        if (!(det > 0)) continue;
        const double scale_i = (N * a.qx - a.q * a.x) / det, min_i = (a.qq * a.x - a.q * a.qx) / det;
        const double error = squared_error(a, scale_i, min_i);
        if (error < best) best = error, s = (float)scale_i, m = (float)min_i;
    }
    // Rounded to halves, with the digits that suit those; then once more from there.
    best = INFINITY;
    for (int i = 0; i <= POLISH; i++) {
        const uint16_t half_s = f32_to_f16(s), half_m = f32_to_f16(m + r.low);
        const float step = f16_to_f32(half_s), low = f16_to_f32(half_m) - r.low;
        if (!(step > 0)) break;
        const Sums a = round_to(y, 1 / step, -low / step, 0, 15, digit);
        const double error = squared_error(a, step, low);
        if (error < best) {
            best = error;
            *scale = half_s;
            *min = half_m;
            for (int c = 0; c < N; c++) q[c] = (uint8_t)(int)digit[c];
        }
        const double det = N * a.qq - a.q * a.q;
        if (!(det > 0)) break;
        s = (float)((N * a.qx - a.q * a.x) / det);
        m = (float)((a.qq * a.x - a.q * a.qx) / det);
    }
}
