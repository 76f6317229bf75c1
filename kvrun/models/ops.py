"""The enum values of kernels/kvrun.h that a plan carries, for readers of plans that have no compiled library."""

ROWS_ALL, ROWS_OUT = 0, 1                       # enum kv_rows
SILU, GELU_TANH = 0, 1                          # enum kv_act
QK_NONE, QK_HEAD, QK_WHOLE = 0, 1, 2            # enum kv_qk_norm

ACT = {"silu": SILU, "gelu_tanh": GELU_TANH}
QK_NORM = {"none": QK_NONE, "head": QK_HEAD, "whole": QK_WHOLE}
