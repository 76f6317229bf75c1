// step.cpp - the plan walker: checks every op, then launches one after the other on the caller's stream.
#include "../page.h"
#include "error.h"
#include "fuse.h"
#include "ops.h"
#include <cstdarg>
#include <cstdio>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace kv {

static thread_local char message[256];

void clear_error() { message[0] = 0; }

int fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

static const char *const kNames[KV_OP_COUNT] = {"embed", "norm", "linear", "act", "rope", "append", "attend", "gather", "sample"};
static const int kMaxHead = 256;

static bool is_weight(const kv_weight &w) { return w.n > 0 && w.k > 0 && w.k % KV_GROUP == 0 && w.dtype >= KV_F32 && w.dtype <= KV_Q4S; }
static bool is_quantized(int dtype) { return dtype == KV_Q8 || dtype == KV_Q4; }

static int check_cache(const kv_cache &c, int heads, int kv_heads, int head_dim, const char *name, int index) {
    if (kv_heads < 1 || heads < 1 || heads % kv_heads || head_dim < 1 || c.group < 0 || c.k_dtype < KV_F32 || c.k_dtype > KV_Q4 ||
        c.v_dtype < KV_F32 || c.v_dtype > KV_Q4)
        return fail(KV_BAD_PLAN, "op %d (%s) has an impossible cache or head", index, name);
    const int unit = is_quantized(c.k_dtype) || is_quantized(c.v_dtype) ? 16 : 8;
    if (head_dim % unit || head_dim > kMaxHead)
        return fail(KV_UNSUPPORTED, "op %d (%s): no CUDA kernel for heads of %d channels in this cache format, only for a multiple of %d up to %d",
                    index, name, head_dim, unit, kMaxHead);
    return KV_OK;
}

// Shapes and formats; pointers too when `pointers` is set.
static int check(const kv_op &op, int index, bool pointers) {
    if (op.kind < 0 || op.kind >= KV_OP_COUNT) return fail(KV_BAD_PLAN, "op %d is of unknown kind %d", index, op.kind);
    const char *name = kNames[op.kind];
    bool sound = true, given = true;
    switch (op.kind) {
    case KV_OP_EMBED:
        given = op.embed.w.data && op.embed.out;
        sound = is_weight(op.embed.w);
        break;
    case KV_OP_NORM:
        given = op.norm.x && op.norm.w && op.norm.out;
        sound = op.norm.dim > 0 && (op.norm.rows | 1) == 1;
        break;
    case KV_OP_LINEAR:
        given = op.linear.w.data && op.linear.x && op.linear.out;
        sound = is_weight(op.linear.w) && (op.linear.rows | 1) == 1;
        break;
    case KV_OP_ACT:
        given = op.act.x && op.act.out;
        sound = op.act.dim > 0 && (op.act.kind == KV_SILU || op.act.kind == KV_GELU_TANH);
        break;
    case KV_OP_ROPE:
        given = op.rope.inv_freq && op.rope.out;
        sound = op.rope.half > 0;
        break;
    case KV_OP_APPEND: {
        const kv_op_append &a = op.append;
        given = a.qkv && a.cache.base && (a.qk_norm == KV_QK_NONE || (a.q_norm && a.k_norm)) &&
                (a.cache.side || (a.cache.k_dtype != KV_Q4 && a.cache.v_dtype != KV_Q4));
        sound = a.rope_dim >= 0 && a.rope_dim % 2 == 0 && a.rope_dim <= a.head_dim && a.qk_norm >= KV_QK_NONE && a.qk_norm <= KV_QK_WHOLE;
        if (int status = check_cache(a.cache, a.heads, a.kv_heads, a.head_dim, name, index)) return status;
        break;
    }
    case KV_OP_ATTEND: {
        const kv_op_attend &a = op.attend;
        given = a.qkv && a.out && a.cache.base && (a.cache.side || (a.cache.k_dtype != KV_Q4 && a.cache.v_dtype != KV_Q4));
        sound = a.window >= 0;
        if (int status = check_cache(a.cache, a.heads, a.kv_heads, a.head_dim, name, index)) return status;
        break;
    }
    case KV_OP_GATHER:
        given = op.gather.x && op.gather.out;
        sound = op.gather.dim > 0;
        break;
    case KV_OP_SAMPLE:
        given = op.sample.logits;
        sound = op.sample.vocab > 0;
        break;
    }
    if (!sound) return fail(KV_BAD_PLAN, "op %d (%s) of layer %d has an impossible size", index, name, op.layer);
    if (pointers && !given) return fail(KV_BAD_PLAN, "op %d (%s) of layer %d has a null pointer", index, name, op.layer);
    return KV_OK;
}

