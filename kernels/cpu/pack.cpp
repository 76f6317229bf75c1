// pack.cpp - weights from file order into the blocked layouts of page.h, and back.
// Built once for the baseline instruction set: the loops move 32-bit words and run at the speed of memory, but for
// quantization, whose result is kept on disk.
#include "../page.h"
#include "half.h"
#include "quantize.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace kv;

namespace {

// ---- where a block lies ----

struct Unit { int64_t bytes, header; };  // 32 columns of 16 rows: scales (and minima) ahead of lines of 64 bytes
Unit unit_of(int32_t dtype) {
    switch (dtype) {
        case KV_F32: return {KV_GROUP * 64, 0};
        case KV_F16: case KV_BF16: return {KV_GROUP * 32, 0};
        case KV_Q8: return {KV_Q8_BLOCK, 32};
        case KV_Q4: return {KV_Q4_BLOCK, 64};
        case KV_Q4S: return {KV_Q4S_BLOCK, 32};
        default: return {-1, 0};
    }
}

int64_t column_bytes(int32_t dtype, int64_t k) {  // bytes of one block of 16 rows; -1 for no packed format
    const Unit unit = unit_of(dtype);
    return unit.bytes < 0 ? -1 : k / KV_GROUP * unit.bytes;
}

int64_t source_bytes(int32_t dtype, int64_t k) {  // bytes of one source row; -1 when k does not fit the format
    switch (dtype) {
        case KV_F32: return k * 4;
        case KV_F16: case KV_BF16: return k * 2;
        case KV_GGUF_Q4_0: return k / 32 * 18;
        case KV_GGUF_Q4_1: return k / 32 * 20;
        case KV_GGUF_Q5_0: return k / 32 * 22;
        case KV_GGUF_Q8_0: return k / 32 * 34;
        case KV_GGUF_Q4_K: return k % 256 ? -1 : k / 256 * 144;
        case KV_GGUF_Q5_K: return k % 256 ? -1 : k / 256 * 176;
        case KV_GGUF_Q6_K: return k % 256 ? -1 : k / 256 * 210;
        default: return -1;
    }
}

uint16_t u16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return v; }
uint32_t u32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return v; }

// ---- one group of 32 columns of one row, from a GGUF block into its lane ----

constexpr uint32_t NIBBLES = 0x0f0f0f0f, ONES = 0x01010101;

template <int HEADER> struct NibbleLane {
    uint8_t *block;
    int lane;
    void scale(uint16_t scale) const { memcpy(block + 2 * lane, &scale, 2); }
    void word(int j, uint32_t low, uint32_t high) const {  // columns 8j..8j+3 and 8j+4..8j+7, a nibble in each byte
        uint32_t v = low | high << 4;
        memcpy(block + HEADER + 64 * j + 4 * lane, &v, 4);
    }
};

struct Q4Lane : NibbleLane<64> {  // lane of a KV_Q4 block
    void scale(uint16_t scale, uint16_t min) const {
        NibbleLane::scale(scale);
        memcpy(block + 32 + 2 * lane, &min, 2);
    }
};

using Q4SLane = NibbleLane<32>;   // lane of a KV_Q4S block

struct Q8Lane {  // lane of a KV_Q8 block
    uint8_t *block;
    int lane;
    void scale(uint16_t scale) const { memcpy(block + 2 * lane, &scale, 2); }
    void word(int j, uint32_t v) const { memcpy(block + 32 + 64 * j + 4 * lane, &v, 4); }
};

// Q4_0 and Q4_1 hold column i in the low and column i + 16 in the high nibble of byte i.
template <class Lane> void nibbles_16(const uint8_t *q, Lane to) {
    for (int half = 0; half < 2; half++) {
        uint32_t a = u32(q + 8 * half), b = u32(q + 8 * half + 4);
        to.word(half, a & NIBBLES, b & NIBBLES);
        to.word(2 + half, a >> 4 & NIBBLES, b >> 4 & NIBBLES);
    }
}

