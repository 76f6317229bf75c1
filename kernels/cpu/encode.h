// encode.h - quantizing for cache pages, to the bit as page.h and kvrun/backends/reference_pages.py say.
// The files that implement this are compiled without contraction of a*b + c.
#pragma once
#include "../page.h"
#include "half.h"

namespace KV_NS {

// One token's x[dim] into slot t of one head's Q8 page.
void store_k_q8(char *page, const float *x, int t, int dim);
void store_v_q8(char *page, const float *x, int t, int dim);

// A full page from the bfloat16 values in `open`. first: slots at its start that take the value of slot `first`.
void encode_k_q4(char *page, const uint16_t *open, const float *qsq, int dim, int first);
void encode_v_q4(char *page, const uint16_t *open, int dim);

// qsq[dim] += q^2 over heads [heads][dim] in order; starts at zero when `anew`.
void add_squares(float *qsq, const float *q, int heads, int dim, bool anew);

static inline uint16_t clamped_f16(float x) {
    const uint16_t h = kv::f32_to_f16(x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x);
    return h == 0x8000 ? 0 : h;
}
static const uint16_t F16_NAN = 0x7e00;

// bfloat16 as float32, subnormals as zero.
static inline float whole_bf16(uint16_t b) { return b & 0x7f80 ? kv::bf16_to_f32(b) : 0.f; }
static inline bool finite_bits(float x) { return (kv::f32_bits(x) & 0x7f800000) != 0x7f800000; }

// rint(clamp(x, low, high)) for bounds within +-2^22.
static inline float clamped_rint(float x, float low, float high) {
    x = x > low ? x : low;
    x = x < high ? x : high;
    return (x + 12582912.f) - 12582912.f;
}

}  // namespace KV_NS