static bool check_bounds(const kv_cuda_bounds *b) {
    return b && b->max_rows > 0 && b->max_out >= 0 && b->max_pages >= 0 && b->max_seqs > 0;
}

static int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Floats of Launch::sums of an op; those of all ops lie at the start of a step's scratch.
static int64_t sums_of(const kv_op &op, const kv_cuda_bounds &bounds) {
    if (op.kind != KV_OP_APPEND || op.append.cache.k_dtype != KV_Q4) return 0;
    return (int64_t)bounds.max_seqs * op.append.kv_heads * op.append.head_dim;
}
static int64_t sums_of(const kv_op *ops, int n_ops, const kv_cuda_bounds &bounds) {
    int64_t all = 0;
    for (int i = 0; i < n_ops; i++) all += sums_of(ops[i], bounds);
    return all;
}

// How many counters a step needs, which lie behind the sums.
static int64_t counters_of(const kv_op *ops, int n_ops, const kv_cuda_bounds &bounds) {
    int64_t most = 0;
    for (int i = 0; i < n_ops; i++) {
        const int64_t n = ops[i].kind == KV_OP_ATTEND ? attend_counters(ops[i].attend, bounds)
                          : ops[i].kind == KV_OP_APPEND && !bounds.prefill ? qkv_counters(ops[i].append, bounds) : 0;
        if (n > most) most = n;
    }
    return most;
}

static cudaError_t launch_op(const kv_op &op, const Launch &launch) {
    switch (op.kind) {
    case KV_OP_EMBED: return launch_embed(op.embed, launch);
    case KV_OP_NORM: return launch_norm(op.norm, launch);
    case KV_OP_LINEAR: return launch_linear(op.linear, launch);
    case KV_OP_ACT: return launch_act(op.act, launch);
    case KV_OP_ROPE: return launch_rope(op.rope, launch);
    case KV_OP_APPEND: return launch_append(op.append, launch);
    case KV_OP_ATTEND: return launch_attend(op.attend, launch);
    case KV_OP_GATHER: return launch_gather(op.gather, launch);
    case KV_OP_SAMPLE: return launch_sample(op.sample, launch);
    }
    return cudaErrorInvalidValue;  // check() lets nothing else through
}

// Launches the first of n ops, or several as one kernel; `taken`: how many. Prompt rows are never fused, decode rows always, so that
// the arithmetic of a row does not depend on how many there are.
static cudaError_t launch_some(const kv_op *op, int n, const Launch &launch, int &taken) {
    taken = 3;
    if (!launch.bounds.prefill && is_qkv(op, n)) return launch_qkv(op[0].norm, op[1].linear, op[2].append, launch);
    if (!launch.bounds.prefill && is_gated(op, n)) return launch_gated(op[0].norm, op[1].linear, op[2].act, launch);
    taken = 1;
    return launch_op(*op, launch);
}

}  // namespace kv

EXPORT int32_t kv_abi(void) { return KV_ABI; }

EXPORT const char *kv_cuda_error(void) { return kv::message; }

EXPORT int64_t kv_cuda_scratch(const kv_op *ops, int32_t n_ops, const kv_cuda_bounds *bounds) {
    kv::clear_error();
    if (!kv::check_bounds(bounds)) return kv::fail(-1, "impossible bounds of a step");
    int64_t most = 256;
    for (int i = 0; i < n_ops; i++) {
        if (kv::check(ops[i], i, false)) return -1;
        int64_t bytes = 0;
        if (ops[i].kind == KV_OP_ATTEND) bytes = kv::attend_scratch(ops[i].attend, *bounds);
        if (ops[i].kind == KV_OP_SAMPLE) bytes = kv::sample_scratch(ops[i].sample, *bounds);
        if (bytes > most) most = bytes;
    }
    return kv::aligned(4 * kv::sums_of(ops, n_ops, *bounds)) + kv::aligned(4 * kv::counters_of(ops, n_ops, *bounds)) + kv::aligned(most);
}

