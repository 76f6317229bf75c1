// step.cpp - the plan walker: checks every op, then launches one after the other on the caller's stream.
#include "error.h"
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

static int check(const kv_op &op, int index) {
    if (op.kind < 0 || op.kind >= KV_OP_COUNT) return fail(KV_BAD_PLAN, "op %d is of unknown kind %d", index, op.kind);
    const char *name = kNames[op.kind];
    bool sound = true;
    switch (op.kind) {
    case KV_OP_EMBED: {
        const kv_weight &w = op.embed.w;
        sound = w.data && op.embed.out && w.n > 0 && w.k > 0 && w.k % KV_GROUP == 0;
        if (sound && w.dtype != KV_F32 && w.dtype != KV_F16 && w.dtype != KV_BF16)
            return fail(KV_UNSUPPORTED, "op %d (embed): no CUDA kernel for weights of format %d", index, w.dtype);
        break;
    }
    case KV_OP_NORM: sound = op.norm.x && op.norm.w && op.norm.out && op.norm.dim > 0; break;
    case KV_OP_ACT: sound = op.act.x && op.act.out && op.act.dim > 0 && (op.act.kind == KV_SILU || op.act.kind == KV_GELU_TANH); break;
    case KV_OP_ROPE: sound = op.rope.inv_freq && op.rope.out && op.rope.half > 0; break;
    case KV_OP_GATHER: sound = op.gather.x && op.gather.out && op.gather.dim > 0; break;
    default: return fail(KV_UNSUPPORTED, "op %d (%s): no CUDA kernel yet", index, name);
    }
    return sound ? KV_OK : fail(KV_BAD_PLAN, "op %d (%s) of layer %d has a null pointer or an impossible size", index, name, op.layer);
}

static cudaError_t launch_op(const kv_op &op, const Launch &launch) {
    switch (op.kind) {
    case KV_OP_EMBED: return launch_embed(op.embed, launch);
    case KV_OP_NORM: return launch_norm(op.norm, launch);
    case KV_OP_ACT: return launch_act(op.act, launch);
    case KV_OP_ROPE: return launch_rope(op.rope, launch);
    case KV_OP_GATHER: return launch_gather(op.gather, launch);
    }
    return cudaErrorInvalidValue;  // check() lets nothing else through
}

}  // namespace kv

EXPORT int32_t kv_abi(void) { return KV_ABI; }

EXPORT const char *kv_cuda_error(void) { return kv::message; }

EXPORT int32_t kv_cuda_step(const kv_op *ops, int32_t n_ops, kv_state *state, int32_t max_rows, int32_t max_out, uint64_t stream) {
    kv::clear_error();
    if (!state || max_rows < 1 || max_out < 0 || n_ops < 0)
        return kv::fail(KV_BAD_PLAN, "a step of %d ops for up to %d rows and %d outputs", n_ops, max_rows, max_out);
    for (int i = 0; i < n_ops; i++)
        if (int status = kv::check(ops[i], i)) return status;
    const kv::Launch launch{state, max_rows, max_out, (cudaStream_t)stream};
    for (int i = 0; i < n_ops; i++) {
        const cudaError_t error = kv::launch_op(ops[i], launch);
        if (error != cudaSuccess)
            return kv::fail(KV_DEVICE, "op %d (%s): %s", i, kv::kNames[ops[i].kind], cudaGetErrorString(error));
    }
    return KV_OK;
}
