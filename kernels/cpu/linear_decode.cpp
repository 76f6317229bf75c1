// linear_decode.cpp - few rows: bound by reading the weights once. 16 weight rows sit in the lanes, so nothing is added
// across lanes; a row's sums are formed in the same order whatever the number of rows or threads.
//
// Weights in 8 and 4 bits are multiplied as integers, with activations rounded to 16 bits (digits.h): a core then keeps up
// with the memory. All others are widened to float32.
#include "linear.h"
#include <type_traits>

namespace KV_NS {

static constexpr int ROWS = 64;        // activation rows of one pass over the weights
static constexpr int64_t RANGE = 12288; // bytes of weights that a thread takes at a time, about half a microsecond's worth
static constexpr int64_t MOST_PARTS = 24;

// Activation rows that share a weight in registers.
#if defined(__AVX512F__)
static constexpr int TILE = 8;
#elif defined(__AVX2__)
static constexpr int TILE = 2;
#else
static constexpr int TILE = 1;
#endif

// How one row reads: from so many places at once, prefetching so many bytes ahead. Two cores read 57 instead of 49 GB/s
// from the last-level cache with two streams; from memory, four streams with little ahead gained another tenth.
struct Reading { int streams; int64_t ahead; };
#if defined(__AVX2__)
static constexpr Reading CACHE{2, 4096}, MEMORY{4, 1024};
#else
static constexpr Reading CACHE{1, 1024}, MEMORY{1, 1024};
#endif

// What a format multiplies with: rows of float32 and their sums over each group, or of digits.
template <class W> struct Floats {
    const float *x, *sums;
    int64_t k;

    static int64_t bytes(int64_t groups) { return W::MIN ? groups * (int64_t)sizeof(float) : 0; }

    static void prepare(const float *x, int64_t groups, char *to) {
        if (W::MIN)
            for (int64_t g = 0; g < groups; g++) ((float *)to)[g] = sum(load(x + g * KV_GROUP) + load(x + g * KV_GROUP + 16));
    }

    Floats(const float *x, const char *prepared, int64_t row, int64_t groups)
        : x(x + row * groups * KV_GROUP), sums((const float *)prepared + row * groups), k(groups * KV_GROUP) {}

    // y[s][r] = sum over columns of the weights of the block at s*stride times x[r]
    template <int R, int S>
    KV_INLINE void dot(const uint8_t *block, int64_t stride, int64_t groups, int64_t ahead, float *y) const {
        const f32x16 zero = splat(0.f);
        f32x16 total[S][R], even[S][R], odd[S][R];
#pragma GCC unroll 4
        for (int s = 0; s < S; s++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) total[s][r] = even[s][r] = odd[s][r] = zero;
        for (int64_t g = 0; g < groups; g++, block += W::UNIT) {
            const float *from = x + g * KV_GROUP;
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                const uint8_t *unit = block + s * stride;
                for (int64_t b = 0; b < W::UNIT; b += 64) KV_PREFETCH(unit + ahead + b);
                if constexpr (W::SCALED) {
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) even[s][r] = odd[s][r] = zero;
                }
                W::pairs(unit, [&](int c, f32x16 a, f32x16 b) __attribute__((always_inline)) {
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        even[s][r] = fma(a, splat(from[r * k + c]), even[s][r]);
                        odd[s][r] = fma(b, splat(from[r * k + c + 1]), odd[s][r]);
                    }
                });
                if constexpr (W::SCALED) {
                    f32x16 step = W::step(unit);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) total[s][r] = fma(step, even[s][r] + odd[s][r], total[s][r]);
                }
                if constexpr (W::MIN) {
                    f32x16 min = W::min(unit);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) total[s][r] = fma(min, splat(sums[r * groups + g]), total[s][r]);
                }
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < S; s++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) store(y + (s * R + r) * KV_LANES, W::SCALED ? total[s][r] : even[s][r] + odd[s][r]);
    }
};

#if defined(__AVX2__)

template <class W> struct Digits {
    const Group *x;

    static int64_t bytes(int64_t groups) { return groups * (int64_t)sizeof(Group); }

    static void prepare(const float *x, int64_t groups, char *to) {
        for (int64_t g = 0; g < groups; g++) to_digits(x + g * KV_GROUP, W::OFFSET, ((Group *)to)[g]);
    }

    Digits(const float *, const char *prepared, int64_t row, int64_t groups) : x((const Group *)prepared + row * groups) {}

    template <int R, int S>
    KV_INLINE void dot(const uint8_t *block, int64_t stride, int64_t groups, int64_t ahead, float *y) const {
        f32x16 total[S][R];
#pragma GCC unroll 4
        for (int s = 0; s < S; s++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) total[s][r] = splat(0.f);
        for (int64_t g = 0; g < groups; g++, block += W::UNIT) {
            const Group *from = x + g;
#pragma GCC unroll 4
            for (int s = 0; s < S; s++) {
                const uint8_t *unit = block + s * stride;
                for (int64_t b = 0; b < W::UNIT; b += 64) KV_PREFETCH(unit + ahead + b);
                DigitSum d[R];
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) d[r].start(W::OFFSET ? from[r * groups].start : 0);
                W::quads(unit, [&](int quad, u32x16 w) __attribute__((always_inline)) {
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) d[r].add(w, from[r * groups], quad);
                });
                const f32x16 scale = W::scale(unit);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) total[s][r] = fma(scale * splat(from[r * groups].scale), d[r].value(), total[s][r]);
                if constexpr (W::MIN) {
                    const f32x16 min = W::min(unit);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) total[s][r] = fma(min, splat(from[r * groups].sum), total[s][r]);
                }
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < S; s++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) store(y + (s * R + r) * KV_LANES, total[s][r]);
    }
};

