// step.cpp - walks a plan on all threads, with a barrier after each op.
#include <cstdint>
#include <new>

#include "../page.h"
#include "pace.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct kv_cpu {
    kv::Pool pool, single;           // single: for whole steps of one thread
    kv::Pool solo;                   // for small ops, which one thread does while the others wait at a barrier
    kv::Pace pace;
    const kv::Ops *table;
    int64_t spent[KV_OP_COUNT] = {};
    int64_t mark = 0;                // when the op now running began; only touched inside barriers

    kv_cpu(int threads, const kv::Ops *ops) : pool(threads), single(1), solo(1), table(ops) {}
};

namespace {

// What the last thread at a barrier needs to go on alone.
struct Step {
    kv_cpu &cpu;
    kv::Pool &pool;                  // of the threads that take part
    const kv_op *ops;
    int n_ops;
    kv_state &state;
    char *scratch;
    bool from_memory;
};

int rows_of(const kv_op &op, const kv_state &s) {
    switch (op.kind) {
        case KV_OP_NORM: return kv::rows_of(op.norm.rows, s);
        case KV_OP_LINEAR: return kv::rows_of(op.linear.rows, s);
        case KV_OP_GATHER: return s.n_out;
        case KV_OP_SAMPLE: return s.sampler ? s.n_out : 0;
        default: return s.n_rows;
    }
}

// Whether some page is quantized in this step.
bool fills_page(const kv_cache &c, const kv_state &s) {
    if (c.k_dtype != KV_Q4 && c.v_dtype != KV_Q4) return false;
    for (int i = 0; i < s.n_rows; i++)
        if (s.pos[i] % KV_PAGE == KV_PAGE - 1) return true;
    return false;
}

// Floats that an op touches, or a number too large to be small.
int64_t work(const kv_op &op, const kv_state &s) {
    const int64_t rows = rows_of(op, s);
    switch (op.kind) {
        case KV_OP_EMBED: return rows * op.embed.w.k;
        case KV_OP_NORM: return rows * op.norm.dim;
        case KV_OP_ACT: return rows * op.act.dim * 2;
        case KV_OP_ROPE: return rows * op.rope.half * 8;
        case KV_OP_APPEND: return fills_page(op.append.cache, s) ? INT64_MAX : rows * (op.append.heads + 2 * op.append.kv_heads) * op.append.head_dim * 2;
        case KV_OP_GATHER: return rows * op.gather.dim;
        case KV_OP_SAMPLE: return rows == 1 ? 0 : INT64_MAX;
        default: return INT64_MAX;
    }
}

// Below this a barrier costs more than a second thread gains.
const int64_t SMALL = 16384;
bool is_small(const kv_op &op, const kv_state &s) { return work(op, s) <= SMALL; }

void call(const kv::Ops &table, const kv_op &op, kv_state &s, kv::Worker &w) {
    switch (op.kind) {
        case KV_OP_EMBED: return table.embed(op.embed, s, w);
        case KV_OP_NORM: return table.norm(op.norm, s, w);
        case KV_OP_LINEAR: return table.linear(op.linear, s, w);
        case KV_OP_ACT: return table.act(op.act, s, w);
        case KV_OP_ROPE: return table.rope(op.rope, s, w);
        case KV_OP_APPEND: return table.append(op.append, s, w);
        case KV_OP_ATTEND: return table.attend(op.attend, s, w);
        case KV_OP_GATHER: return table.gather(op.gather, s, w);
        case KV_OP_SAMPLE: return table.sample(op.sample, s, w);
    }
}

void account(kv_cpu &cpu, int kind) {
    int64_t now = kv::now_ns();
    cpu.spent[kind] += now - cpu.mark;
    cpu.mark = now;
}

// Does the small ops from `i` on with this thread alone; returns the first op that is neither small nor empty.
int run_small(const Step &step, int i) {
    kv_cpu &cpu = step.cpu;
    for (; i < step.n_ops; i++) {
        if (rows_of(step.ops[i], step.state) == 0) continue;
        if (!is_small(step.ops[i], step.state)) break;
        kv::Worker worker{0, 1, step.scratch, &cpu.solo, cpu.solo.clean, step.from_memory};
        call(*cpu.table, step.ops[i], step.state, worker);
        worker.barrier();
        account(cpu, step.ops[i].kind);
    }
    return i;
}

struct Arrival { const Step *step; int kind, next; };

void last_at_barrier(void *p) {
    const Arrival &a = *(Arrival *)p;
    account(a.step->cpu, a.kind);
    run_small(*a.step, a.next);
}

struct Run { const Step *step; int first; };

void walk(void *p, int thread) {
    const Run &run = *(Run *)p;
    const Step &step = *run.step;
    kv_cpu &cpu = step.cpu;
    cpu.table->thread_start();
    kv::FlushDenormals mode;
    kv::Worker worker{thread, step.pool.threads, step.scratch, &step.pool, step.pool.clean, step.from_memory};
    for (int i = run.first; i < step.n_ops; i++) {
        const kv_op &op = step.ops[i];
        if (rows_of(op, step.state) == 0 || is_small(op, step.state)) continue;   // see last_at_barrier
        if (i + 1 < step.n_ops && op.kind == KV_OP_LINEAR && step.ops[i + 1].kind == KV_OP_ACT &&
            cpu.table->linear_act(op.linear, step.ops[i + 1].act, step.state, worker)) i++;
        else call(*cpu.table, op, step.state, worker);
        Arrival arrival{&step, op.kind, i + 1};
        step.pool.barrier(worker.phase, last_at_barrier, &arrival);
    }
}

bool good_linear(const kv_weight &w) {
    return w.n > 0 && w.k > 0 && w.k % KV_GROUP == 0 && w.dtype >= KV_F32 && w.dtype <= KV_Q4S;
}

// Bytes of weights that a step reads, and about how many of them a large last-level cache holds from step to step.
int64_t weight_bytes(const kv_op *ops, int n_ops) {
    int64_t bytes = 0;
    for (int i = 0; i < n_ops; i++)
        if (ops[i].kind == KV_OP_LINEAR) bytes += kv_pack_bytes(ops[i].linear.w.dtype, ops[i].linear.w.n, ops[i].linear.w.k);
    return bytes;
}
const int64_t CACHED = 160 << 20;

bool good_format(int dtype, int head_dim) {
    if (dtype == KV_Q8 || dtype == KV_Q4) return head_dim > 0 && head_dim % 16 == 0 && head_dim <= KV_MAX_QUANT_DIM;
    return dtype >= KV_F32 && dtype <= KV_BF16 && head_dim > 0 && head_dim % 2 == 0;
}

bool has_side(const kv_cache &c) { return c.k_dtype == KV_Q4 || c.v_dtype == KV_Q4; }

bool good_cache(const kv_cache &c, int heads, int kv_heads, int head_dim) {
    return kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && good_format(c.k_dtype, head_dim) &&
           good_format(c.v_dtype, head_dim) && c.group >= 0;
}

// Whether a state can be run over a cache: see kv_cache for what KV_Q4 asks.
bool good_tables(const kv_cache &c, const kv_state &s) {
    if (c.group >= s.n_groups || !s.table) return false;
    if (!has_side(c)) return true;
    if (!c.side) return false;
    for (int i = 0; i < s.n_rows; i++) {
        if (s.table[(int64_t)c.group * s.n_seqs + s.seq[i]].side < 0) return false;
        for (int j = i - 1; j >= 0; j--) {                    // the row before of the same sequence, mostly the last one
            if (s.seq[j] != s.seq[i]) continue;
            if (s.pos[j] / KV_PAGE != s.pos[i] / KV_PAGE) return false;
            break;
        }
    }
    return true;
}

bool good_op(const kv_op &op) {
    switch (op.kind) {
        case KV_OP_EMBED: return good_linear(op.embed.w);
        case KV_OP_NORM: return op.norm.dim > 0 && (op.norm.rows | 1) == 1;
        case KV_OP_LINEAR: return good_linear(op.linear.w) && (op.linear.rows | 1) == 1;
        case KV_OP_ACT: return op.act.dim > 0 && (op.act.kind == KV_SILU || op.act.kind == KV_GELU_TANH);
        case KV_OP_ROPE: return op.rope.half > 0;
        case KV_OP_APPEND: {
            const kv_op_append &a = op.append;
            return good_cache(a.cache, a.heads, a.kv_heads, a.head_dim) && a.rope_dim >= 0 && a.rope_dim % 2 == 0 &&
                   a.rope_dim <= a.head_dim && a.qk_norm >= KV_QK_NONE && a.qk_norm <= KV_QK_WHOLE;
        }
        case KV_OP_ATTEND: {
            const kv_op_attend &a = op.attend;
            return good_cache(a.cache, a.heads, a.kv_heads, a.head_dim) && a.window >= 0;
        }
        case KV_OP_GATHER: return op.gather.dim > 0;
        case KV_OP_SAMPLE: return op.sample.vocab > 0;
        default: return false;
    }
}

bool good_state(const kv_op *ops, int n_ops, const kv_state &s) {
    if (s.n_rows < 1 || s.n_out < 0 || s.n_out > s.n_rows || s.n_seqs < 1 || !s.pos || !s.seq || !s.token) return false;
    for (int i = 0; i < s.n_rows; i++)
        if (s.seq[i] < 0 || s.seq[i] >= s.n_seqs || s.pos[i] < 0) return false;
    for (int i = 0; i < s.n_out; i++)
        if (!s.out_row || s.out_row[i] < 0 || s.out_row[i] >= s.n_rows) return false;
    for (int i = 0; i < n_ops; i++) {
        const kv_op &op = ops[i];
        if (!good_op(op)) return false;
        if (op.kind == KV_OP_APPEND && !good_tables(op.append.cache, s)) return false;
        if (op.kind == KV_OP_ATTEND && !good_tables(op.attend.cache, s)) return false;
        if (op.kind == KV_OP_SAMPLE && s.sampler && s.n_out > 0 && !s.next) return false;
        if (op.kind == KV_OP_EMBED)
            for (int r = 0; r < s.n_rows; r++)
                if (s.token[r] < 0 || s.token[r] >= op.embed.w.n) return false;
    }
    return true;
}

}  // namespace

