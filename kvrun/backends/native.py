"""The native library: `ffi` with the declarations of kernels/kvrun.h, and `lib`, the loaded libkvrun_cpu.

Importing this module loads the library; NativeMissingError says in one line why that failed.
"""

from __future__ import annotations

from pathlib import Path

from kvrun.errors import UsageError


class NativeMissingError(UsageError):
    """The native library is absent, of another version, or cannot be loaded on this machine."""


LIBRARY = Path(__file__).with_name("libkvrun_cpu.so")

try:
    from kvrun.backends._abi import ffi
except ImportError as error:
    raise NativeMissingError(f"the native kernels were not built ({error}); reinstall kvrun with a C++ compiler") from None

try:
    lib = ffi.dlopen(str(LIBRARY))
except OSError as error:
    reason = str(error).rpartition(f"{LIBRARY}: ")[2]  # cffi and the loader name the file again, each
    raise NativeMissingError(f"cannot load {LIBRARY}: {reason}; reinstall kvrun on this machine") from None

if lib.kv_abi() != lib.KV_ABI:
    raise NativeMissingError(f"{LIBRARY} has interface {lib.kv_abi()}, this kvrun needs {lib.KV_ABI}; reinstall kvrun")

DTYPES = {"f32": lib.KV_F32, "f16": lib.KV_F16, "bf16": lib.KV_BF16, "q8": lib.KV_Q8, "q4": lib.KV_Q4, "q4s": lib.KV_Q4S,
          "q4_0": lib.KV_GGUF_Q4_0, "q4_1": lib.KV_GGUF_Q4_1, "q5_0": lib.KV_GGUF_Q5_0,
          "q8_0": lib.KV_GGUF_Q8_0, "q4_k": lib.KV_GGUF_Q4_K, "q5_k": lib.KV_GGUF_Q5_K, "q6_k": lib.KV_GGUF_Q6_K}
"""Python's names of storage formats -> enum kv_dtype."""

ISAS = {"plain": lib.KV_ISA_PLAIN, "avx2": lib.KV_ISA_AVX2, "avx512": lib.KV_ISA_AVX512, "amx": lib.KV_ISA_AMX}
"""Names of instruction sets -> enum kv_isa, weakest first."""