void q4_0(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    const uint8_t *s = row + 18 * g;
    Q4Lane to{block, lane};
    to.scale(u16(s), f32_to_f16(-8 * f16_to_f32(u16(s))));
    nibbles_16(s + 2, to);
}

void q4_0_symmetric(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    const uint8_t *s = row + 18 * g;
    Q4SLane to{block, lane};
    to.scale(u16(s));
    nibbles_16(s + 2, to);
}

void q4_1(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    const uint8_t *s = row + 20 * g;
    Q4Lane to{block, lane};
    to.scale(u16(s), u16(s + 2));
    nibbles_16(s + 4, to);
}

// Q4_K and Q5_K: 256 columns share two f16 factors; eight groups of 32 have 6-bit scales and minima packed in 12 bytes.
struct Factors { float scale, min; };
Factors k_factors(const uint8_t *s, int i) {
    const uint8_t *packed = s + 4;
    int scale, min;
    if (i < 4) {
        scale = packed[i] & 63;
        min = packed[i + 4] & 63;
    } else {
        scale = (packed[i + 4] & 15) | (packed[i - 4] >> 6) << 4;
        min = packed[i + 4] >> 4 | (packed[i] >> 6) << 4;
    }
    return {f16_to_f32(u16(s)) * scale, -f16_to_f32(u16(s + 2)) * min};
}

// Groups 2i and 2i+1 are the low and the high nibbles of 32 bytes.
void q4_k(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    const uint8_t *s = row + 144 * (g / 8);
    const int i = (int)(g % 8);
    const Factors f = k_factors(s, i);
    Q4Lane to{block, lane};
    to.scale(f32_to_f16(f.scale), f32_to_f16(f.min));
    const uint8_t *q = s + 16 + 32 * (i / 2);
    int shift = 4 * (i % 2);
    for (int j = 0; j < 4; j++) to.word(j, u32(q + 8 * j) >> shift & NIBBLES, u32(q + 8 * j + 4) >> shift & NIBBLES);
}

void q8_0(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    const uint8_t *s = row + 34 * g;
    Q8Lane to{block, lane};
    to.scale(u16(s));
    for (int j = 0; j < 8; j++) to.word(j, u32(s + 2 + 4 * j));
}

// Q5_0: value = scale*(q - 16); bit i of the 32-bit word is the fifth bit of column i, nibbles lie as in Q4_0.
void q5_0(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    const uint8_t *s = row + 22 * g;
    Q8Lane to{block, lane};
    to.scale(u16(s));
    uint32_t fifth = u32(s + 2);
    for (int j = 0; j < 8; j++) {
        uint32_t low = u32(s + 6 + 4 * (j % 4)) >> 4 * (j / 4) & NIBBLES;
        uint32_t bits = (fifth >> 4 * j & 15) * 0x00204081 & ONES;  // bit i to byte i
        to.word(j, low | (bits ^ ONES) * 0xf0);                     // q - 16 has its high nibble set where the bit is 0
    }
}

void floats_to_q8(const float *x, uint8_t *block, int lane) {
    int8_t q[KV_GROUP];
    uint16_t scale;
    quantize_q8(x, &scale, q);
    Q8Lane to{block, lane};
    to.scale(scale);
    for (int j = 0; j < 8; j++) to.word(j, u32((const uint8_t *)q + 4 * j));
}

// Q5_K: as Q4_K, and bit i of byte c of 32 more is the fifth bit of column c of group i.
void q5_k(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    const uint8_t *s = row + 176 * (g / 8), *fifth = s + 16;
    const int i = (int)(g % 8), shift = 4 * (i % 2);
    const uint8_t *q = s + 48 + 32 * (i / 2);
    const Factors f = k_factors(s, i);
    float x[KV_GROUP];
    for (int c = 0; c < KV_GROUP; c++) x[c] = f.scale * ((q[c] >> shift & 15) | (fifth[c] >> i & 1) << 4) + f.min;
    floats_to_q8(x, block, lane);
}

