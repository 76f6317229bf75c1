// embed.cpp - rows of a packed matrix as float32 activations.
#include "kernels.h"
#include "weight.h"

namespace KV_NS {

// Lane `lane` of one unit of 32 columns, times `scale`.
static void unit_f32(const uint8_t *unit, int lane, float scale, float *out) {
    for (int c = 0; c < KV_GROUP; c++) {
        float v;
        memcpy(&v, unit + 64 * c + 4 * lane, 4);
        out[c] = v * scale;
    }
}

template <float (*widen)(uint16_t)> static void unit_16(const uint8_t *unit, int lane, float scale, float *out) {
    for (int c = 0; c < KV_GROUP; c += 2) {
        uint16_t v[2];
        memcpy(v, unit + 32 * c + 4 * lane, 4);
        out[c] = widen(v[0]) * scale;
        out[c + 1] = widen(v[1]) * scale;
    }
}

static float half_at(const uint8_t *p, int lane) {
    uint16_t v;
    memcpy(&v, p + 2 * lane, 2);
    return kv::f16_to_f32(v);
}

static void unit_q8(const uint8_t *unit, int lane, float scale, float *out) {
    float step = half_at(unit, lane);
    for (int j = 0; j < 8; j++) {
        int8_t q[4];
        memcpy(q, unit + 32 + 64 * j + 4 * lane, 4);
        for (int i = 0; i < 4; i++) out[4 * j + i] = step * q[i] * scale;
    }
}

static void nibbles(const uint8_t *words, int lane, float step, float min, float scale, float *out) {
    for (int j = 0; j < 4; j++) {
        uint8_t q[4];
        memcpy(q, words + 64 * j + 4 * lane, 4);
        for (int i = 0; i < 4; i++) {
            out[8 * j + i] = (step * (q[i] & 15) + min) * scale;
            out[8 * j + 4 + i] = (step * (q[i] >> 4) + min) * scale;
        }
    }
}

static void unit_q4(const uint8_t *unit, int lane, float scale, float *out) {
    nibbles(unit + 64, lane, half_at(unit, lane), half_at(unit + 32, lane), scale, out);
}

static void unit_q4s(const uint8_t *unit, int lane, float scale, float *out) {   // step*q - 8*step is step*(q - 8), to the bit
    const float step = half_at(unit, lane);
    nibbles(unit + 32, lane, step, -8 * step, scale, out);
}

void embed(const kv_op_embed &op, const kv_state &state, kv::Worker &worker) {
    using Unit = void (*)(const uint8_t *unit, int lane, float scale, float *out);
    Unit widen = nullptr;
    int64_t unit_bytes = 0, groups = op.w.k / KV_GROUP;
    switch (op.w.dtype) {
        case KV_F32: widen = unit_f32; unit_bytes = WeightF32::UNIT; break;
        case KV_F16: widen = unit_16<kv::f16_to_f32>; unit_bytes = WeightF16::UNIT; break;
        case KV_BF16: widen = unit_16<kv::bf16_to_f32>; unit_bytes = WeightBF16::UNIT; break;
        case KV_Q8: widen = unit_q8; unit_bytes = WeightQ8::UNIT; break;
        case KV_Q4: widen = unit_q4; unit_bytes = WeightQ4::UNIT; break;
        default: widen = unit_q4s; unit_bytes = WeightQ4S::UNIT;
    }
    worker.split(state.n_rows, 8, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            int64_t token = state.token[r];
            const uint8_t *unit = (const uint8_t *)op.w.data + token / KV_LANES * groups * unit_bytes;
            float *out = op.out + r * op.w.k;
            for (int64_t g = 0; g < groups; g++, unit += unit_bytes, out += KV_GROUP)
                widen(unit, (int)(token % KV_LANES), op.scale, out);
        }
    });
}

}  // namespace KV_NS
