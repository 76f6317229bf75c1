"""Tensors of a folder with safetensors files, one or several with an index.

Format: https://github.com/huggingface/safetensors#format. The safetensors library validates the header (size, holes,
overlaps, end of file); the data is then read with pread at the header's offsets. The file itself is never mapped.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kvrun.errors import ModelError, show
from kvrun.hub.folder import read_index
from kvrun.weights.blob import fingerprint, open_file, read_bytes, read_into, refuse_lfs_pointer
from kvrun.weights.source import RawTensor

_DTYPES = {"F32": ("f32", 4), "F16": ("f16", 2), "BF16": ("bf16", 2)}
_MAX_HEADER = 32 << 20  # the library allows 100 MB; at 120 bytes a tensor this is room for 280,000 of them
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Entry:
    """A tensor of one file. offset: of its data, from the start of the file."""

    fd: int
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class FolderSource:
    """TensorSource over model.safetensors, over the shards of model.safetensors.index.json, or over the one
    *.safetensors in `folder`. `repair` ends the message of a damaged file."""

    def __init__(self, folder: Path, repair: str = "fetch it again"):
        self.folder, self.repair = Path(folder), repair
        self._fds: list[int] = []
        self._tensors: dict[str, _Entry] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        entry = self._entry(name)
        return _DTYPES[entry.dtype][0], entry.shape

    def stored(self, name: str) -> str:
        """The kind that the file itself holds: "BF16", ..."""
        return self._entry(name).dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor:
        import numpy as np

        entry = self._entry(name)
        dtype, width = _DTYPES[entry.dtype]
        shape = entry.shape
        if shape:
            stop = shape[0] if stop is None else stop
            if not 0 <= start < stop <= shape[0]:
                raise ModelError(f"{entry.path}: rows {start} to {stop} of {show(name)}, which has {shape[0]}")
            shape = (stop - start, *shape[1:])
        row = prod(shape[1:]) * width
        data = np.empty(prod(shape) * width, np.uint8)
        read_into(entry.fd, data, entry.offset + start * row, entry.path, self.repair)
        return RawTensor(name, dtype, shape, data)

    @property
    def path(self) -> Path:
        return self.folder

    def fingerprint(self) -> tuple:
        shards = sorted({(entry.path.name, entry.fd) for entry in self._tensors.values()})
        return tuple((name, *fingerprint(fd, self.folder / name)) for name, fd in shards)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        self._tensors = {}

    def _entry(self, name: str) -> _Entry:
        try:
            entry = self._tensors[name]
        except KeyError:
            raise ModelError(f"{self.folder}: tensor {show(name)} is missing; {self.repair}") from None
        if entry.dtype not in _DTYPES:
            raise ModelError(f"{entry.path}: tensor {show(name)} is {entry.dtype}; only {', '.join(_DTYPES)} are supported")
        return entry

    def _open(self) -> None:
        index = None if (self.folder / "model.safetensors").exists() else self._index()
        if index is None:
            for name, entry in self._header(self._single()).items():
                self._tensors[name] = entry
            return
        headers = {shard: self._header(self.folder / shard) for shard in sorted(set(index.values()))}
        for name, shard in index.items():
            if name not in headers[shard]:
                raise ModelError(f"{self.folder / shard}: the index puts tensor {show(name)} there, but it is missing; "
                                 f"{self.repair}")
            self._tensors[name] = headers[shard][name]

    def _single(self) -> Path:
        files = sorted(self.folder.glob("*.safetensors"))
        if (one := self.folder / "model.safetensors") in files:
            return one
        if len(files) != 1:
            raise ModelError(f"{self.folder}: {len(files)} *.safetensors files and no {_INDEX}; {self.repair}")
        return files[0]

    def _index(self) -> dict[str, str] | None:
        """Tensor -> shard, every shard a file of this folder; None without an index."""
        path = self.folder / _INDEX
        if not path.exists():
            return None
        mapping = read_index(path, self.repair)
        for shard in dict.fromkeys(mapping.values()):
            if not (self.folder / shard).is_file():
                raise ModelError(f"{path}: shard {show(shard)} is missing; {self.repair}")
        return mapping

    def _header(self, path: Path) -> dict[str, _Entry]:
        """The tensors of one file, its header validated."""
        fd = open_file(path)
        self._fds.append(fd)
        size = os.fstat(fd).st_size
        head = read_bytes(fd, min(size, 64), 0, path, self.repair)
        refuse_lfs_pointer(head, path, self.repair)
        if size < 8:
            raise ModelError(f"{path}: cut short to {size} bytes; {self.repair}")
        (length,) = struct.unpack_from("<Q", head)
        if length > min(_MAX_HEADER, size - 8):
            raise ModelError(f"{path}: damaged or cut short: a header of {length} bytes in a file of {size}; {self.repair}")
        text = read_bytes(fd, 8 + length, 0, path, self.repair)
        self._validate(text, size, path)
        header = json.loads(text[8:])
        header.pop("__metadata__", None)
        return {name: _Entry(fd, path, t["dtype"], tuple(t["shape"]), 8 + length + t["data_offsets"][0])
                for name, t in header.items()}

    def _validate(self, text: bytes, size: int, path: Path) -> None:
        """ModelError unless `text`, the length and the header of a file of `size` bytes, is what the format allows."""
        from safetensors import SafetensorError, safe_open

        try:
            with _stand_in(text, size, path) as name, safe_open(name, framework="np"):
                pass
        except (SafetensorError, OSError, ValueError) as e:
            raise ModelError(f"{path}: damaged or cut short ({' '.join(str(e).split())}); {self.repair}") from None


@contextmanager
def _stand_in(text: bytes, size: int, path: Path) -> Iterator[str]:
    """The name of a file that begins with `text`, is `size` bytes long and that nobody else can change: the library maps what it opens,
    and a mapped file that somebody cuts short ends the process with SIGBUS. The rest of it is a hole and takes no memory."""
    if not hasattr(os, "memfd_create"):
        yield str(path)
        return
    fd = os.memfd_create("safetensors-header", os.MFD_CLOEXEC)
    try:
        try:
            os.ftruncate(fd, size)
        except OSError:  # under a limit on the size of files there is only the file itself
            yield str(path)
            return
        os.pwrite(fd, text, 0)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