// Q6_K: value = d*scale*(q - 32), an int8 scale for 16 columns. Of 128 columns, the four groups of 32 have their lower
// bits in the low nibbles of bytes 0..31 and 32..63, then in the high ones, and their upper two in 32 bytes more.
void q6_k(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    const uint8_t *s = row + 210 * (g / 8);
    const int half = (int)(g % 8 / 4), i = (int)(g % 4);
    const uint8_t *low = s + 64 * half + 32 * (i % 2), *high = s + 128 + 32 * half;
    const int8_t *scale = (const int8_t *)s + 192 + 8 * half + 2 * i;
    const float d = f16_to_f32(u16(s + 208));
    float x[KV_GROUP];
    for (int c = 0; c < KV_GROUP; c++) {
        const int q = (low[c] >> (i / 2 * 4) & 15) | (high[c] >> 2 * i & 3) << 4;
        x[c] = d * scale[c / 16] * (q - 32);
    }
    floats_to_q8(x, block, lane);
}

using GroupPacker = void (*)(const uint8_t *row, int64_t group, uint8_t *block, int lane);

template <GroupPacker pack> void pack_groups(uint8_t *block, int64_t block_bytes, int64_t groups, const uint8_t *src,
                                             int64_t row_bytes, int lane, int rows) {
    for (int64_t g = 0; g < groups; g++)
        for (int r = 0; r < rows; r++) pack(src + r * row_bytes, g, block + g * block_bytes, lane + r);
}

// ---- floats ----

template <int SRC> float as_f32(const uint8_t *row, int64_t c) {
    if (SRC == KV_F32) return bits_f32(u32(row + 4 * c));
    uint16_t v = u16(row + 2 * c);
    return SRC == KV_F16 ? f16_to_f32(v) : bf16_to_f32(v);
}

// The 32-bit word of a packed row that begins with column c: a float, or columns c and c+1 in 16 bits each.
template <int SRC, int DST> uint32_t word(const uint8_t *row, int64_t c) {
    if (DST == KV_F32) return f32_bits(as_f32<SRC>(row, c));
    if (SRC == DST) return u32(row + 2 * c);
    float a = as_f32<SRC>(row, c), b = as_f32<SRC>(row, c + 1);
    return DST == KV_F16 ? f32_to_f16(a) | (uint32_t)f32_to_f16(b) << 16 : f32_to_bf16(a) | (uint32_t)f32_to_bf16(b) << 16;
}

template <int SRC, int DST> void pack_floats(uint8_t *block, int64_t k, const uint8_t *src, int64_t row_bytes, int lane, int rows) {
    constexpr int STEP = DST == KV_F32 ? 1 : 2, SPAN = 16 * STEP;   // columns of a word, and of a square of 16 x 16 words
    for (int64_t c = 0; c < k; c += SPAN) {
        uint32_t square[16][16] = {};                               // [lane][word]
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < 16; w++) square[r][w] = word<SRC, DST>(src + r * row_bytes, c + w * STEP);
        for (int w = 0; w < 16; w++) {
            uint32_t line[16];
            for (int r = 0; r < 16; r++) line[r] = square[r][w];
            memcpy(block + (c / STEP + w) * 64 + 4 * lane, line, 4 * rows);
        }
    }
}

using FloatPacker = void (*)(uint8_t *block, int64_t k, const uint8_t *src, int64_t row_bytes, int lane, int rows);

template <int SRC> FloatPacker float_packer(int32_t dtype) {
    return dtype == KV_F32 ? pack_floats<SRC, KV_F32> : dtype == KV_F16 ? pack_floats<SRC, KV_F16> : pack_floats<SRC, KV_BF16>;
}

// A group of 32 columns of one float row, quantized into its lane.
template <int SRC> void to_q8(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    float x[KV_GROUP];
    for (int c = 0; c < KV_GROUP; c++) x[c] = as_f32<SRC>(row, g * KV_GROUP + c);
    floats_to_q8(x, block, lane);
}

