"""The CUDA half: what is built, which devices it sees, and whether they can be used. Imports no torch until a device is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrun.errors import UsageError

if TYPE_CHECKING:
    from kvrun.backends.cuda_device import Device

LIBRARY = Path(__file__).with_name("libkvrun_cuda.so")
_OLDEST = 8.0
"""The compute capability that the kernels' instructions need."""
_NO_DEVICE = "no CUDA-capable device is detected"
"""What the CUDA runtime says where there is a driver and no device, or none that CUDA_VISIBLE_DEVICES leaves."""


@dataclass(frozen=True)
class CudaDevice:
    """One device. arch: compute capability as in "9.0". built: whether the library holds code for it. Memory in bytes. index: its number
    among those that CUDA_VISIBLE_DEVICES leaves."""

    name: str
    arch: str
    sms: int
    built: bool
    memory_bytes: int
    free_bytes: int
    index: int = 0


@dataclass(frozen=True)
class CudaStatus:
    """What there is of CUDA. driver: the newest CUDA version it speaks, as in "13.0". devices: the first one alone unless all were
    asked for, and those that could be opened. reason: why the first device, the one that is used, cannot be; "" when it can."""

    built: bool
    path: Path
    loads: bool
    driver: str | None
    devices: tuple[CudaDevice, ...]
    reason: str
    targets: str = ""
    """What it was built for, as kv_cuda_targets says; "" where it does not load."""

    @property
    def absent(self) -> bool:
        """Whether there is no device that could have been used: nothing that somebody who asked for none need know."""
        return self.driver is None or self.reason == _NO_DEVICE


def probe(library: Path = LIBRARY, *, every: bool = False) -> CudaStatus:
    """Loads the library and asks it for the driver and the first device. Never raises: `reason` says what is missing. every: for all
    devices, which takes some memory of each: to look at one opens its context."""
    def without(reason: str, loads: bool = False, targets: str = "", driver: str | None = None) -> CudaStatus:
        return CudaStatus(library.exists(), library, loads, driver, (), reason, targets)

    if not library.exists():
        return without("the CUDA kernels were not built: no nvcc was found when kvrun was installed")
    try:
        lib = open_library(library)
    except UsageError as error:
        return without(str(error))
    from kvrun.backends._abi import ffi

    def said() -> str:
        return ffi.string(lib.kv_cuda_error()).decode()

    targets = ffi.string(lib.kv_cuda_targets()).decode()
    version = lib.kv_cuda_driver()
    if not version:
        return without("no CUDA driver on this machine", True, targets)
    driver = f"{version // 1000}.{version % 1000 // 10}"
    count = lib.kv_cuda_count()
    if not count:
        why = said()
        return without(why if why == _NO_DEVICE else f"{why} (the driver speaks CUDA {driver})", True, targets, driver)
    devices, reason = [], ""
    for index in range(count if every else 1):
        info = ffi.new("kv_cuda_device *")
        if lib.kv_cuda_describe(index, info) == lib.KV_OK:
            devices.append(CudaDevice(ffi.string(info.name).decode(errors="replace"), f"{info.arch // 10}.{info.arch % 10}",
                                      info.sms, bool(info.built), info.memory_bytes, info.free_bytes, index))
        elif index == 0:
            reason = said()
    return CudaStatus(True, library, True, driver, tuple(devices), reason, targets)


def open_library(path: Path = LIBRARY) -> Any:
    """The library with kv_cuda_step. UsageError when it cannot be loaded or speaks another interface."""
    try:
        from kvrun.backends._abi import ffi

        lib = ffi.dlopen(str(path))
        if lib.kv_abi() != lib.KV_ABI:
            raise UsageError(f"{path} has interface {lib.kv_abi()}, this kvrun needs {lib.KV_ABI}; reinstall kvrun")
    except (ImportError, OSError, AttributeError) as error:
        raise UsageError(f"cannot load {path}: {error}") from None
    return lib


def why_not(status: CudaStatus) -> str:
    """Why the first device cannot be used, in one line; "" when it can. Asks torch only where all else is well."""
    if status.reason or not status.devices:
        return status.reason
    device = status.devices[0]
    if not device.built:
        if float(device.arch) < _OLDEST:
            return f"{device.name} is compute {device.arch}, and the kernels need {_OLDEST} or newer"
        return f"this build has no kernels for {device.name} (compute {device.arch}); reinstall kvrun on this machine"
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device; its CUDA {torch.version.cuda} may need a newer driver than {status.driver}"
    return ""


def require() -> CudaStatus:
    """What there is, where `--device cuda` can be used; else a UsageError that says why, and never another device."""
    status = probe()
    reason = why_not(status)
    if reason:
        raise UsageError(f"--device cuda: {reason}; use --device cpu ('kvrun doctor' shows the devices)")
    return status


def library_of(device: str) -> Any:
    """The library that plans are sized with on `device`, cuda or simt."""
    if device == "simt":
        from kvrun.backends.simt import SimtDevice

        return SimtDevice().lib
    return open_library()


def open_device(device: str) -> Device:
    """Opens cuda, or simt. UsageError as require()."""
    if device == "simt":
        from kvrun.backends.simt import SimtDevice

        return SimtDevice()
    status = require()
    from kvrun.backends.cuda_torch import TorchDevice

    return TorchDevice(status)


def free_memory() -> int:
    """Bytes that are free on the first device. UsageError without one."""
    status = probe()
    if status.reason:
        raise UsageError(f"--device cuda: {status.reason}; use --device cpu")
    return status.devices[0].free_bytes
