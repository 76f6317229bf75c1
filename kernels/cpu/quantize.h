// quantize.h - floats to the digits of KV_Q8 and KV_Q4 weights, one group of 32 at a time.
#pragma once
#include <cstdint>

namespace kv {

// value = scale*q; scale is a half. A group that holds what is not finite gets a NaN scale.
void quantize_q8(const float *x, uint16_t *scale, int8_t *q);
// value = scale*q + min, q in 0..15; scale and min are halves. Searched for the least squared error.
void quantize_q4(const float *x, uint16_t *scale, uint16_t *min, uint8_t *q);

}  // namespace kv
