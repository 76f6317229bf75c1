"""kvrun doctor: what is installed, what was chosen, and why not better."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrun import __version__
from kvrun.cli import options as opt
from kvrun.errors import KvrunError

_DISTRIBUTIONS = ("torch", "numpy", "tokenizers", "safetensors", "huggingface-hub", "gguf", "jinja2")
# What each instruction set needs beyond the one before it, as /proc/cpuinfo spells it (kernels/cpu/isa.cpp).
_ISA_FLAGS = {"avx2": ("avx2", "fma", "f16c"), "avx512": ("avx512f", "avx512dq", "avx512bw", "avx512vl"),
              "amx": ("avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")}

Section = dict[str, Any]


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    color: opt.Color = "auto",
    verbose: opt.Verbose = False,
) -> None:
    """Show what kvrun uses on this machine, and why not better.

    Nothing is fetched and no model is opened; measuring memory takes a quarter of a GiB for a moment.

    \b
    Examples:
      kvrun doctor
      kvrun doctor --json
      kvrun doctor --json | python -m json.tool
    """
    console = opt.configure_console(opt.OutputOptions(color=color, verbose=verbose))
    report = {title: _examined(probe) for title, probe in _PROBES.items()}
    if json:
        from kvrun.cli.report import as_json

        console.out(as_json(report))
        return
    for title, section in report.items():
        console.line(title)
        for name, value in section.items():
            console.line(f"  {name:<20} {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(v)}" for name, v in value.items()) or "none"
    return "unknown" if value is None else str(value)


def _examined(probe: Callable[[], Section]) -> Section:
    """A section, or the one line that says why it could not be had: the rest is still worth reading."""
    try:
        return probe()
    except KvrunError as error:
        return {"problem": str(error)}
    except Exception as error:  # noqa: BLE001 - a diagnosis must not fail for what it diagnoses
        return {"problem": f"{type(error).__name__}: {error}"}


def _versions() -> Section:
    import importlib.metadata
    import platform

    found: Section = {"kvrun": __version__, "python": platform.python_version(), "executable": sys.executable,
                      "system": platform.platform(terse=True)}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)  # not by importing: torch alone takes seconds
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu_name_and_flags() -> tuple[str | None, frozenset[str]]:
    name, flags = None, frozenset[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                return name, frozenset(value.split())
    except OSError:
        pass  # another system
    return name, flags


def _why_not_better(isa: str, isas: list[str], flags: frozenset[str]) -> str:
    better = isas[isas.index(isa) + 1 :]
    if not better:
        return "nothing: it is the best there is"
    missing = [flag for flag in _ISA_FLAGS[better[0]] if flag not in flags]
    if missing:
        return f"{better[0]}: this CPU lacks {', '.join(missing)}"
    return f"{better[0]}: the CPU has it, but this build holds no such kernels or the system does not grant its registers"


def _native() -> Section:
    from kvrun.backends.native import ISAS, LIBRARY, lib

    name, flags = _cpu_name_and_flags()
    isas = sorted(ISAS, key=ISAS.get)
    isa = next(i for i in isas if ISAS[i] == lib.kv_cpu_isa())
    from kvrun.backends.cpu import default_threads

    threads = default_threads()
    return {"cpu": name, "library": str(LIBRARY), "interface": lib.kv_abi(), "instruction set": isa,
            "why not better": _why_not_better(isa, isas, flags), "threads": threads, "logical cpus": os.cpu_count()}


def _memory() -> Section:
    from kvrun.cache.planner import available_memory
    from kvrun.terminal import human_bytes

    free = available_memory()
    found: Section = {"total": human_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
                      "available": human_bytes(free) if free is not None else None}
    return found


def _bandwidth() -> Section:
    from kvrun.backends.cpu import default_threads
    from kvrun.measure.bandwidth import read_bandwidth

    return {f"{threads} thread" + "s" * (threads > 1): f"{read_bandwidth(threads) / 1e9:.1f} GB/s"
            for threads in dict.fromkeys((1, default_threads()))}


def _cuda() -> Section:
    from kvrun.backends.cuda import probe, why_not
    from kvrun.terminal import human_bytes

    status = probe(every=True)
    built = f"for compute {status.targets}" if status.targets else status.built
    found: Section = {"kernels built": built, "library": str(status.path), "library loads": status.loads,
                      "driver": status.driver or "none"}
    for device in status.devices:
        found[f"device {device.index}"] = (f"{device.name}, compute {device.arch}, {device.sms} SMs, "
                                    f"{human_bytes(device.free_bytes)} of {human_bytes(device.memory_bytes)} free")
    reason = why_not(status)
    if status.devices:
        found["used by auto"] = not reason
    if reason:
        found["why not"] = reason
    return found


def _with_size(folder: Path, note: str = "") -> str:
    """The folder, and what its files take together."""
    from kvrun.terminal import human_bytes

    if not folder.is_dir():
        return f"{folder} (none yet)"
    taken = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process removes it
            taken += 0 if path.is_dir() else path.lstat().st_size
    return f"{folder} ({human_bytes(taken)}{note})"


def _places() -> Section:
    from huggingface_hub import constants

    from kvrun.hub.catalog import load_catalog, shipped_file, user_file
    from kvrun.hub.store import packed_dir, store_dir

    from kvrun.cache.prompt_cache import prompts_dir
    from kvrun.cache.session import sessions_dir

    mine, again = user_file(), ", made again when needed"
    return {"sessions": _with_size(sessions_dir()), "pages of prompts": _with_size(prompts_dir(), again), "packaged models": _with_size(store_dir()),
            "quantized weights": _with_size(packed_dir(), again), "hub cache": str(constants.HF_HUB_CACHE),
            "hub offline": bool(constants.HF_HUB_OFFLINE), "models.toml": str(shipped_file()),
            "your models.toml": str(mine) if mine.is_file() else f"{mine} (none yet)", "default model": load_catalog().default}


_PROBES: dict[str, Callable[[], Section]] = {
    "versions": _versions, "native kernels": _native, "memory": _memory, "memory reading": _bandwidth,
    "cuda": _cuda, "places": _places}
