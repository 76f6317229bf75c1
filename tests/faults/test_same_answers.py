"""Rows 29 to 31: what must not change an answer, a machine without the kernels, a constraint that cannot be kept."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import kvrun
from kvrun.hub.catalog import shipped_file

from ..cli.conftest import KVRUN
from ..engine.tiny_model import random_model
from .conftest import check

KV = ["f16", "q4"]


def said(environment, *args, input=b"") -> dict:
    result = subprocess.run([*KVRUN, *map(str, args)], input=input, capture_output=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("kv", KV)
def test_row_29_the_same_tokens_cold_or_warm_and_with_any_threads(environment, tmp_path, kv):
    folder = random_model(tmp_path / "m", 8, window=200)
    (tmp_path / "book").write_text("once upon a time " * 60)
    mine = environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    args = ("run", folder, "-f", tmp_path / "book", "--max-tokens", "20", "--temp", "1", "--top-k", "50", "--seed", "4", "--json", "--kv", kv)
    first, second, other = (said(mine, *args, question) for question in ("who?", "who?", "where to?"))
    without = said(mine, *args, "where to?", "--no-prompt-cache", "--threads", "1")
    assert [run["usage"]["cached_tokens"] > 0 for run in (first, second, other, without)] == [False, True, True, False]
    assert second["tokens"] == first["tokens"] and other["tokens"] == without["tokens"]
    assert second["usage"]["prompt_tokens"] - 1024 < 128


@pytest.mark.parametrize("kv", KV)
def test_row_29_the_same_tokens_with_any_chunk_size(tmp_path, rng, kv):
    from kvrun.backends.batch import Sampler
    from kvrun.engine.events import Token
    from kvrun.hub import resolve
    from kvrun.runtime import open_engine

    files = resolve(str(random_model(tmp_path / "m", 8)))
    ids = [rng.randrange(256) for _ in range(700)]
    answers = []
    for chunk in (512, 128, rng.randrange(1, 300), 7):
        engine = open_engine(files, device="cpu", n_ctx=1024, kv=kv, threads=1, prefill_chunk=chunk)
        sampler = Sampler(seed=3, temperature=1.0, top_k=40)
        answers.append([event.id for event in engine.generate(ids, sampler=sampler, max_tokens=24) if isinstance(event, Token)])
        engine.close()
    assert answers == [answers[0]] * len(answers)


@pytest.fixture
def without_kernels(environment, tmp_path):
    """without_kernels(library) -> the environment of a kvrun whose native library is these bytes; None: there is none."""
    where = tmp_path / "installed"
    shutil.copytree(Path(kvrun.__file__).parent, where / "kvrun", ignore=shutil.ignore_patterns("__pycache__", "libkvrun_*"))
    shutil.copy(shipped_file(), where / "models.toml")

    def make(library: bytes | None) -> dict:
        path = where / "kvrun/backends/libkvrun_cpu.so"
        path.unlink(missing_ok=True)
        if library is not None:
            path.write_bytes(library)
        return environment | {"PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    return make


def other_machine() -> bytes:
    """This library with another processor's number in its ELF header (243 is RISC-V, 183 Arm)."""
    from kvrun.backends.native import LIBRARY

    data = bytearray(LIBRARY.read_bytes())
    data[18:20] = (243 if int.from_bytes(data[18:20], "little") != 243 else 183).to_bytes(2, "little")
    return bytes(data)


@pytest.mark.parametrize("library", [None, b"", b"not a library", other_machine], ids=["missing", "empty", "text", "other CPU"])
def test_row_30_without_the_native_library_the_reference_answers(without_kernels, scripted, library):
    mine = without_kernels(library() if callable(library) else library)
    result = subprocess.run([*KVRUN, "run", str(scripted), "x"], stdin=subprocess.DEVNULL, capture_output=True, env=mine, timeout=120)
    assert (result.returncode, result.stdout) == (0, "Größe,\nWelt\n".encode()), result.stderr
    line = result.stderr.decode()
    assert line.count("\n") == 1 and line.count("libkvrun_cpu.so") == 1 and "using the slow reference executor" in line
    assert "reinstall kvrun" in line
    named = subprocess.run([*KVRUN, "run", str(scripted), "x", "--device", "cpu"], stdin=subprocess.DEVNULL, capture_output=True, env=mine, timeout=120)
    check(named, 2, "libkvrun_cpu.so", "reinstall kvrun")


def test_row_30_doctor_says_that_it_is_missing(without_kernels):
    report = subprocess.run([*KVRUN, "doctor", "--json"], capture_output=True, env=without_kernels(None), timeout=120)
    assert report.returncode == 0 and "reinstall kvrun" in json.loads(report.stdout)["native kernels"]["problem"]


@pytest.mark.parametrize(("schema", "named"), [
    ("{", "not JSON"), ("[]", "a schema is an object"), ('{"type": "objekt"}', "objekt"), ('{"not": {"type": "string"}}', "not"),
    ('{"type": "array", "uniqueItems": true}', "uniqueItems"), ('{"$ref": "http://a.b/c"}', "c"),
])
def test_row_31_a_schema_with_an_unsupported_feature(kvrun, scripted, tmp_path, schema, named):
    (tmp_path / "s.json").write_text(schema)
    check(kvrun("run", scripted, "x", "--schema", tmp_path / "s.json"), 2, named)


def test_row_31_a_schema_that_is_not_there(kvrun, scripted, tmp_path):
    check(kvrun("run", scripted, "x", "--schema", tmp_path / "s.json"), 9, "s.json")
