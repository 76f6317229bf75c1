"""Threads: opened, closed, quiet about signals, harmless after fork, and polite about the floating-point mode."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from kvrun.backends.native import ISAS, ffi, lib

from .plans import Machine, floats, pointer, poisoned


def tasks() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def left(before: set[str]) -> set[str]:
    """Threads that are there and were not before. One that was joined may be listed for a moment yet."""
    end = time.monotonic() + 10
    while tasks() - before and time.monotonic() < end:
        time.sleep(0.001)
    return tasks() - before


def norm_step(machine, rng):
    x, out = floats(rng, 100, 512), poisoned(100, 512)
    machine.run([("norm", {"x": pointer(x), "w": pointer(x), "out": pointer(out), "dim": 512, "eps": 1e-5})], pos=range(100))
    assert np.isfinite(out).all()


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")


@needs_proc
def test_open_and_close_leave_no_thread(rng):
    before = tasks()
    for i in range(100):
        threads = 1 + i % 5
        with Machine("plain", threads) as machine:
            assert len(tasks() - before) == threads - 1
            if i % 3:
                norm_step(machine, rng)
        assert left(before) == set()


@needs_proc
def test_workers_take_no_signals(rng):
    before = tasks()
    with Machine("plain", 4) as machine:
        norm_step(machine, rng)
        for task in tasks() - before:
            with open(f"/proc/self/task/{task}/status", encoding="ascii") as file:
                blocked = int(dict(line.split(":", 1) for line in file)["SigBlk"], 16)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGCHLD):
                assert blocked >> (number - 1) & 1
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_many_steps_in_a_row(rng):
    """More threads than cores, so that threads sleep in barriers."""
    with Machine("plain", 9) as machine:
        for _ in range(300):
            norm_step(machine, rng)


def test_what_cannot_be_opened():
    assert not lib.kv_cpu_open(lib.kv_cpu_isa() + 1, 1)
    assert not lib.kv_cpu_open(-1, 1)
    assert not lib.kv_cpu_open(0, 0)
    assert not lib.kv_cpu_open(0, 100000)
    lib.kv_cpu_close(ffi.NULL)
    assert 0 <= lib.kv_cpu_isa() < lib.KV_ISA_COUNT and lib.kv_abi() == lib.KV_ABI


def test_the_callers_denormals_survive(machine, rng):
    tiny = np.full(32, 1e-40, np.float32)
    norm_step(machine, rng)
    assert (tiny * np.float32(0.5) > 0).all()


def test_denormals_are_zero_in_every_thread(machine):
    """silu(x)*up with a denormal product, over more parts than threads."""
    x = np.full((64, 2 * 4096), 1e-25, np.float32)
    out = poisoned(64, 4096)
    machine.run([("act", {"x": pointer(x), "out": pointer(out), "dim": 4096, "kind": lib.KV_SILU})], pos=range(64))
    assert (out == 0).all()


CHILD = """
    import os, sys
    import numpy as np
    from kvrun.backends.native import ffi, lib
    cpu = lib.kv_cpu_open(lib.kv_cpu_isa(), 3)
    x = np.ones((64, 256), np.float32)
    at = lambda a, kind="float *": ffi.cast(kind, a.ctypes.data)
    zeros = np.zeros(64, np.int32)
    room = np.zeros(4096, np.uint8)
    plan = ffi.new("kv_op[]", 1)
    plan[0].kind, plan[0].norm = lib.KV_OP_NORM, {"x": at(x), "w": at(x), "out": at(x), "dim": 256, "eps": 1e-5}
    index = at(zeros, "int32_t *")
    state = ffi.new("kv_state *", {"n_rows": 64, "n_seqs": 1, "token": index, "pos": index, "seq": index})
    step = lambda: lib.kv_cpu_step(cpu, plan, 1, state, at(room[-room.ctypes.data % 64 :], "void *"))
    assert step() == lib.KV_OK
    child = os.fork()
    if child == 0:
        assert step() == lib.KV_BAD_PLAN
        lib.kv_cpu_close(cpu)
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert step() == lib.KV_OK
    {end}
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("end", ["lib.kv_cpu_close(cpu)", "pass"], ids=["closed", "left open"])
def test_fork_and_exit(end):
    code = textwrap.dedent(CHILD).replace("{end}", end)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_read_bandwidth_is_a_rate():
    data = np.ones(8 << 20, np.uint8)
    for threads in (1, 2):
        assert 1e8 < lib.kv_cpu_read_bandwidth(pointer(data, "void *"), data.nbytes, threads, 3) < 1e13
    assert lib.kv_cpu_read_bandwidth(ffi.NULL, 1 << 20, 1, 1) == 0


def test_granted_isas_are_ordered():
    assert list(ISAS.values()) == sorted(ISAS.values())
