// close.cu - what a KV_Q4 cache does after append has stored rows: sums q^2 per channel, and quantizes the open page when its
// last slot is filled, to the bit as kvrun/backends/reference_pages.py says. Compiled without contraction of a*b + c.
#include "encode.cuh"
#include "launch.cuh"
#include "pages.cuh"
#include "rotate.cuh"

namespace kv {

constexpr int kRounds = 3;        // least-squares fits of scale and zero of a K channel
constexpr int kCloseWarps = KV_MAX_QUANT_DIM / 32;

// Squared error of a b-bit grid, relative to that of the middle of the range.
static __device__ __forceinline__ double cost(int bits) {
    const double top = (1 << bits) - 1;
    return bits ? 1 / (top * top) : 1;
}

// One channel's grid: scale and zero as stored and as numbers, and its codes 0..top.
struct Grid {
    uint16_t scale_bits, zero_bits;
    float scale, zero, top;
    __device__ __forceinline__ void set(uint16_t s, uint16_t z) {
        scale_bits = s;
        zero_bits = z;
        scale = f16_to_f32(s);
        zero = f16_to_f32(z);
    }
    __device__ __forceinline__ float code(float x) const { return scale > 0 ? clamped_rint(__fdiv_rn(x - zero, scale), 0.f, top) : 0.f; }
};

// Channel c of an open K page; the first `sinks` slots take the value of the one after them.
struct OpenChannel {
    const uint16_t *open;
    int c, dim, sinks;
    __device__ __forceinline__ float operator()(int t) const { return whole_bf16(open[kv_k_index(t < sinks ? sinks : t, c, dim)]); }
};

static __device__ Grid fit(const OpenChannel &x, float low, float span, bool finite, int bits) {
    Grid g;
    g.top = (float)((1 << bits) - 1);
    const uint16_t s = bits > 0 ? clamped_f16(__fdiv_rn(span, g.top)) : 0;
    g.set(s, clamped_f16(s ? low : __fadd_rn(low, __fmul_rn(0.5f, span))));
    if (!finite) {
        g.set(kF16Nan, kF16Nan);
        return g;
    }
    double sx = 0;
    for (int t = 0; t < KV_PAGE; t++) sx = __dadd_rn(sx, x(t));
    for (int round = 0; round < kRounds; round++) {
        double scx = 0;
        int sc = 0, scc = 0;
        for (int t = 0; t < KV_PAGE; t++) {
            const float value = x(t), code = g.code(value);
            scx = __dadd_rn(scx, __dmul_rn(code, value));
            sc += (int)code;
            scc += (int)code * (int)code;
        }
        const double n = KV_PAGE, c = sc, variance = n * scc - c * c;             // whole numbers below 2^53: exact
        if (!(g.scale > 0 && variance > 0)) break;                               // and so in every round to come
        const uint16_t found = clamped_f16((float)(__dadd_rn(__dmul_rn(n, scx), -__dmul_rn(c, sx)) / variance));
        if (found == 0 || found & 0x8000) break;
        g.set(found, clamped_f16((float)(__dadd_rn(sx, -__dmul_rn(f16_to_f32(found), c)) / n)));
    }
    return g;
}

// A block makes one head's page of K from its open page; a thread has a channel.
static __device__ void encode_k(char *page, const uint16_t *open, float qsq, int dim, int sinks) {
    __shared__ double importance[KV_MAX_QUANT_DIM];
    __shared__ uint8_t chan[KV_MAX_QUANT_DIM], bits[KV_MAX_QUANT_DIM], split[KV_MAX_QUANT_DIM / 2];
    __shared__ Grid grids[KV_MAX_QUANT_DIM];
    const int c = threadIdx.x, pairs = dim / 2;
    const OpenChannel x{open, c, dim, sinks};
    float low = 0, high = 0;
    bool finite = true;
    if (c < dim) {
        low = high = x(0);
        for (int t = 0; t < KV_PAGE; t++) {
            const float value = x(t);
            low = value < low ? value : low;
            high = value > high ? value : high;
            finite &= finite_bits(value);
        }
        const double range = (double)high - (double)low, w = __dmul_rn(__dmul_rn((double)qsq, range), range);
        importance[c] = finite && w <= 1.7976931348623157e308 ? w : 0;
    }
    __syncthreads();
    if (c < dim) {
        int rank = 0;
        for (int j = 0; j < dim; j++) rank += importance[j] > importance[c] || (importance[j] == importance[c] && j < c);
        chan[rank < pairs ? 2 * rank : 2 * (dim - 1 - rank) + 1] = (uint8_t)c;
    }
    __syncthreads();
    if (c < pairs) {
        const int a = chan[2 * c], b = chan[2 * c + 1];
        double best = 0;
        int s = 4;
        for (int i = 4; i <= 8; i++) {
            const double error = __dadd_rn(__dmul_rn(importance[a], cost(i)), __dmul_rn(importance[b], cost(8 - i)));
            if (i > 4 && !(error < best)) continue;
            best = error;
            s = i;
        }
        split[c] = (uint8_t)s;
        bits[a] = (uint8_t)s;
        bits[b] = (uint8_t)(8 - s);
    }
    __syncthreads();
    uint16_t *scale = (uint16_t *)(page + KV_PAGE * pairs), *zero = scale + dim;
    uint8_t *to_chan = (uint8_t *)(zero + dim), *to_split = to_chan + dim;
    if (c < dim) {
        grids[c] = fit(x, low, high - low, finite, bits[c]);
        scale[c] = grids[c].scale_bits;
        zero[c] = grids[c].zero_bits;
        to_chan[c] = chan[c];
        if (c < pairs) to_split[c] = split[c];
    }
    for (int64_t i = KV_PAGE * pairs + 5 * dim + pairs + c; i < kv_head_bytes(KV_Q4, dim, 0); i += blockDim.x) page[i] = 0;
    __syncthreads();
    for (int i = c; i < pairs * KV_PAGE; i += blockDim.x) {
        const int t = i % KV_PAGE, pair = i / KV_PAGE, a = chan[2 * pair], b = chan[2 * pair + 1];
        const int high_code = (int)grids[a].code(OpenChannel{open, a, dim, sinks}(t)), low_code = (int)grids[b].code(OpenChannel{open, b, dim, sinks}(t));
        page[kv_k4_index(t, pair, dim)] = (char)(high_code << (8 - split[pair]) | low_code);
    }
}

// A block makes one head's page of V from its open page; a warp takes eight tokens, which share words, one after the other.
static __device__ void encode_v(char *page, const uint16_t *open, int dim) {
    __shared__ float rows[kCloseWarps][KV_MAX_QUANT_DIM];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = kv_q4_group(dim), groups = dim / group;
    uint16_t *scales = (uint16_t *)(page + KV_PAGE * dim / 2), *zeros = scales + KV_PAGE * groups;
    float *y = rows[warp];
    for (int octet = warp; octet < KV_PAGE / 8; octet += blockDim.x / 32) {
        uint32_t words[KV_MAX_QUANT_DIM / 32] = {};
        for (int i = 0; i < 8; i++) {
            const int t = 8 * octet + i, shift = 8 * (i % 4) + 4 * (i / 4);
            for (int c = lane; c < dim; c += 32) y[c] = whole_bf16(open[kv_v_index(t, c, dim)]);
            rotate(y, dim, lane);
            for (int g = 0; g < groups; g++) {
                float low = y[g * group], high = low;
                bool finite = true;
                for (int c = g * group + lane; c < (g + 1) * group; c += 32) {
                    low = y[c] < low ? y[c] : low;
                    high = y[c] > high ? y[c] : high;
                    finite &= finite_bits(y[c]);
                }
                for (int with = 16; with > 0; with /= 2) {
                    const float a = __shfl_xor_sync(kAllLanes, low, with), b = __shfl_xor_sync(kAllLanes, high, with);
                    low = a < low ? a : low;
                    high = b > high ? b : high;
                }
                finite = __all_sync(kAllLanes, finite);
                const float span = high - low;
                Grid grid;
                grid.top = 15;
                const uint16_t s = clamped_f16(__fdiv_rn(span, 15.f));
                grid.set(s, clamped_f16(s ? low : __fadd_rn(low, __fmul_rn(0.5f, span))));
                if (!finite) grid.set(kF16Nan, kF16Nan);
                if (lane == 0) {
                    scales[g * KV_PAGE + t] = grid.scale_bits;
                    zeros[g * KV_PAGE + t] = grid.zero_bits;
                }
#pragma unroll
                for (int j = 0; j < KV_MAX_QUANT_DIM / 32; j++) {
                    const int c = lane + 32 * j;
                    if (c >= g * group && c < (g + 1) * group) words[j] |= (uint32_t)grid.code(y[c]) << shift;
                }
            }
            __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < KV_MAX_QUANT_DIM / 32; j++)
            if (lane + 32 * j < dim) *(uint32_t *)(page + kv_v4_index(8 * octet, lane + 32 * j)) = words[j];
    }
}

// A block takes a KV head of a sequence. sums: see kv_cuda_advance; a step after one that ran ahead brings that one's to the side memory.
static __global__ void __launch_bounds__(KV_MAX_QUANT_DIM, 2) close_page(kv_op_append op, const kv_state *state, float *sums) {
    begin_kernel();
    const int h = blockIdx.x, seq = blockIdx.y, d = op.head_dim, group = op.heads / op.kv_heads, c = threadIdx.x;
    if (seq >= state->n_seqs || state->status == KV_BAD_PLAN) return;
    const kv_table &table = table_of(state, op.cache, seq);
    const Side side(op.cache, table, h, op.kv_heads, d);
    const bool gathers = op.cache.k_dtype == KV_Q4 && c < d;
    float *const kept = sums + ((int64_t)seq * op.kv_heads + h) * d + c;
    float qsq = !gathers ? 0.f : state->ahead > 1 ? *kept : side.qsq()[c];
    if (gathers && state->ahead > 1) side.qsq()[c] = qsq;
    int last = -1;
    for (int row = 0; row < state->n_rows; row++) {
        if (state->seq[row] != seq) continue;
        last = row;
        if (!gathers) continue;
        if (state->pos[row] % KV_PAGE == 0) qsq = 0;
        const float *q = op.qkv + ((int64_t)row * (op.heads + 2 * op.kv_heads) + h * group) * d + c;
        for (int i = 0; i < group; i++) qsq = __fadd_rn(qsq, __fmul_rn(q[i * d], q[i * d]));
    }
    if (gathers) *(state->ahead ? kept : side.qsq() + c) = qsq;
    if (last < 0) return;
    const int pos = state->pos[last];
    if (pos % KV_PAGE != KV_PAGE - 1) return;
    const int i = last_page(table, pos), sinks = table.base[i] == 0 ? KV_SINKS : 0;
    if (op.cache.k_dtype == KV_Q4) {
        const uint32_t *open = (const uint32_t *)side.k_open();
        for (int j = c; j < sinks * d / 2; j += blockDim.x) ((uint32_t *)side.k_sinks())[j] = open[j];  // the first block
        encode_k(k_of(op.cache, table.page[i], h, d), (const uint16_t *)open, qsq, d, sinks);
    }
    if (op.cache.v_dtype == KV_Q4) {
        const uint32_t *open = (const uint32_t *)side.v_open();
        for (int j = c; j < sinks * d / 2; j += blockDim.x) ((uint32_t *)side.v_sinks())[j] = open[j];  // the first pairs
        encode_v(v_of(op.cache, table.page[i], h, d), (const uint16_t *)open, d);
    }
}

cudaError_t launch_close(const kv_op_append &op, const Launch &l) {
    return launch(close_page, dim3(op.kv_heads, l.bounds.max_seqs), KV_MAX_QUANT_DIM, l.stream, op, (const kv_state *)l.state, l.sums);
}

static __global__ void settle(kv_op_append op, const kv_state *state, const float *sums) {
    begin_kernel();
    const int h = blockIdx.x, seq = blockIdx.y, d = op.head_dim, c = threadIdx.x;
    if (seq >= state->n_seqs || !state->ahead || c >= d) return;
    const Side side(op.cache, table_of(state, op.cache, seq), h, op.kv_heads, d);
    side.qsq()[c] = sums[((int64_t)seq * op.kv_heads + h) * d + c];
}

cudaError_t launch_settle(const kv_op_append &op, const Launch &l) {
    return launch(settle, dim3(op.kv_heads, l.bounds.max_seqs), KV_MAX_QUANT_DIM, l.stream, op, (const kv_state *)l.state, (const float *)l.sums);
}

}  // namespace kv
