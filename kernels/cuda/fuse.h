// fuse.h - which ops that follow one another a decode step launches as one kernel. The kernels store what each of the ops would, so
// nothing else of a plan need be known.
#pragma once
#include "ops.h"

namespace kv {

// norm, then a product of what it gives, for the same rows.
inline bool norm_feeds(const kv_op &norm, const kv_op &linear) {
    return norm.kind == KV_OP_NORM && linear.kind == KV_OP_LINEAR && linear.linear.x == norm.norm.out && norm.norm.out != norm.norm.x &&
           !norm.norm.accumulate && norm.norm.rows == linear.linear.rows && norm.norm.rows == KV_ROWS_ALL && norm.norm.dim == linear.linear.w.k &&
           !linear.linear.accumulate && linear.linear.softcap <= 0 && linear.linear.out != norm.norm.x && linear.linear.out != norm.norm.out;
}

// Whether the first three of n ops make one kernel.
inline bool is_qkv(const kv_op *op, int n) {
    if (n < 3 || !norm_feeds(op[0], op[1]) || op[2].kind != KV_OP_APPEND) return false;
    const kv_op_append &a = op[2].append;
    return a.qkv == op[1].linear.out && a.qk_norm != KV_QK_WHOLE && a.head_dim % KV_LANES == 0 && op[1].linear.w.n == (a.heads + 2 * a.kv_heads) * a.head_dim;
}
inline bool is_gated(const kv_op *op, int n) {
    if (n < 3 || !norm_feeds(op[0], op[1]) || op[2].kind != KV_OP_ACT) return false;
    const kv_op_act &a = op[2].act;
    return a.x == op[1].linear.out && a.dim % KV_LANES == 0 && op[1].linear.w.n == 2 * a.dim && a.out != op[0].norm.x && a.out != op[1].linear.out &&
           a.out != op[0].norm.out;
}

}  // namespace kv