template <int SRC> void to_q4(const uint8_t *row, int64_t g, uint8_t *block, int lane) {
    float x[KV_GROUP];
    uint8_t q[KV_GROUP];
    uint16_t scale, min;
    for (int c = 0; c < KV_GROUP; c++) x[c] = as_f32<SRC>(row, g * KV_GROUP + c);
    quantize_q4(x, &scale, &min, q);
    Q4Lane to{block, lane};
    to.scale(scale, min);
    for (int j = 0; j < 4; j++) to.word(j, u32(q + 8 * j), u32(q + 8 * j + 4));
}

template <int SRC> void pack_from_floats(int32_t dtype, uint8_t *block, int64_t k, const uint8_t *src, int64_t row_bytes, int lane, int rows) {
    switch (dtype) {
        case KV_Q8: return pack_groups<to_q8<SRC>>(block, KV_Q8_BLOCK, k / KV_GROUP, src, row_bytes, lane, rows);
        case KV_Q4: return pack_groups<to_q4<SRC>>(block, KV_Q4_BLOCK, k / KV_GROUP, src, row_bytes, lane, rows);
        default: return float_packer<SRC>(dtype)(block, k, src, row_bytes, lane, rows);
    }
}

// Rows lane..15 of a block become zero.
void zero_lanes(uint8_t *block, int32_t dtype, int64_t k, int lane) {
    const Unit unit = unit_of(dtype);
    for (const uint8_t *end = block + column_bytes(dtype, k); block < end; block += unit.bytes) {
        for (int64_t h = 0; h < unit.header; h += 32) memset(block + h + 2 * lane, 0, 32 - 2 * lane);
        for (int64_t w = unit.header; w < unit.bytes; w += 64) memset(block + w + 4 * lane, 0, 64 - 4 * lane);
    }
}

bool accepts(int32_t dtype, int32_t src_dtype) {
    switch (src_dtype) {
        case KV_F32: case KV_F16: case KV_BF16: return dtype != KV_Q4S;
        case KV_GGUF_Q4_0: return dtype == KV_Q4S || dtype == KV_Q4;
        case KV_GGUF_Q4_1: case KV_GGUF_Q4_K: return dtype == KV_Q4;
        case KV_GGUF_Q5_0: case KV_GGUF_Q8_0: case KV_GGUF_Q5_K: case KV_GGUF_Q6_K: return dtype == KV_Q8;
        default: return false;
    }
}

float unpack_one(const uint8_t *block, int32_t dtype, int lane, int64_t c) {
    switch (dtype) {
        case KV_F32: return bits_f32(u32(block + 64 * c + 4 * lane));
        case KV_F16: return f16_to_f32(u16(block + 64 * (c / 2) + 4 * lane + 2 * (c % 2)));
        case KV_BF16: return bf16_to_f32(u16(block + 64 * (c / 2) + 4 * lane + 2 * (c % 2)));
        case KV_Q8: {
            const uint8_t *b = block + c / KV_GROUP * KV_Q8_BLOCK;
            int i = (int)(c % KV_GROUP);
            return f16_to_f32(u16(b + 2 * lane)) * (int8_t)b[32 + 64 * (i / 4) + 4 * lane + i % 4];
        }
        default: {
            const Unit unit = unit_of(dtype);
            const uint8_t *b = block + c / KV_GROUP * unit.bytes;
            int i = (int)(c % KV_GROUP), q = b[unit.header + 64 * (i / 8) + 4 * lane + i % 4] >> (i % 8 / 4 * 4) & 15;
            const float scale = f16_to_f32(u16(b + 2 * lane));
            return dtype == KV_Q4S ? scale * (q - 8) : scale * q + f16_to_f32(u16(b + 32 + 2 * lane));
        }
    }
}

