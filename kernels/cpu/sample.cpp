// sample.cpp - draws a token; see kv_sampler for the rules. Instead of sorting the vocabulary it finds the few tokens
// that can matter through the maxima of blocks of 64.
#include "kernels.h"
#include "lanes.h"
#include "select.h"

namespace KV_NS {

static const int BLOCK = 64;
static const float COLDEST = 1e-30f;        // a smaller temperature could turn 0/temperature into NaN

// What one draw works on.
struct Draw {
    const float *w;                         // logits, or their penalized copy
    int vocab, blocks;
    float *copy;                            // [vocab]
    float *block_max;                       // [blocks]
    float *values;                          // [max(vocab, blocks)] to select from
    double *block_sum;                      // [blocks]
    Candidate *candidates;                  // [vocab]
    float max, temperature;
};

static int64_t line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t draw_bytes(int64_t vocab) {
    const int64_t blocks = (vocab + BLOCK - 1) / BLOCK;
    return 2 * line(4 * vocab + 4 * BLOCK) + line(4 * blocks) + line(8 * blocks) + line((int64_t)sizeof(Candidate) * vocab);
}

static Draw draw_in(char *at, int vocab) {
    Draw d{};
    d.vocab = vocab;
    d.blocks = (vocab + BLOCK - 1) / BLOCK;
    d.copy = (float *)at, at += line(4 * (int64_t)vocab + 4 * BLOCK);
    d.values = (float *)at, at += line(4 * (int64_t)vocab + 4 * BLOCK);
    d.block_max = (float *)at, at += line(4 * (int64_t)d.blocks);
    d.block_sum = (double *)at, at += line(8 * (int64_t)d.blocks);
    d.candidates = (Candidate *)at;
    return d;
}

int64_t sample_scratch(const kv_op_sample &op, int, int threads) {
    return draw_bytes(op.vocab) * threads;
}

static inline int end_of_block(const Draw &d, int block) { return (block + 1) * BLOCK < d.vocab ? (block + 1) * BLOCK : d.vocab; }

static float max_of_block(const Draw &d, int block) {
    const int to = end_of_block(d, block);
    float top = d.w[block * BLOCK];
    for (int i = block * BLOCK + 1; i < to; i++) top = d.w[i] > top ? d.w[i] : top;
    return top;
}

// Fills block_max; false when some logit is NaN or plus infinity.
static bool scan(Draw &d) {
    const f32x16 infinity = splat(__builtin_inff());
    f32x16 bad = splat(0);
    float bad_tail = 0;
    for (int block = 0; block < d.blocks; block++) {
        const float *w = d.w + block * BLOCK;
        if ((block + 1) * BLOCK <= d.vocab) {
            f32x16 x[4];
            for (int j = 0; j < 4; j++) {
                x[j] = load(w + 16 * j);
                bad = bad + select_less(x[j], infinity, splat(0), x[j]);
            }
            d.block_max[block] = max(max(max(x[0], x[1]), max(x[2], x[3])));
        } else {
            for (int i = block * BLOCK; i < d.vocab; i++) bad_tail += d.w[i] < __builtin_inff() ? 0 : d.w[i];
            d.block_max[block] = max_of_block(d, block);
        }
    }
    return sum(bad) + bad_tail == 0;
}

static float penalized(float logit, float penalty) { return logit < 0 ? logit * penalty : logit / penalty; }

static void penalize(Draw &d, const float *logits, const kv_sampler &s) {
    memcpy(d.copy, logits, sizeof(float) * (size_t)d.vocab);
    d.w = d.copy;
    for (int i = 0; i < s.n_recent; i++) {
        const int id = s.recent[i];
        if (id >= 0 && id < d.vocab) d.copy[id] = penalized(logits[id], s.repeat_penalty);
    }
    for (int i = 0; i < s.n_recent; i++) {
        const int id = s.recent[i];
        if (id >= 0 && id < d.vocab) d.block_max[id / BLOCK] = max_of_block(d, id / BLOCK);
    }
}

// e^((w - max) / temperature), zero where that is below e^-87.
static inline f32x16 weight(f32x16 w, const Draw &d) {
    const f32x16 x = (w - splat(d.max)) / splat(d.temperature);
    return select_less(x, splat(-87.f), splat(0), exp(x));
}
static inline float weight_of(const Draw &d, int i) {
    float t[16];
    store(t, weight(splat(d.w[i]), d));
    return t[0];
}

// The tokens of logit >= low as candidates, by id; weights are not set.
static int gather_at_least(Draw &d, float low) {
    int n = 0;
    for (int block = 0; block < d.blocks; block++) {
        if (!(d.block_max[block] >= low)) continue;
        const int to = end_of_block(d, block);
        for (int i = block * BLOCK; i < to; i++)
            if (d.w[i] >= low) d.candidates[n++] = {d.w[i], 0, i};
    }
    return n;
}

static void weigh(Draw &d, int n) {
    for (int i = 0; i < n; i += 16) {
        const int m = n - i < 16 ? n - i : 16;
        float t[16] = {};
        for (int j = 0; j < m; j++) t[j] = d.candidates[i + j].logit;
        store(t, weight(load(t), d));
        for (int j = 0; j < m; j++) d.candidates[i + j].weight = t[j];
    }
}

static double sum_of(const Candidate *c, int n) {
    double s = 0;
    for (int i = 0; i < n; i++) s += c[i].weight;
    return s;
}

// Fills block_sum with weights; returns their sum.
static double weigh_all(Draw &d) {
    double total = 0;
    for (int block = 0; block < d.blocks; block++) {
        float s = 0;
        const int from = block * BLOCK;
        if (from + BLOCK <= d.vocab) {
            f32x16 t[4];
            for (int j = 0; j < 4; j++) t[j] = weight(load(d.w + from + 16 * j), d);
            s = sum((t[0] + t[1]) + (t[2] + t[3]));
        } else {
            for (int i = from; i < d.vocab; i++) s += weight_of(d, i);
        }
        d.block_sum[block] = s;
        total += s;
    }
    return total;
}

// Candidates sorted by probability, cut after the one that reaches top_p of `total`; then in order of id again.
static int cut_top_p(Draw &d, int n, double total, float top_p) {
    sort_by_logit(d.candidates, n);
    double reached = 0;
    int kept = 0;
    while (kept < n) {
        reached += d.candidates[kept++].weight;
        if (reached >= top_p * total) break;
    }
    sort_by_id(d.candidates, kept);
    return kept;
}

// Top-p without top-k: widens the candidates until they hold enough.
static int nucleus(Draw &d, float top_p) {
    const double total = weigh_all(d);
    for (float depth = 2;; depth *= 1.5f) {
        const bool all = depth > 87;
        const int n = gather_at_least(d, all ? -__builtin_inff() : d.max - depth * d.temperature);
        weigh(d, n);
        if (all || sum_of(d.candidates, n) >= top_p * total * 1.000001) return cut_top_p(d, n, total, top_p);
    }
}

static int first_k(Draw &d, int k) {
    float low = -__builtin_inff();
    if (k <= d.blocks) {                    // k blocks reach this, so k tokens do
        memcpy(d.values, d.block_max, sizeof(float) * (size_t)d.blocks);
        low = kth_largest(d.values, d.blocks, k);
    }
    const int n = gather_at_least(d, low);
    for (int i = 0; i < n; i++) d.values[i] = d.candidates[i].logit;
    low = kth_largest(d.values, n, k);
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (d.candidates[i].logit >= low) d.candidates[kept++] = d.candidates[i];
    return kept;
}

static uint64_t mix(uint64_t x) {           // splitmix64
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static int draw_from(const Candidate *c, int n, double u) {
    const double target = u * sum_of(c, n);
    double reached = 0;
    int last = c[0].id;
    for (int i = 0; i < n; i++) {
        reached += c[i].weight;
        if (c[i].weight > 0) last = c[i].id;
        if (reached > target) return c[i].id;
    }
    return last;
}

static int draw_from_all(Draw &d, double u) {
    const double target = u * weigh_all(d);
    double reached = 0;
    int last = 0;
    for (int block = 0; block < d.blocks; block++) {
        if (d.block_sum[block] > 0) last = block;
        if (reached + d.block_sum[block] > target) break;
        reached += d.block_sum[block];
    }
    int token = last * BLOCK;
    for (int i = last * BLOCK; i < end_of_block(d, last); i++) {
        const float w = weight_of(d, i);
        reached += w;
        if (w > 0) token = i;
        if (reached > target) break;
    }
    return token;
}

// The token, or -1 when the logits are not finite.
static int draw(Draw &d, const float *logits, const kv_sampler &s, int position) {
    d.w = logits;
    if (!scan(d)) return -1;
    if (s.repeat_penalty != 1 && s.n_recent > 0 && s.recent) penalize(d, logits, s);
    int best = 0;
    for (int block = 1; block < d.blocks; block++)
        if (d.block_max[block] > d.block_max[best]) best = block;
    d.max = d.block_max[best];
    if (!(d.max > -__builtin_inff() && d.max < __builtin_inff())) return -1;
    if (!(s.temperature > 0)) {
        int i = best * BLOCK;
        while (d.w[i] != d.max) i++;
        return i;
    }
    d.temperature = s.temperature > COLDEST ? s.temperature : COLDEST;
    const double u = (double)(mix(s.seed ^ mix((uint64_t)(int64_t)position)) >> 40) * 0x1p-24;
    const bool top_k = s.top_k > 0 && s.top_k < d.vocab, top_p = s.top_p < 1, min_p = s.min_p > 0;
    int n;
    if (top_k) {
        n = first_k(d, s.top_k);
        weigh(d, n);
        if (top_p) n = cut_top_p(d, n, sum_of(d.candidates, n), s.top_p);
    } else if (top_p) {
        n = nucleus(d, s.top_p);
    } else if (min_p) {
        const float low = logf(s.min_p) * d.temperature;
        n = gather_at_least(d, d.max + low - 1e-3f * fabsf(low) - 1e-3f * d.temperature);
        weigh(d, n);
    } else {
        return draw_from_all(d, u);
    }
    if (min_p) {
        int kept = 0;
        for (int i = 0; i < n; i++)
            if (d.candidates[i].weight >= s.min_p) d.candidates[kept++] = d.candidates[i];
        n = kept;
    }
    if (n == 0) {                           // min_p above 1: the most likely token, as everywhere else one is kept
        d.candidates[0] = {d.max, 1, best * BLOCK};
        while (d.w[d.candidates[0].id] != d.max) d.candidates[0].id++;
        n = 1;
    }
    return draw_from(d.candidates, n, u);
}

void sample(const kv_op_sample &op, kv_state &state, kv::Worker &worker) {
    if (!state.sampler) return;
    worker.split(state.n_out, 1, [&](int64_t i, int64_t) {
        Draw d = draw_in(worker.scratch + worker.thread * draw_bytes(op.vocab), op.vocab);
        const int token = draw(d, op.logits + i * op.vocab, state.sampler[i], state.pos[state.out_row[i]]);
        state.next[i] = token;
        if (token < 0) __atomic_store_n(&state.status, (int32_t)KV_NOT_FINITE, __ATOMIC_RELAXED);
    });
}

}  // namespace KV_NS
