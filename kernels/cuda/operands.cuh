// operands.cuh - operands A of a tile of queries, for products of 16 columns each (steps). Packed: in shared memory, split into terms once
// and read by every warp with one 128-bit load a step and term, from as many banks as there are. Loose: made of floats at each use.
#pragma once
#include "mma.cuh"

namespace kv {

// Where a pair of a step's columns goes: lane%4 of its owners, and which half of the operand.
struct PairPlace { int step, t, half; };
// The order of a 16-bit page's words; c is even.
static __device__ __forceinline__ PairPlace pair_of_halves(int c) { return {c / 16, c % 8 / 2, c % 16 / 8}; }
// Four columns next to each other are a lane's, as bytes of a word.
static __device__ __forceinline__ PairPlace pair_of_bytes(int c) { return {c / 16, c % 16 / 4, c % 4 / 2}; }
// The factors of scores_4: of a word's high codes in even steps, of its low ones in odd steps.
static __device__ __forceinline__ PairPlace pair_of_nibbles(int c) { return {c / 32 * 2 + c % 8 / 4, c % 32 / 8, c % 4 / 2}; }

// Words of `steps` steps for `tile` queries, a multiple of 16 or 8 in halves.
static __host__ __device__ __forceinline__ int operand_words(int tile, int steps, int terms) { return tile * steps * 8 * terms; }

// words: [query/16][step][term][lane][4], in halves [step][lane][4]; lanes of odd steps change places in fours, so that what a warp puts for
// one query does not all go to half of the banks.
template <class H, int TERMS, bool HALF> struct PackedRows {
    using A = OperandA<H, TERMS, HALF>;
    uint32_t *words;
    int steps;

    // Of one term, the words of a lane.
    __device__ __forceinline__ uint32_t *of(int mt, int step, int term, int lane) const {
        return words + (((mt * steps + step) * A::kOperands + term) * 32 + (lane ^ step % 2 * 4)) * 4;
    }
    // Columns x and y of query n.
    __device__ __forceinline__ void put(int n, const PairPlace &p, float x, float y) const {
        const uint32_t first = pack2<H>(x, y), rest = TERMS == 2 ? A::rest_of(first, x, y) : 0;
        const int lane = 4 * (n % 8) + p.t, i = 2 * p.half + (HALF ? 0 : n % 16 / 8);
        if (HALF) {
            *(uint64_t *)(of(0, p.step, 0, lane) + i) = (uint64_t)rest << 32 | first;
            return;
        }
        of(n / 16, p.step, 0, lane)[i] = first;
        if (TERMS == 2) of(n / 16, p.step, 1, lane)[i] = rest;
    }
    __device__ __forceinline__ A at(int mt, int step, int lane) const {
        A a;
#pragma unroll
        for (int i = 0; i < A::kOperands; i++) {
            const uint4 v = load16(of(mt, step, i, lane));
            a.a[i][0] = v.x, a.a[i][1] = v.y, a.a[i][2] = v.z, a.a[i][3] = v.w;
        }
        return a;
    }
};

// x: [queries][stride], in the order of a 16-bit page.
template <class H, int TERMS, bool HALF> struct LooseRows {
    const float *x;
    int stride;
    __device__ __forceinline__ OperandA<H, TERMS, HALF> at(int mt, int step, int lane) const {
        OperandA<H, TERMS, HALF> a;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 f = *(const float2 *)(x + (16 * mt + lane / 4 + (HALF ? 0 : i % 2 * 8)) * stride + 16 * step + 2 * (lane % 4) + i / 2 * 8);
            a.set(i, f.x, f.y);
        }
        return a;
    }
};

}  // namespace kv
