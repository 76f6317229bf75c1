// attend.cpp - attention over cache pages: online softmax (Milakov and Gimelshein, 2018) page by page, each K and V
// read once for a block of queries that share it.
//
// The positions of a sequence are cut into parts of four pages. A part is reduced to (maximum, sum, weighted V), and
// parts are merged in order, so that a row's result depends on nothing but its own positions: not on the rows beside
// it, the threads, or pages that left the window.
#include "attend.h"

namespace KV_NS {

static const int PART = 4 * KV_PAGE;       // positions of a part
static const int MAX_QUERIES = 48;         // queries of a block, unless one row alone has more
static const int MAX_QUERIES_F16 = 96;     // the same where each block cuts K and V of a page for its tiles
static const int MAX_RUNS = 64;            // rows of a decode batch
static const int64_t BATCH_SLOTS_BYTES = 4 << 20;   // part results of a decode batch of several rows

static int rows_of_block(const kv_op_attend &op) {
    const int rows = (TILES && op.cache.k_dtype == KV_F16 ? MAX_QUERIES_F16 : MAX_QUERIES) / (op.heads / op.kv_heads);
    return rows > 0 ? rows : 1;
}
static int queries_of_block(const kv_op_attend &op) { return rows_of_block(op) * (op.heads / op.kv_heads); }

// Floats of one part result: V sums, padded, then maximum and sum.
static int64_t slot_floats(const kv_op_attend &op) { return (op.head_dim + 15) / 16 * 16 + 16; }

static int64_t thread_floats(const kv_op_attend &op) { return block_floats(queries_of_block(op), op.head_dim, op.cache); }

int64_t attend_scratch(const kv_op_attend &op, int max_rows, int max_pages, int threads) {
    const int64_t slot = slot_floats(op) * 4, row = (int64_t)op.heads * max_pages * slot;
    int64_t batch = row > BATCH_SLOTS_BYTES ? row : BATCH_SLOTS_BYTES;
    if (batch > row * max_rows) batch = row * max_rows;
    return threads * thread_floats(op) * 4 + batch;
}

// Consecutive rows of one sequence, and the pages that any of them sees.
struct Run {
    int begin, end;
    const kv_table *table;
    int first, last;           // pages [first, last)
    int parts;
    int64_t slot;              // of its first part result
};

static int part_end(const Run &run, int page) {
    const int part = run.table->base[page] / PART;
    while (page < run.last && run.table->base[page] / PART == part) page++;
    return page;
}

static Run make_run(const kv_op_attend &op, const kv_state &state, int begin, int limit) {
    Run run{begin, begin + 1, nullptr, 0, 0, 0, 0};
    const int seq = state.seq[begin];
    while (run.end < limit && state.seq[run.end] == seq && state.pos[run.end] >= state.pos[run.end - 1]) run.end++;
    run.table = state.table + (int64_t)op.cache.group * state.n_seqs + seq;
    const int oldest = op.window ? state.pos[begin] - op.window + 1 : 0;
    run.first = first_page(*run.table, oldest > 0 ? oldest : 0);
    run.last = last_page(*run.table, state.pos[run.end - 1]) + 1;
    return run;
}

// The rows of a run as a block of queries of one KV head.
static void load_block(Block &block, const kv_op_attend &op, const kv_state &state, const Run &run, int kv_head) {
    const int group = op.heads / op.kv_heads;
    block.group = group;
    block.rows = run.end - run.begin;
    block.head_dim = op.head_dim;
    block.window = op.window;
    block.kv_heads = op.kv_heads;
    block.own = has_side(op.cache) ? state.pos[run.begin] / KV_PAGE * KV_PAGE : -1;
    block.softcap = op.softcap;
    block.pos = state.pos + run.begin;
    block.split = false;
    block.asked = nullptr;
    const f32x16 scale = splat(op.softcap > 0 ? op.scale / op.softcap : op.scale);
    const int64_t columns = (int64_t)(op.heads + 2 * op.kv_heads) * op.head_dim;
    for (int r = 0; r < block.rows; r++) {
        const float *q = op.qkv + (run.begin + r) * columns + (int64_t)kv_head * group * op.head_dim;
        float *to = block.q + (int64_t)r * group * op.head_dim;
        int i = 0;
        for (; i + 16 <= group * op.head_dim; i += 16) store(to + i, load(q + i) * scale);
        for (; i < group * op.head_dim; i++) to[i] = q[i] * (op.softcap > 0 ? op.scale / op.softcap : op.scale);
        if (op.cache.k_dtype == KV_Q8)
            for (int h = 0; h < group; h++) rotate(to + h * op.head_dim, op.head_dim);
    }
}

// total <- total merged with a part: both (o, m, l) with o = sum of e^(s-m) v and l = sum of e^(s-m).
static void merge(float *o, float &m, float &l, const float *part, float part_m, float part_l, int dim) {
    if (part_l == 0) return;                                  // no slot of the part was visible
    const float top = part_m > m ? part_m : m;
    const f32x16 a = exp(splat(m - top)), b = exp(splat(part_m - top));
    const f32x16 keep = l == 0 ? splat(0) : a;
    l = first(fma(splat(l), keep, splat(part_l) * b));
    m = top;
    int i = 0;
    for (; i + 16 <= dim; i += 16) store(o + i, fma(load(o + i), keep, load(part + i) * b));
    if (i < dim) store_part(o + i, fma(load_part(o + i, dim - i), keep, load_part(part + i, dim - i) * b), dim - i);
}

static void finish(float *out, const float *o, float m, float l, const float *sink, int dim, bool rotated) {
    float scale = l > 0 || l != l ? 1.f / l : 0.f;
    if (sink) {
        const float top = *sink > m ? *sink : m;
        const float keep = l == 0 ? 0.f : first(exp(splat(m - top)));
        scale = keep / (l * keep + first(exp(splat(*sink - top))));
    }
    for (int i = 0; i < dim; i++) out[i] = o[i] * scale;
    if (rotated) rotate(out, dim);
}

// Prompt rows: a thread takes a block of rows and a KV head through all parts.
static void attend_prefill(const kv_op_attend &op, const kv_state &state, kv::Worker &worker, float *mine, Pages pages,
                           bool in_parts) {
    const int size = rows_of_block(op), group = op.heads / op.kv_heads, d = op.head_dim;
    const int64_t blocks = (state.n_rows + size - 1) / size;
    worker.split(blocks * op.kv_heads, 1, [&](int64_t item, int64_t) {
        const int kv_head = (int)(item % op.kv_heads);
        const int64_t from = (blocks - 1 - item / op.kv_heads) * size;     // the longest first
        const int limit = (int)(from + size < state.n_rows ? from + size : state.n_rows);
        for (int begin = (int)from; begin < limit;) {
            Run run = make_run(op, state, begin, limit);
            begin = run.end;
            Block block;
            block_in(block, mine, queries_of_block(op), d, op.cache);
            load_block(block, op, state, run, kv_head);
            const int queries = block.rows * group;
            for (int i = 0; i < queries; i++) block.total_m[i] = LOWEST, block.total_l[i] = 0;
            memset(block.total, 0, sizeof(float) * (size_t)queries * d);
            for (int page = run.first; page < run.last;) {
                const int end = in_parts ? part_end(run, page) : run.last;
                block.start();
                pages(block, op.cache, *run.table, page, end, kv_head,
                      end < run.last ? next_of(op.cache, run.table->page[end], kv_head, d) : Next());
                for (int i = 0; i < queries; i++)
                    merge(block.total + (int64_t)i * d, block.total_m[i], block.total_l[i], block.o + (int64_t)i * d,
                          block.m[i], block.l[i], d);
                page = end;
            }
            for (int i = 0; i < queries; i++) {
                const int head = kv_head * group + i % group;
                finish(op.out + ((int64_t)(run.begin + i / group) * op.heads + head) * d, block.total + (int64_t)i * d,
                       block.total_m[i], block.total_l[i], op.sinks ? op.sinks + head : nullptr, d, v_is_rotated(op.cache));
            }
        }
    });
}

// Decode rows: threads take (part, KV head) pairs, then (row, head) pairs to merge the parts of.
static void attend_batch(const kv_op_attend &op, const kv_state &state, kv::Worker &worker, float *mine, float *slots,
                         const Run *runs, int n_runs, int64_t parts, Pages pages) {
    const int group = op.heads / op.kv_heads, d = op.head_dim;
    const int64_t slot = slot_floats(op), m_at = slot - 16;
    // Items are (run, KV head, part) in this order, so that a thread mostly keeps its queries; a place is where one is. A thread
    // takes its next item before it computes the one it has, to ask for the next K in time.
    struct Place { int64_t item; int run, kv_head, part, page; };
    auto advance = [&](Place p, int64_t item) {
        for (; p.item < item; p.item++) {
            p.page = part_end(runs[p.run], p.page);
            if (++p.part < runs[p.run].parts) continue;
            p.part = 0;
            if (++p.kv_head == op.kv_heads) {
                p.kv_head = 0;
                do p.run++; while (runs[p.run].parts == 0);
            }
            p.page = runs[p.run].first;
        }
        return p;
    };
    auto at = [&](const Place &p) { return next_of(op.cache, runs[p.run].table->page[p.page], p.kv_head, d); };
    Block block;
    block_in(block, mine, queries_of_block(op), d, op.cache);
    int run_of_block = -1, kv_head_of_block = -1;
    auto reduce = [&](const Place &p, Next after) {
        const Run &run = runs[p.run];
        if (p.run != run_of_block || p.kv_head != kv_head_of_block) load_block(block, op, state, run, p.kv_head);
        run_of_block = p.run, kv_head_of_block = p.kv_head;
        block.start();
        pages(block, op.cache, *run.table, p.page, part_end(run, p.page), p.kv_head, after);
        for (int i = 0; i < block.rows * group; i++) {
            const int64_t row = i / group, head = p.kv_head * group + i % group;
            float *to = slots + (run.slot + (row * op.heads + head) * run.parts + p.part) * slot;
            memcpy(to, block.o + (int64_t)i * d, sizeof(float) * (size_t)d);
            to[m_at] = block.m[i];
            to[m_at + 1] = block.l[i];
        }
    };
#if KV_TILES
    int queries = 0;                                          // where those of any run fit into one tile, tiles need not be higher
    for (int i = 0; i < n_runs; i++) queries = runs[i].end - runs[i].begin > queries ? runs[i].end - runs[i].begin : queries;
    queries *= group;
    const int k_rows = 2 * queries * parts_of_k(op.cache.k_dtype, d);
    const int depth = depth_of_k(op.cache.k_dtype, d);
    const bool low_tiles = is_quantized(op.cache) && k_rows <= 16;
    if (low_tiles) configure_tiles(k_rows, 2 * queries, depth);
#endif
    Place here{0, 0, 0, 0, 0};
    while (here.run + 1 < n_runs && runs[here.run].parts == 0) here.run++;
    here.page = runs[here.run].first;
    int64_t item, end;
    if (worker.take(parts * op.kv_heads, 1, item, end)) {
        here = advance(here, item);
        while (worker.take(parts * op.kv_heads, 1, item, end)) {
            const Place next = advance(here, item);
            reduce(here, at(next));
            here = next;
        }
        reduce(here, Next());
    }
#if KV_TILES
    if (low_tiles) configure_tiles(16, 16, depth);
#endif
    worker.finish();
    worker.barrier();
    const int rows = runs[n_runs - 1].end - runs[0].begin;
    worker.split((int64_t)rows * op.heads, 4, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int row = runs[0].begin + (int)(item / op.heads), head = (int)(item % op.heads);
            int i = 0;
            while (runs[i].end <= row) i++;
            const Run &run = runs[i];
            float *total = mine, m = LOWEST, l = 0;
            memset(total, 0, sizeof(float) * (size_t)d);
            const float *from = slots + (run.slot + ((int64_t)(row - run.begin) * op.heads + head) * run.parts) * slot;
            for (int p = 0; p < run.parts; p++, from += slot) merge(total, m, l, from, from[m_at], from[m_at + 1], d);
            finish(op.out + ((int64_t)row * op.heads + head) * d, total, m, l, op.sinks ? op.sinks + head : nullptr, d, v_is_rotated(op.cache));
        }
    });
}

