/* kvrun.h - the one contract between Python, the CPU kernels, the CUDA kernels and the tests.
 *
 * An op is a plain C struct; a plan is a flat array of `kv_op`. What changes from step to step
 * lives in `kv_state`, so a plan is built once and replayed. Python reads this very file (cffi),
 * so it keeps to what a C declaration parser understands: #define of integers, enums, structs, prototypes.
 *
 * Units: every buffer of activations is float32, row-major and dense unless a comment says otherwise.
 * R = state->n_rows, O = state->n_out. Positions are absolute token positions. Sizes are in elements,
 * names ending in _bytes, _stride and _offset in bytes.
 */
#ifndef KVRUN_H
#define KVRUN_H
#ifdef __cplusplus
extern "C" {
#endif
#include <stdint.h>

#define KV_ABI 5          /* bumped with every change of this file's meaning */
#define KV_PAGE 128       /* token slots of a cache page */
#define KV_LANES 16       /* rows of a weight block, tokens of a K block */
#define KV_GROUP 32       /* columns that share a quantization scale */
#define KV_SINKS 16       /* first positions of a sequence, which a KV_Q4 cache keeps in 16 bits */

/* How numbers are stored. The byte layouts of weights and cache pages are in page.h. */
enum kv_dtype {
    KV_F32 = 0, KV_F16 = 1, KV_BF16 = 2,
    KV_Q8 = 3,            /* int8, one f16 scale per KV_GROUP */
    KV_Q4 = 4,            /* 4 bits, one f16 scale and one f16 minimum per KV_GROUP */
    KV_Q4S = 5,           /* 4 bits, one f16 scale per KV_GROUP, symmetric; of weights alone */
    /* Sources that kv_pack reads and nothing else uses: GGUF blocks as they lie in a file. */
    KV_GGUF_Q4_0 = 16, KV_GGUF_Q4_1 = 17, KV_GGUF_Q5_0 = 18, KV_GGUF_Q8_0 = 19, KV_GGUF_Q4_K = 20,
    KV_GGUF_Q5_K = 21, KV_GGUF_Q6_K = 22
};

enum kv_status {
    KV_OK = 0, KV_BAD_PLAN = 1, KV_NOT_FINITE = 2,
    KV_UNSUPPORTED = 3,   /* a sound op for which this executor has no kernel; nothing was run */
    KV_DEVICE = 4         /* the CUDA runtime refused; kv_cuda_error() says why */
};

/* A linear map R^k -> R^n, packed as page.h says. k is a multiple of KV_GROUP;
 * n is padded with zero rows to a multiple of KV_LANES. */
typedef struct kv_weight {
    const void *data;
    int32_t dtype;
    int32_t n, k;
} kv_weight;

/* One layer's part of the page pool: K of page p starts at base + p*page_stride, as [kv_heads][K bytes];
 * V of the same page v_offset further on, as [kv_heads][V bytes].
 *
 * KV_Q4 (of K, of V or of both) quantizes a page once, when its last slot is filled. Until then, and for the rows of
 * the step that fills it, the page's exact bfloat16 values are read from the sequence's side memory (page.h), at
 * side + kv_table.side*side_stride; a step therefore never has rows of two pages of one sequence in a layer that holds
 * KV_Q4. The first KV_SINKS positions are always read from the side memory. side is null without KV_Q4. */
typedef struct kv_cache {
    void *base, *side;
    int64_t page_stride, v_offset, side_stride;
    int32_t k_dtype, v_dtype;
    int32_t group;        /* which page table of the state */
    int32_t reserved;
} kv_cache;

/* The pages of one sequence in one layer group, oldest first. base[i] is the position of slot 0 of page[i],
 * a multiple of KV_PAGE; bases ascend and may have holes. Slots past the newest token hold anything. */
typedef struct kv_table {
    const int32_t *page, *base;
    int32_t n_pages;
    int32_t side;         /* which side memory belongs to the sequence */
} kv_table;

/* Settings of one draw. temperature <= 0 is greedy. top_k 0, top_p 1, min_p 0, repeat_penalty 1 are off.
 * Order and meaning as in transformers: each id in `recent` has its logit divided (multiplied when negative) by
 * repeat_penalty, once; temperature divides; top-k keeps logits >= the k-th largest; top-p keeps the smallest set of
 * most likely tokens whose probability reaches top_p (ties: lower id first); min-p keeps p >= min_p * max p. Then one
 * draw by inverse CDF in order of token id with u = (mix(seed ^ mix(position)) >> 40) * 2^-24, where mix is splitmix64's
 * finalizer after adding 0x9E3779B97F4A7C15 and position is that of the row; so a replay gives the same tokens.
 * Greedy takes the lowest id among equals. */
typedef struct kv_sampler {
    uint64_t seed;
    float temperature, top_p, min_p, repeat_penalty;
    int32_t top_k;
    int32_t n_recent;             /* how many of `recent` the penalty looks at */
    const int32_t *recent;        /* [n_recent] token ids, duplicates allowed */
} kv_sampler;

/* What changes from step to step. */
typedef struct kv_state {
    int32_t n_rows;               /* R: rows of this step, at most what the plan was built for */
    int32_t n_out;                /* O: rows whose logits are wanted; 0 skips the head */
    int32_t n_seqs, n_groups;
    int32_t prefill;              /* 1: prompt rows, 0: decode rows. It chooses the arithmetic, so that a row's
                                     result depends neither on how many rows share its step nor on the chunk size */
    int32_t status;               /* out: kv_status of the last step */
    const int32_t *token;         /* [R] token ids */
    const int32_t *pos;           /* [R] positions, ascending within a sequence */
    const int32_t *seq;           /* [R] sequence of the row */
    const int32_t *out_row;       /* [O] rows whose logits are wanted */
    const kv_table *table;        /* [n_groups][n_seqs] */
    const kv_sampler *sampler;    /* [O], or null: no token is drawn */
    int32_t *next;                /* out [O]: the drawn tokens */
    int64_t appended;             /* counts (row, layer) pairs whose K and V were computed and stored */
    int32_t ahead;                /* how many times kv_cuda_advance made this state out of another, at most 2; 0 from the host */
    int32_t reserved;
} kv_state;

/* Which rows an op works on. */
enum kv_rows { KV_ROWS_ALL = 0, KV_ROWS_OUT = 1 };

/* out[R][w.k] = scale * W[token][:] */
typedef struct kv_op_embed { kv_weight w; float *out; float scale; } kv_op_embed;

/* y = x / sqrt(mean(x^2) + eps) * (w + w_offset) over dim; out = y, or out += scale*y when accumulate.
 * RMSNorm (Zhang and Sennrich, 2019). out may be x. */
typedef struct kv_op_norm {
    const float *x, *w; float *out;
    int32_t dim, rows, accumulate;
    float eps, w_offset, scale;
} kv_op_norm;

/* y = x W^T + bias (bias may be null) for x[rows][k]; z = scale*y; softcap > 0: z = softcap*tanh(z/softcap);
 * out[rows][n] = z, or out += z when accumulate. */
typedef struct kv_op_linear {
    kv_weight w; const float *bias, *x; float *out;
    int32_t rows, accumulate;
    float scale, softcap;
} kv_op_linear;

enum kv_act { KV_SILU = 0, KV_GELU_TANH = 1 };
/* out[R][dim] = act(x[R][0:dim]) * x[R][dim:2*dim] */
typedef struct kv_op_act { const float *x; float *out; int32_t dim, kind; } kv_op_act;

/* out[R][2][half]: cos then sin of pos*inv_freq[half], times factor. The product is taken in float32. */
typedef struct kv_op_rope { const float *inv_freq; float *out; int32_t half; float factor; } kv_op_rope;

enum kv_qk_norm { KV_QK_NONE = 0, KV_QK_HEAD = 1, KV_QK_WHOLE = 2 };
/* Takes qkv[R][(heads + 2*kv_heads)*head_dim] in place: RMSNorm of q and k (per head: weights [head_dim];
 * whole projection: weights [heads*head_dim] and [kv_heads*head_dim]), then RoPE (Su et al., 2021) of the
 * first rope_dim channels of every q and k head with the table rope[R][2][rope_dim/2] (null: none): halves
 * paired (i, i + rope_dim/2), or neighbours (2i, 2i+1) when interleaved. Then stores K and V in the cache
 * at the row's position and adds R to state->appended. q stays in qkv; the k and v parts of qkv are
 * unspecified afterwards. */
typedef struct kv_op_append {
    float *qkv; const float *rope, *q_norm, *k_norm;
    kv_cache cache;
    int32_t heads, kv_heads, head_dim, rope_dim, interleaved, qk_norm;
    float eps, w_offset;
} kv_op_append;

/* out[R][heads*head_dim] = softmax(cap(scale * q k^T)) v over the cached slots of the row's sequence whose
 * position p satisfies p <= pos and (window == 0 or pos - p < window); q is the first heads*head_dim columns
 * of qkv; query head h reads KV head h / (heads/kv_heads). softcap > 0: cap(s) = softcap*tanh(s/softcap).
 * sinks (null or [heads]): one more logit per head in the denominator. */
typedef struct kv_op_attend {
    const float *qkv; float *out; const float *sinks;
    kv_cache cache;
    int32_t heads, kv_heads, head_dim, window;
    float scale, softcap;
} kv_op_attend;

/* out[O][dim] = x[out_row][dim] */
typedef struct kv_op_gather { const float *x; float *out; int32_t dim; } kv_op_gather;

/* next[O] = a draw from logits[O][vocab] as state->sampler says; KV_NOT_FINITE when a row holds NaN or its
 * maximum is not finite. The logits stay as they are. Does nothing when sampler is null. */
typedef struct kv_op_sample { const float *logits; int32_t vocab; } kv_op_sample;

enum kv_kind {
    KV_OP_EMBED = 0, KV_OP_NORM, KV_OP_LINEAR, KV_OP_ACT, KV_OP_ROPE, KV_OP_APPEND, KV_OP_ATTEND,
    KV_OP_GATHER, KV_OP_SAMPLE, KV_OP_COUNT
};

typedef struct kv_op {
    int32_t kind;
    int32_t layer;                /* for messages and profiles; -1 outside layers */
    union {
        kv_op_embed embed; kv_op_norm norm; kv_op_linear linear; kv_op_act act; kv_op_rope rope;
        kv_op_append append; kv_op_attend attend; kv_op_gather gather; kv_op_sample sample;
    };
} kv_op;

int32_t kv_abi(void);

/* ---- storage (host) ---- */

/* Bytes of a packed weight; -1 for a dtype that is no packed format or a k that is no multiple of KV_GROUP. */
int64_t kv_pack_bytes(int32_t dtype, int64_t n, int64_t k);
/* Packs `rows` source rows of k values (row-major, dense; src_dtype F32, F16, BF16 or a KV_GGUF_*) into rows
 * row0.. of dst, whose data points at kv_pack_bytes() writable bytes. GGUF blocks go only where nothing is lost
 * beyond rounding a scale or minimum to f16: Q4_0 -> KV_Q4S; Q4_0, Q4_1, Q4_K -> KV_Q4; Q5_0, Q8_0 -> KV_Q8. Q5_K and Q6_K go
 * to KV_Q8 as their values do, which errs by at most max|x|/140 in a group. F32/F16/BF16 go to any format but KV_Q4S:
 * KV_Q8 and KV_Q4 with the scale (and minimum) of least squared error that a search over steps finds; the same bytes on
 * every machine. Calls for disjoint rows may run on several threads when row0 and rows are multiples of KV_LANES. */
int32_t kv_pack(const kv_weight *dst, int64_t row0, int64_t rows, const void *src, int32_t src_dtype);
/* The inverse: rows row0.. of w as float32 [rows][k]. */
int32_t kv_unpack(const kv_weight *w, int64_t row0, int64_t rows, float *out);
/* Bytes of K (is_v 0) or V (is_v 1) of one head in one page; -1 for a format or head size that no page has. */
int64_t kv_page_bytes(int32_t dtype, int32_t head_dim, int32_t is_v);
/* Bytes of one layer's side memory of one sequence, a multiple of 64; 0 without KV_Q4. */
int64_t kv_side_bytes(int32_t k_dtype, int32_t v_dtype, int32_t kv_heads, int32_t head_dim);

/* ---- the CPU executor ---- */

enum kv_isa { KV_ISA_PLAIN = 0, KV_ISA_AVX2 = 1, KV_ISA_AVX512 = 2, KV_ISA_AMX = 3, KV_ISA_COUNT };
typedef struct kv_cpu kv_cpu;

/* The best instruction set that this build holds, this CPU has and this kernel grants. */
int32_t kv_cpu_isa(void);
/* Starts threads-1 workers (the caller of kv_cpu_step is the last). Null when isa is above kv_cpu_isa(). */
kv_cpu *kv_cpu_open(int32_t isa, int32_t threads);
void kv_cpu_close(kv_cpu *);
/* Bytes of scratch that a step of this plan needs for up to max_rows rows; pointers of the ops are not read. */
int64_t kv_cpu_scratch(const kv_op *ops, int32_t n_ops, int32_t max_rows, int32_t max_pages, int32_t threads, int32_t isa);
/* Runs the plan over the state. Returns and stores state->status. scratch: 64-byte aligned. Not reentrant. */
int32_t kv_cpu_step(kv_cpu *, const kv_op *ops, int32_t n_ops, kv_state *state, void *scratch);
/* Nanoseconds spent per op kind since the last call, into ns[KV_OP_COUNT]; then zeroes them. */
void kv_cpu_profile(kv_cpu *, int64_t *ns);
/* Bytes per second that `threads` cores read from `bytes` of memory together, best of `repeat`. */
double kv_cpu_read_bandwidth(const void *data, int64_t bytes, int32_t threads, int32_t repeat);

/* ---- the CUDA executor (its own library, which loads without a driver) ---- */

typedef struct kv_cuda_device {
    char name[256];
    int32_t arch;                 /* compute capability: 10*major + minor */
    int32_t sms;
    int32_t built;                /* whether this library holds code for it: machine code, or PTX that the driver compiles */
    int32_t reads_host;           /* whether kernels may follow any pointer of the host */
    int32_t reserved;
    int64_t memory_bytes, free_bytes;
} kv_cuda_device;

/* The architectures whose machine code the library holds, as compute capabilities times ten, and "PTX n" for what can take it:
 * "80, 86, 89, 90, 120, PTX 90, PTX 120". */
const char *kv_cuda_targets(void);
/* Devices that can be used; 0 when there is none, and kv_cuda_error() says why. */
int32_t kv_cuda_count(void);
/* The newest CUDA version that the driver speaks (1000*major + 10*minor); 0 without a driver. */
int32_t kv_cuda_driver(void);
/* Fills `out`. Opens the device's context in this process; where others have left too little memory for that, free_bytes is 0 and
 * built, which only a context could tell, is 1. KV_DEVICE on failure. */
int32_t kv_cuda_describe(int32_t device, kv_cuda_device *out);
/* Why the last call of this thread failed, one line; "" when it did not. */
const char *kv_cuda_error(void);
/* Bounds of the steps that a launch serves. A launch depends on them and on the ops alone, never on the state, so that it
 * can be captured in a graph and replayed for other rows, positions and page tables. */
typedef struct kv_cuda_bounds {
    int32_t max_rows, max_out;    /* of R and O */
    int32_t max_pages;            /* of n_pages of any table */
    int32_t max_seqs;             /* of n_seqs */
    int32_t prefill;              /* what state->prefill will be */
} kv_cuda_bounds;

/* Bytes of device scratch that steps within `bounds` need; pointers of the ops are not read. -1, and kv_cuda_error() says
 * why, for a plan that kv_cuda_step would refuse for its shapes or formats. */
int64_t kv_cuda_scratch(const kv_op *ops, int32_t n_ops, const kv_cuda_bounds *bounds);
/* Launches the plan on `stream` (a cudaStream_t as an integer) of the current device and does not wait. `ops` and `bounds`
 * are read here; `state`, what it points to, `scratch` (256-byte aligned) and all pointers inside the ops are device memory.
 * Checks all ops before it launches one. A state beyond the bounds is not noticed. Of decode rows, some ops that follow one another
 * are one kernel, which stores what each of them would. */
int32_t kv_cuda_step(const kv_op *ops, int32_t n_ops, const kv_cuda_bounds *bounds, kv_state *state, void *scratch, uint64_t stream);
/* Makes the state that of the decode step that follows: row i's token becomes next[i], its position grows by one, status is
 * KV_OK. For states whose every row gives a token; all else, the page tables too, stays as it is.
 *
 * Such a step may turn out to be for nothing: what it stored lies behind the newest token. What could not be taken back, the sums that
 * a KV_Q4 K page gathers over its rows (qsq in page.h), it leaves at the start of `scratch`, where they stay until one of two things
 * says that the step counts: kv_cuda_advance once more, or kv_cuda_settle. In between `scratch`, the ops (all of a plan) and max_seqs
 * stay the same. A state from the host does without them. */
int32_t kv_cuda_advance(kv_state *state, uint64_t stream);
/* Says that the step which kv_cuda_advance last began counts. The next state is the host's. Arguments as of kv_cuda_step. */
int32_t kv_cuda_settle(const kv_op *ops, int32_t n_ops, const kv_cuda_bounds *bounds, kv_state *state, void *scratch, uint64_t stream);
/* Copies between host and device memory, or within either, on `stream`; does not wait where host memory is page-locked. */
int32_t kv_cuda_copy(void *to, const void *from, int64_t bytes, uint64_t stream);
/* Rows row0.. of w (device memory) as a dense row-major matrix [rows][k] of KV_F32, KV_F16 or KV_BF16 on `stream`. */
int32_t kv_cuda_unpack(const kv_weight *w, int64_t row0, int64_t rows, void *out, int32_t dtype, uint64_t stream);

#ifdef __cplusplus
}
#endif
#endif
