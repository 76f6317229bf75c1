// half.h - 16-bit floats to and from float32, in plain C++: exact, subnormals kept whether or not FTZ/DAZ is set,
// narrowing rounds to nearest even. Everything is static, so that each instruction set keeps its own copy.
#pragma once
#include <cstdint>
#include <cstring>

namespace kv {

static inline float bits_f32(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
static inline uint32_t f32_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }

static inline float bf16_to_f32(uint16_t b) { return bits_f32((uint32_t)b << 16); }

static inline uint16_t f32_to_bf16(float f) {
    uint32_t b = f32_bits(f);
    uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16, nan = b >> 16 | 0x40;
    return (uint16_t)((b & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static inline float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, mag = (uint32_t)(h & 0x7fff) << 13;
    // A subnormal gets the exponent of 2^-14 and its hidden one subtracted again: no float32 subnormal ever appears.
    float subnormal = bits_f32(mag + 0x38800000u) - bits_f32(0x38800000u);
    uint32_t normal = mag + (mag >= 0x0f800000u ? 0x70000000u : 0x38000000u);
    return bits_f32((mag < 0x00800000u ? f32_bits(subnormal) : normal) | sign);
}

static inline uint16_t f32_to_f16(float f) {
    uint32_t b = f32_bits(f), sign = b >> 16 & 0x8000, mag = b & 0x7fffffff;
    uint32_t normal = (mag - 0x38000000u + 0xfff + (mag >> 13 & 1)) >> 13;
    // Below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    uint32_t subnormal = f32_bits(bits_f32(mag < 0x38800000u ? mag : 0) + 0.5f) - 0x3f000000u;
    uint32_t infinite = mag > 0x7f800000u ? 0x7e00 : 0x7c00;
    return (uint16_t)(sign | (mag >= 0x47800000u ? infinite : mag < 0x38800000u ? subnormal : normal));
}

}  // namespace kv