static void attend_decode(const kv_op_attend &op, const kv_state &state, kv::Worker &worker, float *mine, float *slots,
                          Pages pages) {
    const int size = rows_of_block(op);
    const int64_t budget = BATCH_SLOTS_BYTES / (slot_floats(op) * 4);
    for (int begin = 0; begin < state.n_rows;) {
        if (begin > 0) worker.barrier();                      // the slots are free again
        Run runs[MAX_RUNS];
        int n_runs = 0;
        int64_t parts = 0, used = 0;
        const int start = begin;
        while (begin < state.n_rows && begin - start < MAX_RUNS) {
            int limit = begin + size;
            if (limit > start + MAX_RUNS) limit = start + MAX_RUNS;
            if (limit > state.n_rows) limit = state.n_rows;
            Run run;
            for (;; limit = begin + 1) {                      // all rows of the run, or only one, or none
                run = make_run(op, state, begin, limit);
                for (int page = run.first; page < run.last; page = part_end(run, page)) run.parts++;
                if (limit == begin + 1 || used + (int64_t)(run.end - run.begin) * run.parts * op.heads <= budget) break;
            }
            const int64_t slots_of_run = (int64_t)(run.end - run.begin) * run.parts * op.heads;
            if (n_runs > 0 && used + slots_of_run > budget) break;
            run.slot = used;
            used += slots_of_run;
            parts += run.parts;
            runs[n_runs++] = run;
            begin = run.end;
        }
        attend_batch(op, state, worker, mine, slots, runs, n_runs, parts, pages);
    }
}

void attend(const kv_op_attend &op, const kv_state &state, kv::Worker &worker) {
    float *scratch = (float *)worker.scratch, *mine = scratch + worker.thread * thread_floats(op);
    Pages pages = pages_for(op.cache.k_dtype, op.cache.v_dtype);
    bool in_parts = true;
#if KV_TILES
    if (is_quantized(op.cache)) pages = attend_pages_int8, in_parts = false;
    else if (state.prefill && tiles_fit(op)) pages = op.cache.k_dtype == KV_F16 ? attend_pages_tiles<true> : attend_pages_tiles<false>, in_parts = false;
    const int depth = depth_of_k(op.cache.k_dtype, op.head_dim);
    if (depth < 64) configure_tiles(16, 16, depth);
#else
    if (is_quantized(op.cache)) pages = attend_pages_quant;
#endif
    if (state.prefill) attend_prefill(op, state, worker, mine, pages, in_parts);
    else attend_decode(op, state, worker, mine, scratch + worker.threads * thread_floats(op), pages);
#if KV_TILES
    if (depth < 64) configure_tiles(16, 16, 64);
#endif
}

}  // namespace KV_NS