bool valid_rows(const kv_weight &w, int64_t row0, int64_t rows) {
    return kv_pack_bytes(w.dtype, w.n, w.k) >= 0 && row0 >= 0 && rows >= 0 && row0 + rows <= w.n;
}

}  // namespace

EXPORT int64_t kv_pack_bytes(int32_t dtype, int64_t n, int64_t k) {
    int64_t bytes = column_bytes(dtype, k);
    if (bytes < 0 || n < 0 || k < 0 || k % KV_GROUP) return -1;
    return (n + KV_LANES - 1) / KV_LANES * bytes;
}

EXPORT int32_t kv_pack(const kv_weight *dst, int64_t row0, int64_t rows, const void *src, int32_t src_dtype) {
    if (!valid_rows(*dst, row0, rows) || !accepts(dst->dtype, src_dtype)) return KV_BAD_PLAN;
    int64_t k = dst->k, row_bytes = source_bytes(src_dtype, k), block_bytes = column_bytes(dst->dtype, k);
    if (row_bytes < 0) return KV_BAD_PLAN;
    uint8_t *data = (uint8_t *)dst->data;
    const uint8_t *from = (const uint8_t *)src;
    for (int64_t row = row0, end = row0 + rows; row < end;) {
        int lane = (int)(row % KV_LANES);
        int count = (int)(end - row < KV_LANES - lane ? end - row : KV_LANES - lane);
        uint8_t *block = data + row / KV_LANES * block_bytes;
        int64_t groups = k / KV_GROUP;
        switch (src_dtype) {
            case KV_GGUF_Q4_0:
                if (dst->dtype == KV_Q4S) pack_groups<q4_0_symmetric>(block, KV_Q4S_BLOCK, groups, from, row_bytes, lane, count);
                else pack_groups<q4_0>(block, KV_Q4_BLOCK, groups, from, row_bytes, lane, count);
                break;
            case KV_GGUF_Q4_1: pack_groups<q4_1>(block, KV_Q4_BLOCK, groups, from, row_bytes, lane, count); break;
            case KV_GGUF_Q4_K: pack_groups<q4_k>(block, KV_Q4_BLOCK, groups, from, row_bytes, lane, count); break;
            case KV_GGUF_Q5_K: pack_groups<q5_k>(block, KV_Q8_BLOCK, groups, from, row_bytes, lane, count); break;
            case KV_GGUF_Q6_K: pack_groups<q6_k>(block, KV_Q8_BLOCK, groups, from, row_bytes, lane, count); break;
            case KV_GGUF_Q5_0: pack_groups<q5_0>(block, KV_Q8_BLOCK, groups, from, row_bytes, lane, count); break;
            case KV_GGUF_Q8_0: pack_groups<q8_0>(block, KV_Q8_BLOCK, groups, from, row_bytes, lane, count); break;
            case KV_F32: pack_from_floats<KV_F32>(dst->dtype, block, k, from, row_bytes, lane, count); break;
            case KV_F16: pack_from_floats<KV_F16>(dst->dtype, block, k, from, row_bytes, lane, count); break;
            default: pack_from_floats<KV_BF16>(dst->dtype, block, k, from, row_bytes, lane, count);
        }
        row += count;
        from += count * row_bytes;
        if (row == dst->n && row % KV_LANES) zero_lanes(block, dst->dtype, k, (int)(row % KV_LANES));
    }
    return KV_OK;
}

EXPORT int32_t kv_unpack(const kv_weight *w, int64_t row0, int64_t rows, float *out) {
    if (!valid_rows(*w, row0, rows)) return KV_BAD_PLAN;
    int64_t block_bytes = column_bytes(w->dtype, w->k);
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *block = (const uint8_t *)w->data + (row0 + r) / KV_LANES * block_bytes;
        for (int64_t c = 0; c < w->k; c++) out[r * w->k + c] = unpack_one(block, w->dtype, (int)((row0 + r) % KV_LANES), c);
    }
    return KV_OK;
}
