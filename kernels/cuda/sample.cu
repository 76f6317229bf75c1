// sample.cu - draws a token; see kv_sampler for the rules.
//
// Two kernels: the first, with blocks over the vocabulary, finds maxima and applies the penalty; the second, a block a row,
// looks only where a maximum says that something can be drawn. A weight is e^((logit - max)/temperature) in units of 2^-40, a
// whole number, so that sums do not depend on the order in which threads add.
#include "launch.cuh"

namespace kv {

constexpr int kSpan = 128;                      // logits that share a maximum
constexpr int kChunk = 4096;                    // logits of a block of the first kernel
constexpr int kDrawThreads = 256, kDrawWarps = kDrawThreads / 32;
constexpr float kColdest = 1e-30f;              // a smaller temperature could turn 0/temperature into NaN
constexpr float kReach = 28.f;                  // e^-28 is less than half a unit

typedef unsigned long long u64;

// Scratch of a row.
struct Draws {
    float *penalized;                           // [rows][vocab]
    float *span_max;                            // [rows][spans]
    u64 *best;                                  // [rows][chunks]: the greatest logit's key, and below it the complement of its id
    uint2 *candidate;                           // [rows][vocab]: key and id
    int vocab, spans, chunks;
};

static int64_t row_bytes(int vocab) {
    const int64_t spans = (vocab + kSpan - 1) / kSpan, chunks = (vocab + kChunk - 1) / kChunk;
    return ((int64_t)vocab * 12 + chunks * 8 + spans * 4 + 15) / 16 * 16 + 64;
}

static Draws draws_in(char *scratch, int rows, int vocab) {
    Draws d;
    d.vocab = vocab;
    d.spans = (vocab + kSpan - 1) / kSpan;
    d.chunks = (vocab + kChunk - 1) / kChunk;
    d.candidate = (uint2 *)scratch;
    d.best = (u64 *)(d.candidate + (int64_t)rows * vocab);
    d.penalized = (float *)(d.best + (int64_t)rows * d.chunks);
    d.span_max = d.penalized + (int64_t)rows * vocab;
    return d;
}

int64_t sample_scratch(const kv_op_sample &op, const kv_cuda_bounds &bounds) { return row_bytes(op.vocab) * bounds.max_out; }

// Floats in the order of their keys; no NaN.
static __device__ __forceinline__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x == 0 ? 0.f : x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
static __device__ __forceinline__ float of_key(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

static __device__ __forceinline__ u64 warp_max(u64 value) {
    for (int with = 16; with > 0; with /= 2) {
        const u64 other = __shfl_xor_sync(kAllLanes, value, with);
        value = other > value ? other : value;
    }
    return value;
}

static __device__ __forceinline__ bool penalizes(const kv_sampler &s) { return s.repeat_penalty != 1 && s.n_recent > 0 && s.recent; }

constexpr u64 kNotFinite = ~0ull;

static __global__ void scan_logits(kv_op_sample op, const kv_state *state, Draws d) {
    begin_kernel();
    __shared__ u64 best_of[kThreads / 32];
    const int row = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (!state->sampler || row >= state->n_out) return;
    const kv_sampler &sampler = state->sampler[row];
    const int begin = blockIdx.x * kChunk, end = begin + kChunk < d.vocab ? begin + kChunk : d.vocab;
    const float *w = op.logits + (int64_t)row * d.vocab;
    bool bad = false;
    for (int i = begin + threadIdx.x; i < end; i += kThreads) bad |= !(w[i] < INFINITY);
    if (penalizes(sampler)) {
        float *copy = d.penalized + (int64_t)row * d.vocab;
        for (int i = begin + threadIdx.x; i < end; i += kThreads) copy[i] = w[i];
        __syncthreads();
        for (int i = threadIdx.x; i < sampler.n_recent; i += kThreads) {
            const int id = sampler.recent[i];
            if (id >= begin && id < end) copy[id] = w[id] < 0 ? w[id] * sampler.repeat_penalty : w[id] / sampler.repeat_penalty;
        }
        __syncthreads();
        w = copy;
    }
    u64 best = 0;
    for (int span = begin + kSpan * warp; span < end; span += kSpan * (kThreads / 32)) {
        float most = -INFINITY;
        for (int i = span + lane; i < span + kSpan && i < end; i += 32) {
            most = fmaxf(most, w[i]);
            const u64 mine = (u64)key_of(w[i]) << 32 | ~(uint32_t)i;
            best = mine > best ? mine : best;
        }
        most = warp_max(most);
        if (lane == 0) d.span_max[(int64_t)row * d.spans + span / kSpan] = most;
    }
    best = warp_max(bad ? kNotFinite : best);
    if (lane == 0) best_of[warp] = best;
    __syncthreads();
    if (warp > 0) return;
    best = warp_max(lane < kThreads / 32 ? best_of[lane] : 0);
    if (lane == 0) d.best[(int64_t)row * d.chunks + blockIdx.x] = best;
}

static __device__ __forceinline__ u64 mix(u64 x) {       // splitmix64
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

// Sum of the lanes before this one, and of all.
static __device__ __forceinline__ u64 warp_scan(u64 value, int lane, u64 &all) {
    u64 sum = value;
    for (int by = 1; by < 32; by *= 2) {
        const u64 other = __shfl_up_sync(kAllLanes, sum, by);
        if (lane >= by) sum += other;
    }
    all = __shfl_sync(kAllLanes, sum, 31);
    return sum - value;
}

// Sum of the warps before this one, given one value a warp (by all its lanes), and of all.
static __device__ __forceinline__ u64 block_scan(u64 value, int warp, int lane, u64 &all) {
    __shared__ u64 values[kDrawWarps];
    if (lane == 0) values[warp] = value;
    __syncthreads();
    u64 before = 0;
    all = 0;
    for (int i = 0; i < kDrawWarps; i++) {
        if (i < warp) before += values[i];
        all += values[i];
    }
    __syncthreads();
    return before;
}

struct Cut { uint32_t key; u64 above; };        // above: the mass of greater keys

// The greatest key such that keys >= it have a mass of at least `need` together; 0 when all have less. item(i) gives key and
// mass of item i of n. Radix selection, eight bits at a time, by all threads of the block.
template <class Item> static __device__ Cut select(int n, u64 need, Item item) {
    __shared__ u64 mass[256];
    __shared__ uint32_t digit;
    __shared__ u64 passed;
    const int lane = threadIdx.x % 32;
    Cut cut{0, 0};
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += kDrawThreads) mass[i] = 0;
        if (threadIdx.x == 0) digit = 0, passed = cut.above;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += kDrawThreads) {
            uint32_t key;
            u64 m;
            item(i, key, m);
            if (m && (uint32_t)((u64)(key ^ cut.key) >> (shift + 8)) == 0) atomicAdd(&mass[key >> shift & 255], m);
        }
        __syncthreads();
        if (threadIdx.x < 32) {                  // a lane has eight digits, the greatest first
            u64 mine = 0, all;
            for (int i = 0; i < 8; i++) mine += mass[255 - 8 * lane - i];
            u64 before = cut.above + warp_scan(mine, lane, all);
            if (before < need && before + mine >= need)
                for (int i = 0; i < 8; i++) {
                    const u64 m = mass[255 - 8 * lane - i];
                    if (before + m >= need) {
                        digit = 255 - 8 * lane - i;
                        passed = before;
                        break;
                    }
                    before += m;
                }
        }
        __syncthreads();
        cut.key |= digit << shift;
        cut.above = passed;
        __syncthreads();
    }
    return cut;
}

