// linear_amx.cpp - prefill on AMX tiles. Activations become one or two terms of bfloat16 once per op, weights are widened to a panel
// of bfloat16 tiles once per op; products are exact and added in float32. A tile row is one activation row, so no row
// influences another.
#include "act.h"
#include "linear.h"

#if defined(__AMX_TILE__)

namespace KV_NS {

// Bfloat16 terms that stand for one activation: 2 (16 bits, at twice the products), or 1 (8 bits) where more columns are added up
// than there are rows, as in down projections: SmolLM2-135M's mean KL divergence from float32 is 6.3e-5 then instead of 5.0e-5.
// With 1 everywhere it would be 1.3e-4, and one greedy answer in ten would turn out differently.
static int terms_of(const kv_op_linear &op) { return op.w.k > op.w.n ? 1 : 2; }
static constexpr int MOST_TERMS = 2;
static constexpr int64_t TILE = 1024;            // 16 rows of 32 bfloat16
static constexpr int BLOCKS = 2;                 // weight blocks of a panel
static constexpr int64_t DEPTH = 6;              // groups of one pass over the activations: what stays in the first-level cache
static constexpr int64_t MOST_BYTES = 1600 << 10; // activations of one part: what stays in the second-level cache
static constexpr int64_t MOST_PARTS = 24;

static int64_t tiles_bytes(const kv_op_linear &op, int64_t rows, int terms) {  // activations as [row block][group][term] tiles
    return (rows + KV_LANES - 1) / KV_LANES * (op.w.k / KV_GROUP) * terms * TILE;
}

static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The activations are cut into parts of so many rows. A thread has a part of its own as long as there are enough, for
// what it has just written is slow to reach another core; a part below 64 rows does not repay widening the weights again.
static int64_t part_rows(const kv_op_linear &op, int64_t rows, int threads, int terms) {
    int64_t fit = MOST_BYTES / (op.w.k * 2 * terms), part = up(rows, threads);
    if (part > fit) part = up(rows, up(rows, fit));
    if (part < 64) part = 64;
    if (part < up(rows, MOST_PARTS)) part = up(rows, MOST_PARTS);
    return up(part, 32) * 32;
}
// At least part_rows() of any number of terms, and not less for more rows.
static int64_t most_part_rows(const kv_op_linear &op, int64_t rows, int threads) {
    int64_t fit = MOST_BYTES / (op.w.k * 2), part = up(rows, threads);
    if (part > fit) part = fit;
    if (part < 64) part = 64;
    if (part < up(rows, MOST_PARTS)) part = up(rows, MOST_PARTS);
    return up(part, 32) * 32;
}
static constexpr int64_t PANEL = BLOCKS * DEPTH * TILE;
static int64_t thread_bytes(const kv_op_linear &op, int64_t rows, int threads) {
    return PANEL + most_part_rows(op, rows, threads) * BLOCKS * KV_LANES * (int64_t)sizeof(float);
}

int64_t linear_tiles_scratch(const kv_op_linear &op, int max_rows, int threads) {
    return tiles_bytes(op, max_rows, MOST_TERMS) + threads * thread_bytes(op, max_rows, threads);
}

// 16 rows of x, from `row` on, as tiles; rows past the last are zero.
template <int TERMS> static void round_rows(const kv_op_linear &op, int64_t row, int64_t rows, char *tiles) {
    const int64_t k = op.w.k, height = rows - row < KV_LANES ? rows - row : KV_LANES;
    for (int64_t c = 0; c < k; c += KV_GROUP, tiles += TERMS * TILE)
        for (int64_t r = 0; r < KV_LANES; r++) {
            char *to = tiles + r * 64;
            __m512 a = _mm512_setzero_ps(), b = a;
            if (r < height) {
                const float *x = op.x + (row + r) * k + c;
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

// One weight block as tiles: row p holds columns 2p and 2p+1 of the 16 weight rows.
template <class W> static __attribute__((noinline)) void widen(const uint8_t *data, int64_t groups, char *tiles) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(order);
    for (int64_t g = 0; g < groups; g++, data += W::UNIT, tiles += TILE) {
        for (int64_t line = 0; line < W::UNIT; line += 64) KV_PREFETCH(data + 2048 + line);
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

// sums[16*R][32] = (first ? 0 : sums) + R row blocks times B weight blocks. a1 and b1 are used where R and B are 2.
template <int R, int B, int TERMS> static __attribute__((noinline)) void multiply(const char *a0, const char *a1, const char *b0, const char *b1,
                                                                       int64_t groups, float *sums, bool first) {
    constexpr int64_t LINE = 32, DOWN = KV_LANES * LINE, RIGHT = KV_LANES;
    asm volatile("" ::: "memory");               // the tile loads below do not tell the compiler that they read memory
    if (first) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 4 * LINE);
        if constexpr (B == 2) _tile_loadd(1, sums + RIGHT, 4 * LINE);
        if constexpr (R == 2) _tile_loadd(2, sums + DOWN, 4 * LINE);
        if constexpr (R == 2 && B == 2) _tile_loadd(3, sums + DOWN + RIGHT, 4 * LINE);
    }
    for (int64_t g = 0; g < groups; g++, b0 += TILE, b1 += TILE) {
        _tile_loadd(6, b0, 64);
        if constexpr (B == 2) _tile_loadd(7, b1, 64);
#pragma GCC unroll 2
        for (int t = 0; t < TERMS; t++, a0 += TILE, a1 += TILE) {
            _tile_loadd(4, a0, 64);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (B == 2) _tile_dpbf16ps(1, 4, 7);
            if constexpr (R == 2) {
                _tile_loadd(5, a1, 64);
                _tile_dpbf16ps(2, 5, 6);
                if constexpr (B == 2) _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, 4 * LINE);
    if constexpr (B == 2) _tile_stored(1, sums + RIGHT, 4 * LINE);
    if constexpr (R == 2) _tile_stored(2, sums + DOWN, 4 * LINE);
    if constexpr (R == 2 && B == 2) _tile_stored(3, sums + DOWN + RIGHT, 4 * LINE);
    asm volatile("" ::: "memory");
}

// act.out of `rows` rows and one block of columns, from sums[rows][2][16] of its gate and of its up projection.
static void act_finish(const kv_op_act &op, int64_t row, int64_t rows, int64_t block, const float *sums) {
    with_activation(op.kind, [&](auto f) {
        float *out = op.out + row * op.dim + block * KV_LANES;
        for (int64_t r = 0; r < rows; r++, out += op.dim, sums += 2 * KV_LANES) store(out, f(load(sums)) * load(sums + KV_LANES));
    });
}

template <int TERMS> static void run_tiles(const kv_op_linear &op, const kv_op_act *act, int rows, kv::Worker &worker) {
    const int64_t groups = op.w.k / KV_GROUP, blocks = blocks_of(op.w), panels = (blocks + BLOCKS - 1) / BLOCKS;
    // A panel is two neighbours, or a block of the gate projection and that of the up projection.
    const int64_t step = act ? 1 : BLOCKS, apart = act ? blocks / 2 : 1;
    const int64_t block_bytes = kv_pack_bytes(op.w.dtype, KV_LANES, op.w.k), row_block_bytes = groups * TERMS * TILE;
    const int64_t most = part_rows(op, rows, worker.threads, TERMS), parts = (rows + most - 1) / most;
    char *tiles = worker.scratch, *own = tiles + tiles_bytes(op, rows, TERMS) + worker.thread * thread_bytes(op, rows, worker.threads);
    float *sums = (float *)(own + PANEL);
    auto height_of = [&](int64_t part) { return rows - part * most < most ? rows - part * most : most; };

    split_parts(worker, parts, 1, [&](int64_t part) { return (height_of(part) + KV_LANES - 1) / KV_LANES; },
                [&](int64_t part, int64_t i, int64_t) {
        const int64_t row_block = part * most / KV_LANES + i;
        round_rows<TERMS>(op, row_block * KV_LANES, rows, tiles + row_block * row_block_bytes);
    });
    worker.barrier();
    split_parts(worker, parts, 1, [&](int64_t) { return panels; }, [&](int64_t part, int64_t panel, int64_t) {
        const int64_t block = panel * step, count = blocks - block < BLOCKS ? blocks - block : BLOCKS;
        const int64_t row = part * most, height = height_of(part);
        const uint8_t *data = (const uint8_t *)op.w.data + block * block_bytes;
        // Meanwhile the panel that this thread probably takes next comes into the cache.
        const int64_t calls = (groups + DEPTH - 1) / DEPTH * ((height + 31) / 32), share = align64(block_bytes / calls);
        const uint8_t *next = data + step * block_bytes;
        for (int64_t g = 0; g < groups; g += DEPTH) {
            const int64_t depth = groups - g < DEPTH ? groups - g : DEPTH;
            const char *b0 = own, *b1 = own + DEPTH * TILE;
            if (op.w.dtype == KV_BF16) {         // lies in memory as tiles
                b0 = (const char *)data + g * TILE;
                b1 = b0 + apart * block_bytes;
            } else {
                with_format(op.w.dtype, [&](auto format) {
                    using W = decltype(format);
                    for (int64_t b = 0; b < count; b++) widen<W>(data + b * apart * block_bytes + g * W::UNIT, depth, own + b * DEPTH * TILE);
                });
            }
            for (int64_t r = 0; r < height; r += 2 * KV_LANES, next += share) {
                for (int64_t line = 0; line < share; line += 64) {
                    KV_PREFETCH(next + line);
                    KV_PREFETCH(next + apart * block_bytes + line);
                }
                const char *a0 = tiles + (row + r) / KV_LANES * row_block_bytes + g * TERMS * TILE, *a1 = a0 + row_block_bytes;
                const bool pair = r + KV_LANES < height;
                auto run = count == 2 ? (pair ? multiply<2, 2, TERMS> : multiply<1, 2, TERMS>) : pair ? multiply<2, 1, TERMS> : multiply<1, 1, TERMS>;
                run(a0, a1, b0, b1, depth, sums + r * 32, g == 0);
            }
        }
        if (act) act_finish(*act, row, height, block, sums);
        else linear_finish(op, row, height, block, count, sums, 32);
    });
}

void linear_tiles(const kv_op_linear &op, const kv_op_act *act, int rows, kv::Worker &worker) {
    if (terms_of(op) == 2) run_tiles<2>(op, act, rows, worker);
    else run_tiles<1>(op, act, rows, worker);
}

}  // namespace KV_NS

#endif