EXPORT kv_cpu *kv_cpu_open(int32_t isa, int32_t threads) {
    const kv::Ops *table = kv::ops_of(isa);
    if (!table || threads < 1 || threads > 1024) return nullptr;
    kv_cpu *cpu = new (std::nothrow) kv_cpu(threads, table);
    if (cpu && !cpu->pool.start()) {
        delete cpu;
        return nullptr;
    }
    return cpu;
}

EXPORT void kv_cpu_close(kv_cpu *cpu) {
    // In a forked child the workers do not exist, and what they waited on cannot be torn down.
    if (cpu && !cpu->pool.forked()) delete cpu;
}

EXPORT int64_t kv_page_bytes(int32_t dtype, int32_t head_dim, int32_t is_v) {
    return good_format(dtype, head_dim) ? kv_head_bytes(dtype, head_dim, is_v) : -1;
}

EXPORT int64_t kv_side_bytes(int32_t k_dtype, int32_t v_dtype, int32_t kv_heads, int32_t head_dim) {
    const int64_t k = k_dtype == KV_Q4 ? kv_side_qsq(kv_heads, kv_heads, head_dim) : 0;
    const int64_t v = v_dtype == KV_Q4 ? kv_side_sinks(kv_heads, kv_heads, head_dim) : 0;
    return (k + v + 63) / 64 * 64;
}

