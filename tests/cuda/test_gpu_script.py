"""tests/gpu/run, which is for whoever has a GPU, walked through on the emulator: every step, in small."""

import json
import os
import subprocess
import sys

import pytest

from .emulator import KERNELS

SCRIPT = KERNELS.parent / "tests/gpu/run"


@pytest.fixture(scope="module")
def walked(simt_library, tmp_path_factory):
    """(what it said, the folder of its report)."""
    report = tmp_path_factory.mktemp("report")
    env = os.environ | {"KVRUN_SIMT_LIBRARY": str(simt_library), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "LLAMA_BENCH": "false", "LLAMA_MODEL": "none"}
    return subprocess.run([SCRIPT, "--device", "simt", report], capture_output=True, text=True, env=env), report


def test_every_step_runs(walked):
    """And the last table is of all of them."""
    done, report = walked
    assert done.returncode == 0, done.stdout + done.stderr
    steps = (report / "steps.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split("  ")[0] for line in steps] == ["packages", "build", "doctor", "short decode", "tests", "measurements"]
    assert all(" ok " in line or " left out: " in line for line in steps)
    assert "passed" in done.stdout and done.stdout.splitlines()[-1].endswith(f"report in {report}")


def test_what_was_measured_is_in_the_table_and_in_the_file(walked):
    done, report = walked
    found = json.loads((report / "measured.json").read_text(encoding="utf-8"))
    assert {(r["shape"], r["weights"], r["kv"], r["depth"]) for r in found["rows"]} == {
        ("tiny", "bf16", kv, depth) for kv in ("f16", "q8", "q4") for depth in (0, 256)} | {("tiny", "q4", "q8", 0), ("tiny", "q8", "f16", 0), ("tiny", "q4s", "f16", 0)}
    for row in found["rows"]:
        assert row["ms_per_token"] > 0 and 0 < row["share_of_copy"] < 1 and f"{row['ms_per_token']:.3f}" in done.stdout
    numbers = [value for what, value in found["peers"].items() if "ms" in what or "tokens/s" in what]
    assert len(numbers) == 4 and all(isinstance(n, float) and n > 0 for n in numbers[:3])
    assert found["peers"]["llama.cpp"].startswith("failed: RuntimeError: llama-bench ended with 1")      # and took nothing from the rest
    assert found["left_out"] == [] and {t["verdict"] for t in found["targets"]} == {"not measured"}
    assert "the emulator" in found["device"] and "build" in "".join(found["steps"])


def test_measuring_goes_on_in_a_new_process(walked, simt_library, tmp_path):
    """As after a case that broke the device's context: what is measured is kept, and the cases after it follow."""
    file = tmp_path / "measured.json"
    file.write_text((walked[1] / "measured.json").read_text(encoding="utf-8"), encoding="utf-8")
    before = json.loads(file.read_text(encoding="utf-8"))
    path = os.pathsep.join(filter(None, (str(SCRIPT.parent), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"KVRUN_SIMT_LIBRARY": str(simt_library), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, SCRIPT.parent / "measure.py", "--device", "simt", "--json", file, "--after", "3"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    after = json.loads(file.read_text(encoding="utf-8"))
    assert after["rows"][:-1] == before["rows"] and after["rows"][-1]["weights"] == "q4s"
    assert [after[what] for what in ("copy_bytes_per_second", "steps")] == [before[what] for what in ("copy_bytes_per_second", "steps")]


def test_a_test_that_breaks_the_device_is_named(tmp_path):
    """By the plugin of the script, which ends its worker; the tests after it have another."""
    pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text("import os, pytest, torch\n"
                                         "def synchronize():\n    if os.environ.get('BROKEN'): raise RuntimeError('CUDA error')\n"
                                         "torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize\n"
                                         "@pytest.mark.parametrize('n', range(6))\n"
                                         "def test_one(n):\n    assert 'BROKEN' not in os.environ\n"
                                         "    if n == 2: os.environ['BROKEN'] = '1'\n", encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "broken", "-n", "1", tmp_path], capture_output=True, text=True, env=env,
                          cwd=tmp_path)
    assert "crashed while running" in done.stdout and "1 failed, 6 passed" in done.stdout, done.stdout


def test_a_missing_program_is_one_line(tmp_path):
    """Nothing is built, and the table says what is missing."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    done = subprocess.run([SCRIPT, "--device", "simt", tmp_path / "report"], capture_output=True, text=True, env=os.environ | {"PYTHON": str(bare)})
    assert done.returncode == 1 and "missing: torch, cffi, numpy" in done.stdout and "packages                     FAILED" in done.stdout


def test_targets_are_compared_with_what_was_measured():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from targets import verdicts
    finally:
        sys.path.pop(0)

    times = {"f16": (2.0, 4.0), "q8": (2.0, 3.0), "q4": (2.0, 3.0)}
    rows = [{"shape": "llama-8b", "weights": "q4", "kv": kv, "depth": depth, "ms_per_token": ms, "share_of_copy": 0.5, "prefill_tokens_per_second": None}
            for kv, both in times.items() for depth, ms in zip((2048, 32768), both, strict=True)]
    rows.append({"shape": "llama-8b", "weights": "bf16", "kv": "f16", "depth": 0, "ms_per_token": 6.0, "share_of_copy": 0.95, "prefill_tokens_per_second": 700.0})
    found = verdicts({"rows": rows, "peers": {"bare products, prefill tokens/s, llama-8b": 1000.0}})
    assert [t["verdict"] for t in found] == ["met", "not measured", "not measured", "met", "missed", "met", "missed", "met"]


TEXT = ("ptxas info    : Compiling entry function '_ZN2kv4normEi' for 'sm_90'\n"
        "ptxas info    : Function properties for _ZN2kv4normEi\n"
        "    {0} bytes stack frame, {0} bytes spill stores, {0} bytes spill loads\n"
        "ptxas info    : Used 24 registers, used 1 barriers, 128 bytes smem\n")


def test_the_register_report_finds_a_spill(tmp_path):
    """As nvcc says it and the build keeps it."""
    def report():
        return subprocess.run([sys.executable, SCRIPT.parent / "registers.py", tmp_path], capture_output=True, text=True)

    assert report().returncode == 1 and "no register report" in report().stderr
    for spilled, said, code in ((0, "no spills", 0), (8, "sm_90 spills 16 bytes", 1)):
        said_of_one = f"sys.stderr.write({TEXT.format(spilled)!r}); print('a warning')"
        kept = subprocess.run([sys.executable, KERNELS / "cuda/record.py", sys.executable, "-c", f"import sys; {said_of_one}", "-o", tmp_path / "norm.o"],
                              capture_output=True, text=True)
        assert kept.returncode == 0 and kept.stderr == "a warning\n"
        done = report()
        assert done.returncode == code and "norm" in done.stdout and " 24 registers     128 bytes shared" in done.stdout and said in done.stdout


def test_no_kernel_spills_registers():
    """In the build that the installed kvrun comes from, on any architecture; none takes more registers than a block can have."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from registers import PER_MULTIPROCESSOR, of_build
    finally:
        sys.path.pop(0)

    kernels = of_build(SCRIPT.parents[2] / "build")
    if not kernels:
        pytest.skip("no build of the CUDA half beside the tests")
    assert {k.arch for k in kernels} >= {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120"}
    assert [k for k in kernels if k.spilled] == []
    threads = {"linear": 512, "gated": 512, "qkv": 512, "attend": 128}
    for kernel in kernels:
        of_block = next((n for name, n in threads.items() if f"{len(name)}{name}" in kernel.name), 256)
        assert kernel.registers * of_block <= PER_MULTIPROCESSOR, kernel
