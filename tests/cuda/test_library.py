"""The CUDA library on a machine as it is: it loads without a driver, and what is missing is said in one line."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from kvrun.backends import cuda
from kvrun.backends.cuda import LIBRARY, CudaDevice, probe, require, why_not
from kvrun.errors import KvrunError, UsageError
from kvrun.runtime import choose_device

from .device_memory import Device
from .emulator import KERNELS


@pytest.fixture
def built():
    if not LIBRARY.exists():
        pytest.skip(f"not built: {probe().reason}")
    return probe()


def test_loads_without_a_driver(built):
    """In a process of its own, with no torch and none of the driver's or the runtime's libraries as a requirement."""
    code = ("import sys\n"
            "from kvrun.backends.cuda import probe\n"
            "assert probe().loads, probe().reason\n"
            "assert 'torch' not in sys.modules\n"
            "assert 'libcudart' not in open('/proc/self/maps').read()\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_says_what_it_was_built_for(built, capfd):
    """Also to `kvrun doctor`."""
    from kvrun.cli.main import main

    assert built.targets and all(part.removeprefix("PTX ").isdigit() for part in built.targets.split(", "))
    assert main(["doctor"]) == 0
    assert f"for compute {built.targets}" in capfd.readouterr().out


def test_says_why_there_is_no_device(built):
    assert bool(built.devices) != bool(built.reason)
    if not built.devices:
        assert "\n" not in built.reason and "CUDA" in built.reason
    for device in built.devices:
        assert device.name and 0 < device.free_bytes <= device.memory_bytes and device.sms > 0


def test_a_launch_without_a_device_is_an_error_and_no_crash(built):
    if built.devices:
        pytest.skip("there is a device")
    device = Device(LIBRARY, gpu=False)
    x = device.put(np.zeros(32, np.float32))
    state = device.state(positions=[0], out_rows=[0])
    op = ("gather", {"x": x, "out": x, "dim": 32})
    assert device.step([op], state, max_rows=1, max_out=1) == device.lib.KV_DEVICE
    assert device.error().startswith("op 0 (gather): ")


def test_missing_and_broken_libraries_are_told(tmp_path, cxx):
    missing = probe(tmp_path / "absent.so")
    assert not missing.built and not missing.loads and "not built" in missing.reason
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF" + bytes(100))
    assert probe(broken).built and not probe(broken).loads and str(broken) in probe(broken).reason
    (tmp_path / "other.cpp").write_text('extern "C" int kv_abi() { return 999; }', encoding="utf-8")
    subprocess.run([cxx, "-shared", "-fPIC", str(tmp_path / "other.cpp"), "-o", str(tmp_path / "other.so")], check=True)
    other = probe(tmp_path / "other.so")
    assert not other.loads and "interface 999" in other.reason


# A library that says what one with a driver would: of two devices another process has the first to itself.
TWO_DEVICES = r"""
#include "kvrun.h"
#include <cstring>
static const char *said = "";
extern "C" {
int32_t kv_abi(void) { return KV_ABI; }
const char *kv_cuda_targets(void) { return "90"; }
const char *kv_cuda_error(void) { return said; }
int32_t kv_cuda_driver(void) { return 13000; }
int32_t kv_cuda_count(void) { said = "SAID"; return COUNT; }
int32_t kv_cuda_describe(int32_t device, kv_cuda_device *out) {
    said = device ? "" : "device 0: busy";
    strcpy(out->name, "Fancy 9000");
    out->arch = 90, out->built = 1, out->free_bytes = 7;
    return device ? KV_OK : KV_DEVICE;
}
}
"""


@pytest.fixture(params=[(2, "", "device 0: busy"), (0, "too old", "too old (the driver speaks CUDA 13.0)"),
                        (0, *2 * ("no CUDA-capable device is detected",))], ids=["busy", "too old", "none"])
def refusing(request, tmp_path, cxx):
    """A probe() of it, or of one whose driver shows no device; and its reason."""
    count, said, reason = request.param
    source, library = tmp_path / "refusing.cpp", tmp_path / "refusing.so"
    source.write_text(TWO_DEVICES.replace("COUNT", str(count)).replace("SAID", said), encoding="utf-8")
    subprocess.run([cxx, "-shared", "-fPIC", f"-I{KERNELS}", str(source), "-o", str(library)], check=True)
    return lambda every=False: probe(library, every=every), reason


def test_the_first_device_is_used_or_none(refusing, monkeypatch):
    """Another one never takes its place. That it cannot be used is said, also where nobody asked for it; that there is none is not."""
    ask, reason = refusing
    status, every = ask(), ask(every=True)
    assert status.reason == every.reason == why_not(status) == why_not(every) == reason
    assert status.devices == () and status.driver == "13.0" and [device.index for device in every.devices] == ([1] if "busy" in reason else [])
    monkeypatch.setattr(cuda, "probe", lambda: status)
    for refused in (require, cuda.free_memory):
        with pytest.raises(UsageError, match=re.escape(reason)) as refusal:
            refused()
        assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)
    told = []
    assert choose_device("auto", told.append) == "cpu"
    assert told == ([] if "detected" in reason else [f"the GPU is not used: {reason}"])


def test_without_a_device_it_is_refused_with_exit_code_2():
    if not why_not(probe()):
        pytest.skip("there is a device")
    with pytest.raises(UsageError, match="^--device cuda: ") as refusal:
        require()
    assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)


def test_each_reason_is_told(built):
    """A device without code in this build; a torch that cannot use it."""
    old = CudaDevice("Fancy 100", "7.5", 40, False, 2**34, 2**33)
    assert why_not(replace(built, devices=(old,), reason="")) == "Fancy 100 is compute 7.5, and the kernels need 8.0 or newer"
    device = CudaDevice("Fancy 9000", "12.7", 100, False, 2**34, 2**33)
    assert "no kernels for Fancy 9000 (compute 12.7)" in why_not(replace(built, devices=(device,), reason=""))
    torch = pytest.importorskip("torch")
    if not torch.backends.cuda.is_built():
        reason = why_not(replace(built, devices=(replace(device, built=True),), reason=""))
        assert "built without CUDA" in reason and torch.__version__ in reason


def test_auto_takes_a_device_that_works_and_says_so(monkeypatch, built):
    status = replace(built, driver="13.0", devices=(CudaDevice("Fancy 9000", "9.0", 100, True, 2**34, 2**33),), reason="")
    monkeypatch.setattr(cuda, "probe", lambda: status)
    told = []
    for reason, device in (("", "cuda"), ("it is on fire", "cpu")):
        monkeypatch.setattr(cuda, "why_not", lambda status, reason=reason: reason)
        assert choose_device("auto", told.append) == device
    assert told == ["using the GPU, Fancy 9000", "the GPU is not used: it is on fire"]


def test_a_command_on_cuda_ends_with_2_and_one_line(request, capfd):
    if not why_not(probe()):
        pytest.skip("there is a device")
    from kvrun.cli.main import main

    smollm2 = request.getfixturevalue("smollm2")                  # fetched only now: a machine with a device may be offline

    assert main(["run", str(smollm2.path), "Hello", "--device", "cuda"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "--device cuda: " in err


def test_what_torch_says_of_a_gpu_is_one_line():
    """Here of one that is not there."""
    if probe().devices:
        pytest.skip("there is a device")
    pytest.importorskip("torch")
    from kvrun.backends.cuda_torch import TorchDevice

    device = TorchDevice.__new__(TorchDevice)
    device._stream = None
    with pytest.raises(KvrunError, match="^the GPU failed: ") as refusal:
        device.mark()
    assert refusal.value.exit_code == 1 and "\n" not in str(refusal.value) and refusal.value.__cause__


@pytest.mark.parametrize("kind,said,code", [
    ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.", 6),
    ("AcceleratorError", "CUDA error: out of memory\nSearch for more.", 6),
    ("RuntimeError", "CUDA error: an illegal memory access was encountered\nSearch for more.", 1)])
def test_what_torch_raises_gets_its_exit_code(kind, said, code):
    """As torch words it, whichever part of it found no memory."""
    torch = pytest.importorskip("torch")
    from kvrun.backends.cuda_torch import _in_one_line

    kind = getattr(torch, kind, RuntimeError)

    @_in_one_line
    def fails():
        raise kind(said)

    with pytest.raises(KvrunError) as refusal:
        fails()
    assert refusal.value.exit_code == code and "\n" not in str(refusal.value)


@pytest.mark.parametrize("said,code", [("op 3 (linear): out of memory", 6), ("op 3 (linear): invalid argument", 1)])
def test_what_a_launch_says_gets_its_exit_code(said, code):
    from types import SimpleNamespace

    from kvrun.backends._abi import ffi
    from kvrun.backends.cuda_device import check

    text = ffi.new("char[]", said.encode())
    with pytest.raises(KvrunError, match=re.escape(said)) as refusal:
        check(SimpleNamespace(kv_cuda_error=lambda: text), 4)
    assert refusal.value.exit_code == code
