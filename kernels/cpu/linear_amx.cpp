// linear_amx.cpp - prefill on AMX tiles. Activations are rounded to bfloat16 once per op, weights are widened to a panel
// of bfloat16 tiles once per op; products are exact and added in float32. A tile row is one activation row, so no row
// influences another.
#include "linear.h"

#if defined(__AMX_TILE__)

namespace KV_NS {

// Bfloat16 terms that stand for one activation: 1 (8 bits), or 2 (16 bits, at twice the products).
static constexpr int TERMS = 1;
static constexpr int64_t TILE = 1024;          // 16 rows of 32 bfloat16
static constexpr int BLOCKS = 2;               // weight blocks of a panel

static int64_t tiles_bytes(const kv_op_linear &op, int64_t rows) {  // activations as [row block][group][term] tiles
    return (rows + KV_LANES - 1) / KV_LANES * (op.w.k / KV_GROUP) * TERMS * TILE;
}
static int64_t thread_bytes(const kv_op_linear &op) { return BLOCKS * (op.w.k / KV_GROUP) * TILE + 4 * TILE; }

int64_t linear_prefill_scratch(const kv_op_linear &op, int max_rows, int threads) {
    return tiles_bytes(op, max_rows) + threads * thread_bytes(op);
}

// 16 rows of x, from `row` on, as tiles; rows past the last are zero.
static void round_rows(const kv_op_linear &op, int64_t row, int64_t rows, char *tiles) {
    int64_t groups = op.w.k / KV_GROUP;
    for (int64_t r = 0; r < KV_LANES; r++) {
        const float *x = op.x + (row + r) * op.w.k;
        char *to = tiles + r * 64;
        for (int64_t g = 0; g < groups; g++, x += KV_GROUP, to += TERMS * TILE) {
            __m512 a = _mm512_setzero_ps(), b = a;
            if (row + r < rows) {
                a = _mm512_loadu_ps(x);
                b = _mm512_loadu_ps(x + 16);
            }
            __m512i high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
            _mm512_store_si512(to, high);
            if (TERMS == 2) {
                a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(high)), 16)));
                b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(high, 1)), 16)));
                _mm512_store_si512(to + TILE, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            }
        }
    }
}

// One weight block as tiles: row p holds columns 2p and 2p+1 of the 16 weight rows.
template <class W> static __attribute__((noinline)) void widen(const uint8_t *data, int64_t groups, char *tiles) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(order);
    for (int64_t g = 0; g < groups; g++, data += W::UNIT, tiles += TILE) {
        for (int64_t line = 0; line < W::UNIT; line += 64) prefetch(data + 2048 + line);
        f32x16 step = splat(1.f), min = splat(0.f);
        if constexpr (W::SCALED) step = W::step(data);
        if constexpr (W::MIN) min = W::min(data);
        W::pairs(data, [&](int c, f32x16 even, f32x16 odd) __attribute__((always_inline)) {
            if constexpr (W::MIN) { even = fma(even, step, min); odd = fma(odd, step, min); }
            else if constexpr (W::SCALED) { even = even * step; odd = odd * step; }
            __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);
            _mm512_store_si512(tiles + c * 32, _mm512_permutexvar_epi16(interleave, pair));
        });
    }
}

// out[16*R][16*B] = R row blocks times B weight blocks. a1 and b1 are used where R and B are 2.
template <int R, int B> static __attribute__((noinline)) void multiply(const char *a0, const char *a1, const char *b0, const char *b1,
                                                                       int64_t groups, float *out) {
    asm volatile("" ::: "memory");             // the tile loads below do not tell the compiler that they read memory
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t g = 0; g < groups; g++) {
        int64_t b = g * TILE;
        _tile_loadd(6, b0 + b, 64);
        if constexpr (B == 2) _tile_loadd(7, b1 + b, 64);
        for (int64_t a = b * TERMS; a < (b + TILE) * TERMS; a += TILE) {
            _tile_loadd(4, a0 + a, 64);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (B == 2) _tile_dpbf16ps(1, 4, 7);
            if constexpr (R == 2) {
                _tile_loadd(5, a1 + a, 64);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (B == 2) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, out, 128);
    if constexpr (B == 2) _tile_stored(1, out + 16, 128);
    if constexpr (R == 2) _tile_stored(2, out + 16 * 32, 128);
    if constexpr (R == 2 && B == 2) _tile_stored(3, out + 16 * 32 + 16, 128);
    asm volatile("" ::: "memory");
}

using Multiply = void (*)(const char *, const char *, const char *, const char *, int64_t, float *);

void linear_prefill(const kv_op_linear &op, int rows, kv::Worker &worker) {
    const int64_t groups = op.w.k / KV_GROUP, blocks = blocks_of(op.w), row_blocks = (rows + KV_LANES - 1) / KV_LANES;
    const int64_t block_bytes = kv_pack_bytes(op.w.dtype, KV_LANES, op.w.k), row_block_bytes = groups * TERMS * TILE;
    char *tiles = worker.scratch, *own = tiles + tiles_bytes(op, rows) + worker.thread * thread_bytes(op);
    float *out = (float *)(own + BLOCKS * groups * TILE);
    worker.split(row_blocks, 1, [&](int64_t i, int64_t) { round_rows(op, i * KV_LANES, rows, tiles + i * row_block_bytes); });
    worker.barrier();
    worker.split((blocks + BLOCKS - 1) / BLOCKS, 1, [&](int64_t p, int64_t) {
        const int64_t block = p * BLOCKS, count = blocks - block < BLOCKS ? blocks - block : BLOCKS;
        const uint8_t *data = (const uint8_t *)op.w.data + block * block_bytes;
        const char *b0 = own, *b1 = own + groups * TILE;
        if (op.w.dtype == KV_BF16) {           // lies in memory as tiles
            b0 = (const char *)data;
            b1 = b0 + block_bytes;
        } else {
            with_format(op.w.dtype, [&](auto format) {
                for (int64_t b = 0; b < count; b++) widen<decltype(format)>(data + b * block_bytes, groups, own + b * groups * TILE);
            });
        }
        // Meanwhile the panel that this thread probably takes next comes into the cache.
        const uint8_t *next = data + worker.threads * BLOCKS * block_bytes;
        const int64_t share = align64(BLOCKS * block_bytes / ((row_blocks + 1) / 2));
        for (int64_t i = 0; i < row_blocks; i += 2) {
            for (int64_t line = 0; line < share; line += 64) __builtin_prefetch(next + line, 0, 2);
            next += share;
            const char *a0 = tiles + i * row_block_bytes, *a1 = a0 + row_block_bytes;
            bool pair = i + 1 < row_blocks;
            Multiply run = count == 2 ? (pair ? multiply<2, 2> : multiply<1, 2>) : pair ? multiply<2, 1> : multiply<1, 1>;
            run(a0, a1, b0, b1, groups, out);
            const int64_t row = i * KV_LANES, left = rows - row;
            linear_finish(op, row, left < 2 * KV_LANES ? left : 2 * KV_LANES, block, count, out, 32);
        }
    });
}

}  // namespace KV_NS

#endif
