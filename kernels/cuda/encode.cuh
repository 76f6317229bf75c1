// encode.cuh - numbers as cache pages store them, to the bit as page.h and kvrun/backends/reference_pages.py say. The files
// that quantize are compiled without contraction of a*b + c.
#pragma once
#include "number.cuh"

namespace kv {

constexpr uint16_t kF16Nan = 0x7e00;

// float32 -> half, clamped, with no negative zero.
static __device__ __forceinline__ uint16_t clamped_f16(float x) {
    const uint16_t h = (uint16_t)f16_bits(x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x);
    return h == 0x8000 ? 0 : h;
}
// Through bfloat16, whose subnormals count as zero.
static __device__ __forceinline__ float whole_bf16(uint32_t bits) { return bits & 0x7f80 ? bf16_to_f32(bits) : 0.f; }
static __device__ __forceinline__ bool finite_bits(float x) { return (__float_as_uint(x) & 0x7f800000) != 0x7f800000; }
// rint(clamp(x, low, high)); NaN gives low.
static __device__ __forceinline__ float clamped_rint(float x, float low, float high) {
    x = x > low ? x : low;
    x = x < high ? x : high;
    return rintf(x);
}

}  // namespace kv