template <class W> using Factors = std::conditional_t<W::SCALED, Digits<W>, Floats<W>>;

#else

template <class W> using Factors = Floats<W>;

#endif

static int64_t prepared_bytes(const kv_op_linear &op) {
    int64_t most = 0;                  // of any format, so that it is known before the format of the weights is
    auto ask = [&](auto format) {
        const int64_t bytes = align64(ROWS * Factors<decltype(format)>::bytes(op.w.k / KV_GROUP));
        if (bytes > most) most = bytes;
    };
    for (int dtype = KV_F32; dtype <= KV_Q4S; dtype++) with_format(dtype, ask);
    return most;
}

int64_t linear_decode_scratch(const kv_op_linear &op, int threads) { return threads * prepared_bytes(op); }

struct Pass {
    const kv_op_linear &op;
    const float *x;
    const char *prepared;
    int64_t row, groups, ahead;        // first activation row of this pass; bytes of prefetch
};

// R activation rows times S blocks that lie `apart` blocks from each other.
template <class W, int R, int S> static __attribute__((noinline)) void tile(const Pass &pass, int64_t block, int64_t apart, int r) {
    float y[S * R * KV_LANES];
    const int64_t bytes = pass.groups * W::UNIT;
    const uint8_t *data = (const uint8_t *)pass.op.w.data + block * bytes;
    Factors<W>(pass.x, pass.prepared, r, pass.groups).template dot<R, S>(data, apart * bytes, pass.groups, pass.ahead, y);
    for (int s = 0; s < S; s++) linear_finish(pass.op, pass.row + r, R, block + s * apart, 1, y + s * R * KV_LANES, KV_LANES);
}

// A thread's share of the blocks, as stretches of equal length, one for each stream, and what is left over.
struct Share {
    int64_t first, length, rest;

    Share(int64_t blocks, int64_t part, int64_t parts, int streams) {
        first = part * blocks / parts;
        const int64_t all = (part + 1) * blocks / parts - first;
        length = all / streams;
        rest = all - length * streams;
    }
};

template <class W> static void decode(const kv_op_linear &op, int rows, kv::Worker &worker) {
    const int64_t k = op.w.k, groups = k / KV_GROUP, blocks = blocks_of(op.w), block_bytes = groups * W::UNIT;
    const int64_t parts = worker.threads < MOST_PARTS ? worker.threads : MOST_PARTS;
    char *prepared = worker.scratch + worker.thread * prepared_bytes(op);
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int count = rows - row < ROWS ? (int)(rows - row) : ROWS;
        const Reading how = worker.from_memory ? MEMORY : CACHE;
        const int streams = count == 1 ? how.streams : 1;
        if (row) worker.barrier();     // there are only so many counters for split_parts
        auto share_of = [&](int64_t part) { return Share(blocks, part, parts, streams); };
        const Share own = share_of(worker.thread * parts / worker.threads);
        for (int s = 0; s < streams; s++) {
            const char *first = (const char *)op.w.data + (own.first + s * own.length) * block_bytes;
            for (int64_t b = 0; b < how.ahead; b += 64) KV_PREFETCH(first + b);
        }
        Pass pass{op, op.x + row * k, prepared, row, groups, how.ahead};
        for (int r = 0; r < count; r++) Factors<W>::prepare(pass.x + r * k, groups, prepared + r * Factors<W>::bytes(groups));
        const int64_t range = RANGE / (block_bytes * streams);
        split_parts(worker, parts, range > 0 ? range : 1, [&](int64_t part) { return share_of(part).length + share_of(part).rest; },
                    [&](int64_t part, int64_t begin, int64_t end) {
            const Share share = share_of(part);
            for (int64_t i = begin; i < end; i++) {
                if (count == 1 && i < share.length) {
                    if (streams == MEMORY.streams) tile<W, 1, MEMORY.streams>(pass, share.first + i, share.length, 0);
                    else tile<W, 1, CACHE.streams>(pass, share.first + i, share.length, 0);
                    continue;
                }
                const int64_t b = share.first + i + (streams - 1) * share.length;
                int r = 0;
                if constexpr (TILE >= 8) for (; r + 8 <= count; r += 8) tile<W, 8, 1>(pass, b, 0, r);
                if constexpr (TILE >= 4) for (; r + 4 <= count; r += 4) tile<W, 4, 1>(pass, b, 0, r);
                if constexpr (TILE >= 2) for (; r + 2 <= count; r += 2) tile<W, 2, 1>(pass, b, 0, r);
                for (; r < count; r++) tile<W, 1, 1>(pass, b, 0, r);
            }
        });
    }
}

void linear_decode(const kv_op_linear &op, int rows, kv::Worker &worker) {
    with_format(op.w.dtype, [&](auto format) { decode<decltype(format)>(op, rows, worker); });
}

}  // namespace KV_NS