EXPORT int64_t kv_cpu_scratch(const kv_op *ops, int32_t n_ops, int32_t max_rows, int32_t max_pages, int32_t threads,
                              int32_t isa) {
    const kv::Ops *table = kv::ops_of(isa);
    if (!table || !ops || n_ops < 1 || max_rows < 1 || max_pages < 0 || threads < 1) return -1;
    int64_t most = 64;
    for (int i = 0; i < n_ops; i++) {
        if (!good_op(ops[i])) return -1;
        int64_t bytes = 0;
        if (ops[i].kind == KV_OP_LINEAR) bytes = table->linear_scratch(ops[i].linear, max_rows, threads);
        if (ops[i].kind == KV_OP_ATTEND) bytes = table->attend_scratch(ops[i].attend, max_rows, max_pages, threads);
        if (ops[i].kind == KV_OP_SAMPLE) bytes = table->sample_scratch(ops[i].sample, max_rows, threads);
        if (bytes > most) most = bytes;
    }
    return (most + 63) / 64 * 64;
}

EXPORT int32_t kv_cpu_step(kv_cpu *cpu, const kv_op *ops, int32_t n_ops, kv_state *state, void *scratch) {
    if (!state) return KV_BAD_PLAN;
    state->status = KV_BAD_PLAN;
    if (!cpu || !ops || n_ops < 1 || !scratch || (uintptr_t)scratch % 64 || cpu->pool.forked()) return KV_BAD_PLAN;
    if (!good_state(ops, n_ops, *state)) return KV_BAD_PLAN;
    state->status = KV_OK;
    // Prompt rows are laid out for the number of threads, and take long enough not to mind.
    const bool paced = cpu->pool.threads > 1 && !state->prefill && state->n_rows == 1;
    kv::Pool &pool = paced && cpu->pace.alone(ops) ? cpu->single : cpu->pool;
    Step step{*cpu, pool, ops, n_ops, *state, (char *)scratch, weight_bytes(ops, n_ops) > CACHED};
    const int64_t begin = cpu->mark = kv::now_ns();
    kv::FlushDenormals mode;
    cpu->table->thread_start();
    Run run{&step, run_small(step, 0)};
    if (run.first < n_ops) pool.run(walk, &run);
    if (paced) cpu->pace.took(kv::now_ns() - begin);
    return state->status;
}

EXPORT void kv_cpu_profile(kv_cpu *cpu, int64_t *ns) {
    for (int i = 0; i < KV_OP_COUNT; i++) {
        ns[i] = cpu ? cpu->spent[i] : 0;
        if (cpu) cpu->spent[i] = 0;
    }
}
