"""Checks a model's files: checksums, structure, and that every weight is a number."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kvrun.errors import ModelError
from kvrun.hub.files import ModelFiles, Progress
from kvrun.hub.store import writing

_CHUNK = 1 << 20
_ROWS = 1 << 24  # bytes of a tensor looked at together


@dataclass(frozen=True)
class Checked:
    """One file. checksum: "ok", or "none" where nothing says what it should be."""

    file: str
    n_bytes: int
    checksum: str


def checksum_ok(path: Path, expected: str, progress: Progress | None = None) -> bool:
    """Whether a file has the checksum that the Hub names its blob by: 64 digits are the sha256 of the bytes, 40 are
    git's blob id."""
    with writing(path), path.open("rb") as f:
        size, done = os.fstat(f.fileno()).st_size, 0
        digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % size)
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress and size > _CHUNK << 4 and (done % (_CHUNK << 4) == 0 or done == size):
                progress(f"checking {path.name}", done, size)
    return digest.hexdigest() == expected


def verify(files: ModelFiles, sha256: str | None = None, progress: Progress | None = None) -> list[Checked]:
    """Every file of the model, checked. sha256: what a packaged file must have; files of the shared Hub cache are named
    by theirs. ModelError naming the first file with a wrong checksum, or the first tensor with NaN or Inf."""
    out = []
    for path in sorted(p for p in (files.path.rglob("*") if files.kind == "folder" else [files.path]) if p.is_file()):
        expected = sha256 or _blob_name(path)
        if expected and not checksum_ok(path, expected, progress):
            raise ModelError(f"{path}: damaged: its checksum is wrong; {files.repair}")
        out.append(Checked(path.name if files.kind == "gguf" else path.relative_to(files.path).as_posix(),
                           path.stat().st_size, "ok" if expected else "none"))
    _scan(files, progress)
    return out


def expected_sha256(files: ModelFiles) -> str | None:
    """What models.toml pins for a packaged file; None for any other."""
    if files.source != "package":
        return None
    from kvrun.hub.catalog import load_catalog

    return load_catalog().aliases[files.name].package.sha256


def _blob_name(path: Path) -> str | None:
    """The checksum in the name of the blob that a file of the Hub cache links to."""
    if not path.is_symlink():
        return None
    name = Path(os.readlink(path)).name
    return name if re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", name) else None


def _scan(files: ModelFiles, progress: Progress | None) -> None:
    """ModelError naming the first tensor that holds NaN or Inf; reading also checks that every byte is there."""
    from kvrun.weights import open_source

    source = open_source(files)
    try:
        done, total = 0, sum(prod(source.info(name)[1]) for name in source.names()) * 2
        for name in source.names():
            for rows in _slices(source, name):
                if not _finite(rows.dtype, rows.data):
                    raise ModelError(f"{files.path}: tensor {name!r} holds NaN or Inf; {files.repair}")
                done += prod(rows.shape) * 2
                if progress:
                    progress("scanning weights", done, total)
    finally:
        source.close()


def _slices(source, name: str) -> Iterator:
    _, shape = source.info(name)
    if len(shape) < 2:
        yield source.read(name)
        return
    step = max(_ROWS // (4 * prod(shape[1:])), 1)
    for start in range(0, shape[0], step):
        yield source.read(name, start, min(start + step, shape[0]))


# kind -> (bytes of a block, where in it its 16-bit scales begin and end): integers cannot be NaN, scales can
_SCALES = {"q4_0": (18, 0, 2), "q4_1": (20, 0, 4), "q5_0": (22, 0, 2), "q8_0": (34, 0, 2), "q4_k": (144, 0, 4), "q5_k": (176, 0, 4),
           "q6_k": (210, 208, 210)}


def _finite(dtype: str, data) -> bool:
    """Whether no value of a tensor's bytes is NaN or Inf: an all-ones exponent in its floats or block scales."""
    import numpy as np

    raw = np.frombuffer(data, np.uint8)
    if dtype in _SCALES:
        block, begin, end = _SCALES[dtype]
        raw = np.ascontiguousarray(raw.reshape(-1, block)[:, begin:end]).reshape(-1)
        dtype = "f16"
    kind, exponent = {"f32": (np.uint32, 0x7F800000), "f16": (np.uint16, 0x7C00), "bf16": (np.uint16, 0x7F80)}[dtype]
    bits = raw.view(kind)
    return not bool(((bits & kind(exponent)) == kind(exponent)).any())
