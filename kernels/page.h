/* page.h - how packed weights and cache pages lie in memory. The only definition of both layouts.
 *
 * Weights W[n][k], n padded to a multiple of 16. Block b = rows 16b..16b+15; the 16 rows sit in the 16 lanes
 * of a vector, so a matrix-vector product never adds across lanes.
 *   F32        [n/16][k][16] float
 *   BF16, F16  [n/16][k/2][16][2]: column pairs side by side, which is also the B operand of an AMX bf16 tile
 *   Q8         [n/16][k/32] blocks of 544 bytes: f16 scale[16]; int8 q[8][16][4] (column 4j+i of lane l at q[j][l][i])
 *              value = scale*q
 *   Q4         [n/16][k/32] blocks of 320 bytes: f16 scale[16]; f16 min[16]; uint32 q[4][16]; dword j of lane l holds
 *              columns 8j..8j+7: byte i has column 8j+i in its low nibble and column 8j+4+i in its high one
 *              value = scale*q + min
 *   Q4S        [n/16][k/32] blocks of 288 bytes: f16 scale[16]; uint32 q[4][16] as in Q4; value = scale*(q - 8)
 *
 * Cache page of 128 slots, one head of size D (a multiple of 2), format F32, F16 or BF16:
 *   K  [8][D/2][16][2]: 16 tokens in the lanes, channel pairs side by side
 *   V  [64][D][2]: token pairs side by side
 *
 * Quantized pages (D a multiple of 16, at most 256). rotate() is the orthonormal Walsh-Hadamard transform of each block of B channels,
 * B the largest power of two that divides D (strides 1, 2, 4, ..., one multiplication by 1/sqrt(B) last). Every value is
 * first rounded to bfloat16; all arithmetic is float32 unless said; f16() rounds to the nearest half, ties to even, after
 * clamping to +-65504; rint() rounds half to even.
 *
 * Q8, appended token by token: y = rotate(x); groups of G = 32 channels (16 where 32 does not divide D);
 *   scale = f16(max|y| / 127), code = clamp(rint(y / scale), -127, 127), 0 where scale is 0; value = scale*code, rotated.
 *   K  int8 [8][D/4][16][4] (16 tokens in the lanes, four channels side by side), then f16 scale [8][D/G][16]
 *   V  int8 [D/16][32][16][4] (16 channels in the lanes, four tokens side by side), then f16 scale [D/G][128]
 *   Both are the B operand of an int8 product (VNNI, AMX) as they lie.
 *
 * Q4 of K, a whole page at a time, not rotated: channels share bytes in pairs, a channel that matters with one that does
 * not, s bits for the first and 8-s for the second, s in 4..8.
 *   uint8 pair[8][D/8][16][4] (16 tokens in the lanes, four pairs side by side): the byte of pair i =
 *   (code of channel high[i]) << (8-s) | code of channel low[i]
 *   f16 scale[D]; f16 zero[D]; uint8 chan[D/2][2] (high, low); uint8 split[D/2] (s); padded to a multiple of 64 bytes
 *   value = scale*code + zero
 *   importance w[c] = (qsq[c] * range[c]) * range[c], range = max - min over the page's slots (slots of sinks take the
 *   value of the first slot that is none), qsq[c] = sum over the page's rows in order of slot, then over the query heads
 *   of the KV head in order, of q[c]^2 (q after RoPE). How codes, scales and splits follow from that is stated in
 *   kvrun/backends/reference_pages.py, to the bit.
 * Q4 of V, a whole page at a time: y = rotate(x); groups of G = 64 channels (D where 64 does not divide D); scale =
 *   f16((max-min)/15), zero = f16(min), code = clamp(rint((y - zero) / scale), 0, 15); where scale is 0: code 0, zero =
 *   f16(min + 0.5*(max-min)). value = scale*code + zero, rotated.
 *   uint8 nibble[D/16][16][16][4] (16 channels in the lanes; byte i of octet o has token 8o+i low and token 8o+4+i
 *   high), then f16 scale[D/G][128], f16 zero[D/G][128]
 *
 * Side memory of a sequence in one layer, for Q4; each part present only where its format is Q4, in this order:
 *   K: bf16 open[kv_heads] (K page layout above), bf16 sinks[kv_heads][D/2][16][2], float qsq[kv_heads][D]
 *   V: bf16 open[kv_heads] (V page layout above), bf16 sinks[kv_heads][8][D][2]
 *   padded to a multiple of 64 bytes. A row in slot 0 starts qsq anew. The sinks are copied from the open page when
 *   the page of position 0 is quantized; its codes of those slots are unspecified and never read.
 */
