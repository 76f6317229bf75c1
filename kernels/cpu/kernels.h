// kernels.h - the op functions of one instruction set, compiled once for each in namespace KV_NS.
#pragma once
#include "ops.h"

namespace KV_NS {
void embed(const kv_op_embed &, const kv_state &, kv::Worker &);
void norm(const kv_op_norm &, const kv_state &, kv::Worker &);
void linear(const kv_op_linear &, const kv_state &, kv::Worker &);
void act(const kv_op_act &, const kv_state &, kv::Worker &);
bool linear_act(const kv_op_linear &, const kv_op_act &, const kv_state &, kv::Worker &);
void rope(const kv_op_rope &, const kv_state &, kv::Worker &);
void append(const kv_op_append &, kv_state &, kv::Worker &);
void attend(const kv_op_attend &, const kv_state &, kv::Worker &);
void gather(const kv_op_gather &, const kv_state &, kv::Worker &);
void sample(const kv_op_sample &, kv_state &, kv::Worker &);
int64_t linear_scratch(const kv_op_linear &, int max_rows, int threads);
int64_t attend_scratch(const kv_op_attend &, int max_rows, int max_pages, int threads);
int64_t sample_scratch(const kv_op_sample &, int max_rows, int threads);
}  // namespace KV_NS
