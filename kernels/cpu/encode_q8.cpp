// encode_q8.cpp - one token's K or V into 8 bits.
#include "encode.h"
#include "rotate.h"

namespace KV_NS {

// Codes [dim] and scales [dim/group] of x[dim].
static void encode(int8_t *code, uint16_t *scale, const float *x, int dim) {
    alignas(64) float y[KV_MAX_QUANT_DIM];
    const int group = kv_q8_group(dim);
    for (int i = 0; i < dim; i++) y[i] = whole_bf16(kv::f32_to_bf16(x[i]));
    rotate(y, dim);
    for (int g = 0; g < dim / group; g++) {
        const float *z = y + g * group;
        uint32_t top = 0;                    // bits of floats without sign are ordered as the floats are, NaN highest
        for (int i = 0; i < group; i++) {
            const uint32_t b = kv::f32_bits(z[i]) & 0x7fffffff;
            top = b > top ? b : top;
        }
        const bool finite = top < 0x7f800000;
        scale[g] = finite ? clamped_f16(kv::bits_f32(top) / 127.f) : F16_NAN;
        const float s = kv::f16_to_f32(scale[g]);
        if (s > 0)
            for (int i = 0; i < group; i++) code[g * group + i] = (int8_t)clamped_rint(z[i] / s, -127.f, 127.f);
        else
            memset(code + g * group, 0, group);
    }
}

void store_k_q8(char *page, const float *x, int t, int dim) {
    int8_t code[KV_MAX_QUANT_DIM];
    uint16_t scale[KV_MAX_QUANT_DIM / 16];
    encode(code, scale, x, dim);
    const int groups = dim / kv_q8_group(dim), block = t / KV_LANES, lane = t % KV_LANES;
    for (int c = 0; c < dim; c += 4) memcpy(page + kv_k8_index(t, c, dim), code + c, 4);
    uint16_t *scales = (uint16_t *)(page + KV_PAGE * dim) + block * groups * KV_LANES + lane;
    for (int g = 0; g < groups; g++) scales[g * KV_LANES] = scale[g];
}

void store_v_q8(char *page, const float *x, int t, int dim) {
    int8_t code[KV_MAX_QUANT_DIM];
    uint16_t scale[KV_MAX_QUANT_DIM / 16], *scales = (uint16_t *)(page + KV_PAGE * dim) + t;
    encode(code, scale, x, dim);
    for (int c = 0; c < dim; c++) page[kv_v8_index(t, c)] = code[c];
    for (int g = 0; g < dim / kv_q8_group(dim); g++) scales[g * KV_PAGE] = scale[g];
}

}  // namespace KV_NS