#ifndef KVRUN_PAGE_H
#define KVRUN_PAGE_H
#include "kvrun.h"

#ifdef __CUDACC__
#define KV_FN static __host__ __device__ inline
#else
#define KV_FN static inline
#endif

#define KV_Q8_BLOCK 544
#define KV_Q4_BLOCK 320
#define KV_Q4S_BLOCK 288
#define KV_MAX_QUANT_DIM 256     /* largest head size of a quantized page: a channel number is one byte */

/* Element index of channel c of the token in slot t within one head's K (V) of a page. */
KV_FN int64_t kv_k_index(int t, int c, int head_dim) {
    return ((int64_t)(t / KV_LANES) * (head_dim / 2) + c / 2) * (2 * KV_LANES) + (t % KV_LANES) * 2 + c % 2;
}
KV_FN int64_t kv_v_index(int t, int c, int head_dim) {
    return ((int64_t)(t / 2) * head_dim + c) * 2 + t % 2;
}

/* The same in a quantized page, in bytes: K and V of Q8, pair i of K of Q4, V of Q4 (whose nibble is t / 4 % 2). */
KV_FN int64_t kv_k8_index(int t, int c, int head_dim) {
    return ((int64_t)(t / KV_LANES) * (head_dim / 4) + c / 4) * (4 * KV_LANES) + (t % KV_LANES) * 4 + c % 4;
}
KV_FN int64_t kv_v8_index(int t, int c) {
    return ((int64_t)(c / KV_LANES) * (KV_PAGE / 4) + t / 4) * (4 * KV_LANES) + c % KV_LANES * 4 + t % 4;
}
KV_FN int64_t kv_k4_index(int t, int i, int head_dim) { return kv_k8_index(t, i, head_dim / 2); }
KV_FN int64_t kv_v4_index(int t, int c) {
    return ((int64_t)(c / KV_LANES) * (KV_PAGE / 8) + t / 8) * (4 * KV_LANES) + c % KV_LANES * 4 + t % 4;
}

/* Channels that share a scale: of a Q8 page, of V in a Q4 page. */
KV_FN int kv_q8_group(int head_dim) { return head_dim % 32 ? 16 : 32; }
KV_FN int kv_q4_group(int head_dim) { return head_dim % 64 ? head_dim : 64; }

/* Bytes of K (V) of one head in one page. The format has pages of that head size. */
KV_FN int64_t kv_head_bytes(int dtype, int head_dim, int is_v) {
    const int64_t d = head_dim;
    switch (dtype) {
        case KV_F32: return KV_PAGE * d * 4;
        case KV_Q8: return KV_PAGE * (d + d / kv_q8_group(head_dim) * 2);
        case KV_Q4: return is_v ? KV_PAGE * (d / 2 + d / kv_q4_group(head_dim) * 4) : (d * 69 + d / 2 + 63) / 64 * 64;
        default: return KV_PAGE * d * 2;
    }
}

/* Where the parts of head h lie in a side memory, in bytes. V follows K, so its parts depend on whether K is Q4. */
KV_FN int64_t kv_side_open(int h, int head_dim) { return (int64_t)h * KV_PAGE * head_dim * 2; }
KV_FN int64_t kv_side_sinks(int h, int kv_heads, int head_dim) {
    return kv_side_open(kv_heads, head_dim) + (int64_t)h * KV_SINKS * head_dim * 2;
}
KV_FN int64_t kv_side_qsq(int h, int kv_heads, int head_dim) {
    return kv_side_sinks(kv_heads, kv_heads, head_dim) + (int64_t)h * head_dim * 4;
}
KV_FN int64_t kv_side_v(int k_dtype, int kv_heads, int head_dim) {
    return k_dtype == KV_Q4 ? kv_side_qsq(kv_heads, kv_heads, head_dim) : 0;
}
#endif
