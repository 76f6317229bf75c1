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
 *
 * Cache page of 128 slots, one head of size D (a multiple of 2), format F32, F16 or BF16:
 *   K  [8][D/2][16][2]: 16 tokens in the lanes, channel pairs side by side
 *   V  [64][D][2]: token pairs side by side
 */
#ifndef KVRUN_PAGE_H
#define KVRUN_PAGE_H
#include "kvrun.h"

#define KV_Q8_BLOCK 544
#define KV_Q4_BLOCK 320

/* Element index of channel c of the token in slot t within one head's K (V) of a page. */
static inline int64_t kv_k_index(int t, int c, int head_dim) {
    return ((int64_t)(t / KV_LANES) * (head_dim / 2) + c / 2) * (2 * KV_LANES) + (t % KV_LANES) * 2 + c % 2;
}
static inline int64_t kv_v_index(int t, int c, int head_dim) {
    return ((int64_t)(t / 2) * head_dim + c) * 2 + t % 2;
}
#endif
