// ops.h - what the files of kernels/cpu share: how an op's work is divided, and the table of one instruction set.
#pragma once
#include <atomic>
#include <cstdint>
#include "../kvrun.h"

namespace kv {

// One thread's part in a running step. Every thread walks the same ops in the same order; inside an op the work is
// taken in ranges, so which thread computes what may vary but no result depends on it.
struct Worker {
    int thread, threads;
    char *scratch;                    // shared by the threads; kv_cpu_scratch() bytes, 64-byte aligned
    struct Pool *pool;
    uint32_t phase = 0;               // which shared counter the next split uses
    bool from_memory = false;         // a step reads more weights than a cache holds

    void barrier();                   // waits for all threads of the step
    // Takes the next range of at most `grain` of [0, total) into begin, end; false when none is left. All threads
    // ask until they get false, then call finish() once before the next split. It does not wait.
    bool take(int64_t total, int64_t grain, int64_t &begin, int64_t &end);
    void finish() { phase++; }

    template <class Body> void split(int64_t total, int64_t grain, Body body) {
        int64_t begin, end;
        while (take(total, grain, begin, end)) body(begin, end);
        finish();
    }
};

// The kernels of one instruction set. The walker puts a barrier after each op; an op with inner phases calls
// worker.barrier() itself.
struct Ops {
    void (*embed)(const kv_op_embed &, const kv_state &, Worker &);
    void (*norm)(const kv_op_norm &, const kv_state &, Worker &);
    void (*linear)(const kv_op_linear &, const kv_state &, Worker &);
    void (*act)(const kv_op_act &, const kv_state &, Worker &);
    // Both as one, without the rows between them; false, with nothing done, where there is no such kernel.
    bool (*linear_act)(const kv_op_linear &, const kv_op_act &, const kv_state &, Worker &);
    void (*rope)(const kv_op_rope &, const kv_state &, Worker &);
    void (*append)(const kv_op_append &, kv_state &, Worker &);
    void (*attend)(const kv_op_attend &, const kv_state &, Worker &);
    void (*gather)(const kv_op_gather &, const kv_state &, Worker &);
    void (*sample)(const kv_op_sample &, kv_state &, Worker &);
    void (*thread_start)();           // once in every thread before its first step (FTZ/DAZ, AMX tile setup)
    // Scratch bytes of one op for up to max_rows rows and max_pages pages a sequence.
    int64_t (*linear_scratch)(const kv_op_linear &, int max_rows, int threads);
    int64_t (*attend_scratch)(const kv_op_attend &, int max_rows, int max_pages, int threads);
    int64_t (*sample_scratch)(const kv_op_sample &, int max_rows, int threads);
};

static inline int rows_of(int32_t rows, const kv_state &s) { return rows == KV_ROWS_OUT ? s.n_out : s.n_rows; }

}  // namespace kv

namespace kv_plain { extern const kv::Ops ops; }
namespace kv_avx2 { extern const kv::Ops ops; }
namespace kv_avx512 { extern const kv::Ops ops; }
namespace kv_amx { extern const kv::Ops ops; }