EXPORT int32_t kv_cuda_step(const kv_op *ops, int32_t n_ops, const kv_cuda_bounds *bounds, kv_state *state, void *scratch, uint64_t stream) {
    kv::clear_error();
    if (!state || !scratch || n_ops < 0 || !kv::check_bounds(bounds))
        return kv::fail(KV_BAD_PLAN, "a step without state or scratch, or with impossible bounds");
    for (int i = 0; i < n_ops; i++)
        if (int status = kv::check(ops[i], i, true)) return status;
    const int64_t counters = kv::counters_of(ops, n_ops, *bounds);
    char *const behind_sums = (char *)scratch + kv::aligned(4 * kv::sums_of(ops, n_ops, *bounds));
    kv::Launch launch{*bounds, state, behind_sums + kv::aligned(4 * counters), (unsigned *)behind_sums, (float *)scratch, (cudaStream_t)stream};
    if (counters) {
        const cudaError_t error = kv::launch_clear(launch.counters, (int)counters, launch.stream);
        if (error != cudaSuccess) return kv::fail(KV_DEVICE, "clearing counters: %s", cudaGetErrorString(error));
    }
    for (int i = 0, taken; i < n_ops; i += taken) {
        const cudaError_t error = kv::launch_some(ops + i, n_ops - i, launch, taken);
        if (error != cudaSuccess)
            return kv::fail(KV_DEVICE, "op %d (%s): %s", i, kv::kNames[ops[i].kind], cudaGetErrorString(error));
        launch.sums += kv::sums_of(ops + i, taken, *bounds);
    }
    return KV_OK;
}

EXPORT int32_t kv_cuda_advance(kv_state *state, uint64_t stream) {
    kv::clear_error();
    if (!state) return kv::fail(KV_BAD_PLAN, "no state");
    const cudaError_t error = kv::launch_advance(state, (cudaStream_t)stream);
    return error == cudaSuccess ? (int)KV_OK : kv::fail(KV_DEVICE, "advance: %s", cudaGetErrorString(error));
}

EXPORT int32_t kv_cuda_settle(const kv_op *ops, int32_t n_ops, const kv_cuda_bounds *bounds, kv_state *state, void *scratch, uint64_t stream) {
    kv::clear_error();
    if (!state || !scratch || n_ops < 0 || !kv::check_bounds(bounds))
        return kv::fail(KV_BAD_PLAN, "a step without state or scratch, or with impossible bounds");
    kv::Launch launch{*bounds, state, nullptr, nullptr, (float *)scratch, (cudaStream_t)stream};
    for (int i = 0; i < n_ops; i++) {
        const int64_t sums = kv::sums_of(ops[i], *bounds);
        const cudaError_t error = sums ? kv::launch_settle(ops[i].append, launch) : cudaSuccess;
        if (error != cudaSuccess) return kv::fail(KV_DEVICE, "settle: %s", cudaGetErrorString(error));
        launch.sums += sums;
    }
    return KV_OK;
}

EXPORT int32_t kv_cuda_copy(void *to, const void *from, int64_t bytes, uint64_t stream) {
    kv::clear_error();
    if (!to || !from || bytes < 0) return kv::fail(KV_BAD_PLAN, "a copy without an end");
    const cudaError_t error = cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDefault, (cudaStream_t)stream);
    return error == cudaSuccess ? (int)KV_OK : kv::fail(KV_DEVICE, "copy: %s", cudaGetErrorString(error));
}

EXPORT int32_t kv_cuda_unpack(const kv_weight *w, int64_t row0, int64_t rows, void *out, int32_t dtype, uint64_t stream) {
    kv::clear_error();
    if (!w || !kv::is_weight(*w) || !w->data || !out || row0 < 0 || rows < 0 || row0 + rows > w->n || dtype < KV_F32 || dtype > KV_BF16)
        return kv::fail(KV_BAD_PLAN, "a matrix that cannot be unpacked");
    const cudaError_t error = kv::launch_unpack(*w, row0, rows, out, dtype, (cudaStream_t)stream);
    return error == cudaSuccess ? (int)KV_OK : kv::fail(KV_DEVICE, "unpack: %s", cudaGetErrorString(error));
}
