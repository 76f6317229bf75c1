"""The CUDA half: what is built and which devices it sees. The executor itself does not exist yet, and says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kvrun.errors import UsageError

LIBRARY = Path(__file__).with_name("libkvrun_cuda.so")


@dataclass(frozen=True)
class CudaDevice:
    """One device. arch: compute capability as in "9.0". Memory in bytes."""

    name: str
    arch: str
    sms: int
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class CudaStatus:
    """What there is of CUDA. driver: the newest CUDA version it speaks, as in "13.0". reason: why there is no device
    to use; "" when there is one."""

    built: bool
    path: Path
    loads: bool
    driver: str | None
    devices: tuple[CudaDevice, ...]
    reason: str


def probe(library: Path = LIBRARY) -> CudaStatus:
    """Loads the library and asks it for the driver and the devices. Never raises: `reason` says what is missing."""
    def without(reason: str, loads: bool = False, driver: str | None = None) -> CudaStatus:
        return CudaStatus(library.exists(), library, loads, driver, (), reason)

    if not library.exists():
        return without("the CUDA kernels were not built: no nvcc was found when kvrun was installed")
    try:
        from kvrun.backends._abi import ffi

        lib = ffi.dlopen(str(library))
        if lib.kv_abi() != lib.KV_ABI:
            return without(f"{library} has interface {lib.kv_abi()}, this kvrun needs {lib.KV_ABI}; reinstall kvrun")
    except (ImportError, OSError, AttributeError) as error:
        return without(f"cannot load {library}: {error}")
    version = lib.kv_cuda_driver()
    if not version:
        return without("no CUDA driver on this machine", loads=True)
    driver = f"{version // 1000}.{version % 1000 // 10}"
    devices = []
    count = lib.kv_cuda_count()
    reason = ffi.string(lib.kv_cuda_error()).decode() if not count else ""
    for index in range(count):
        info = ffi.new("kv_cuda_device *")
        if lib.kv_cuda_describe(index, info) != lib.KV_OK:
            reason = ffi.string(lib.kv_cuda_error()).decode()
            continue
        devices.append(CudaDevice(ffi.string(info.name).decode(errors="replace"), f"{info.arch // 10}.{info.arch % 10}",
                                  info.sms, info.memory_bytes, info.free_bytes))
    return CudaStatus(True, library, True, driver, tuple(devices), "" if devices else reason)


def require() -> NoReturn:
    """Refuses `--device cuda`: always a UsageError, never another device in its place."""
    raise UsageError("--device cuda: kvrun has no CUDA decode loop yet; use --device cpu ('kvrun doctor' shows the devices)")