static __global__ void __launch_bounds__(kDrawThreads) draw(kv_op_sample op, kv_state *state, Draws d) {
    begin_kernel();
    const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (!state->sampler || row >= state->n_out) return;
    const kv_sampler s = state->sampler[row];
    u64 best = 0, all = 0;
    for (int i = threadIdx.x; i < d.chunks; i += kDrawThreads) {
        const u64 other = d.best[(int64_t)row * d.chunks + i];
        best = other > best ? other : best;
    }
    __shared__ u64 best_of[kDrawWarps];
    best = warp_max(best);
    if (lane == 0) best_of[warp] = best;
    __syncthreads();
    for (int i = 0; i < kDrawWarps; i++) best = best_of[i] > best ? best_of[i] : best;
    const float max = best == kNotFinite ? INFINITY : of_key((uint32_t)(best >> 32));
    const int likeliest = (int)~(uint32_t)best;
    if (!(max > -INFINITY && max < INFINITY)) {
        if (threadIdx.x == 0) {
            state->next[row] = -1;
            state->status = KV_NOT_FINITE;
        }
        return;
    }
    if (!(s.temperature > 0) || s.min_p > 1) {   // above 1 nothing but the likeliest token can stay
        if (threadIdx.x == 0) state->next[row] = likeliest;
        return;
    }
    const float temperature = s.temperature > kColdest ? s.temperature : kColdest;
    const float *w = penalizes(s) ? d.penalized + (int64_t)row * d.vocab : op.logits + (int64_t)row * d.vocab;
    const float *span_max = d.span_max + (int64_t)row * d.spans;
    uint2 *candidate = d.candidate + (int64_t)row * d.vocab;
    auto probability = [&](uint32_t key) { return expf((of_key(key) - max) / temperature); };     // relative to the likeliest
    auto weight = [&](uint32_t key) { return __float2ull_rn(probability(key) * 1099511627776.f); };

    // Candidates: all that weigh something, and no more than the k-th greatest span maximum leaves.
    float low = max - kReach * temperature;
    const bool top_k = s.top_k > 0 && s.top_k < d.vocab;
    if (top_k && s.top_k <= d.spans) {
        const Cut cut = select(d.spans, (u64)s.top_k, [&](int i, uint32_t &key, u64 &m) { key = key_of(span_max[i]), m = 1; });
        low = fmaxf(low, of_key(cut.key));
    }
    const int per_warp = (d.spans + kDrawWarps - 1) / kDrawWarps, first_span = warp * per_warp;
    const int last_span = first_span + per_warp < d.spans ? first_span + per_warp : d.spans;
    u64 n = 0;
    for (int pass = 0; pass < 2; pass++) {       // counts, then writes, in order of id
        u64 at = pass ? block_scan(n, warp, lane, all) : 0;
        for (int span = first_span; span < last_span; span++) {
            if (!(span_max[span] >= low)) continue;
            for (int i = span * kSpan + lane; i < (span + 1) * kSpan; i += 32) {
                const bool in = i < d.vocab && w[i] >= low;
                const uint32_t votes = __ballot_sync(kAllLanes, in);
                if (pass && in) candidate[at + __popc(votes & ((1u << lane) - 1))] = make_uint2(key_of(w[i]), (uint32_t)i);
                at += __popc(votes);
            }
        }
        if (!pass) n = at;
    }
    __syncthreads();
    const int count = (int)all;

    uint32_t cut_key = 0;                        // keys below it are out
    u64 ties = ~0ull;                            // how many that equal it stay, the lowest ids first
    if (top_k && s.top_k < count)
        cut_key = select(count, (u64)s.top_k, [&](int i, uint32_t &key, u64 &m) { key = candidate[i].x, m = 1; }).key;
    if (s.top_p < 1) {
        u64 mine = 0, total;
        for (int i = threadIdx.x; i < count; i += kDrawThreads)
            if (candidate[i].x >= cut_key) mine += weight(candidate[i].x);
        u64 of_warp;
        warp_scan(mine, lane, of_warp);
        block_scan(of_warp, warp, lane, total);
        const double reach = ceil((double)s.top_p * (double)total);
        const u64 need = reach > 1 ? (reach < (double)total ? (u64)reach : total) : 1;
        const uint32_t floor_key = cut_key;
        const Cut cut = select(count, need, [&](int i, uint32_t &key, u64 &m) { key = candidate[i].x, m = key >= floor_key ? weight(key) : 0; });
        cut_key = cut.key;
        const u64 each = weight(cut_key);
        ties = (need - cut.above + each - 1) / each;
    }

    // Each warp has a stretch of the candidates. How many ties are before it, then how much weight, then the draw.
    const int stretch = (count + kDrawWarps * 32 - 1) / (kDrawWarps * 32) * 32, from = warp * stretch, to = from + stretch < count ? from + stretch : count;
    u64 tied = 0;
    for (int i = from; i < to; i += 32) tied += __popc(__ballot_sync(kAllLanes, i + lane < to && candidate[i + lane].x == cut_key));
    const u64 tied_before = block_scan(tied, warp, lane, all);
    auto kept = [&](int i, u64 &tie) {           // the weight of candidate i, 0 when it is out; counts ties
        const uint32_t key = i < to ? candidate[i].x : 0;
        const bool equal = i < to && key == cut_key;
        const uint32_t votes = __ballot_sync(kAllLanes, equal);
        const u64 rank = tie + __popc(votes & ((1u << lane) - 1));
        tie += __popc(votes);
        if (i >= to || key < cut_key || (equal && rank >= ties)) return (u64)0;
        return s.min_p > 0 && !(probability(key) >= s.min_p) ? (u64)0 : (u64)weight(key);
    };
    u64 mine = 0, of_warp, total, tie = tied_before;
    for (int i = from; i < to; i += 32) mine += kept(i + lane, tie);
    warp_scan(mine, lane, of_warp);
    u64 passed = block_scan(of_warp, warp, lane, total);
    const u64 u = mix(s.seed ^ mix((u64)(long long)state->pos[state->out_row[row]])) >> 40;
    const u64 target = (total >> 24) * u + ((total & 0xffffff) * u >> 24);          // floor(total * u / 2^24)
    if (target < passed || target >= passed + of_warp) return;
    tie = tied_before;
    for (int i = from; i < to; i += 32) {
        u64 step;
        const u64 m = kept(i + lane, tie), before = passed + warp_scan(m, lane, step);
        if (m && target >= before && target < before + m) state->next[row] = (int32_t)candidate[i + lane].y;
        passed += step;
        if (target < passed) return;
    }
}

cudaError_t launch_sample(const kv_op_sample &op, const Launch &l) {
    const Draws d = draws_in(l.scratch, l.bounds.max_out, op.vocab);
    const cudaError_t error = launch(scan_logits, dim3(d.chunks, l.bounds.max_out), kThreads, l.stream, op, (const kv_state *)l.state, d);
    if (error != cudaSuccess) return error;
    return launch(draw, l.bounds.max_out, kDrawThreads, l.stream, op, l.state, d);
}

}  // namespace kv
