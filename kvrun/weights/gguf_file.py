"""The header of a GGUF file: metadata and tensor directory.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
The gguf package's own reader maps the file and makes several arrays per string: seconds for a vocabulary, and a bus
error if the file shrinks. This one reads with pread, checks every length against the file, and decodes an array only
when somebody looks at it.
"""

from __future__ import annotations

import os
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kvrun.errors import ModelError, show
from kvrun.weights.blob import open_file, read_into, refuse_lfs_pointer

_MAX_HEADER = 256 << 20   # the largest known vocabularies need about 20 MiB
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_ITEMS = 1 << 22      # of an array: the largest known one, the merges of Gemma 3, has 514,906
_MAX_NAME = 1 << 16
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# value type -> struct code; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# ggml type -> (name, elements of a block, bytes of a block): those handed out as they lie
_NATIVE = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 30: ("bf16", 1, 2),
    2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 8: ("q8_0", 32, 34), 12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210),
}


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the directory. shape: row-major, outermost first. type: ggml type number.

    dtype: its name in lower case. block, block_bytes: elements and bytes of one block. offset: of its data, from the
    start of the file.
    """

    name: str
    type: int
    dtype: str
    shape: tuple[int, ...]
    block: int
    block_bytes: int
    offset: int

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) // self.block * self.block_bytes


class GgufArray(Sequence):
    """An array of the metadata, decoded on the first look and kept."""

    def __init__(self, file: GgufFile, key: str, kind: int, count: int, start: int):
        self._file, self._key, self._kind, self._count, self._start = file, key, kind, count, start
        self._items: list | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if self._items is None:
            self._items = self._file._decode_array(self._key, self._kind, self._count, self._start)
        return self._items[index]

    def __iter__(self):
        return iter(self[:])

    def __repr__(self) -> str:
        return f"GgufArray({self._key!r}, {self._count})"


class GgufFile:
    """An opened GGUF file.

    metadata: key -> int, float, bool, str or GgufArray. tensors: name -> GgufTensor, in file order.
    Raises ModelError for anything that is not a whole, well-formed file, naming it; `repair` ends the message.
    The descriptor stays open until `close` or until the object goes.
    """

    def __init__(self, path: Path, repair: str = "fetch it again"):
        self.path, self.repair = Path(path), repair
        self.fd = open_file(self.path)
        self._closer = weakref.finalize(self, os.close, self.fd)
        self.size = os.fstat(self.fd).st_size
        self._buf = bytearray()
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the descriptor; metadata stays readable."""
        self._closer()

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}; {self.repair}")

    # -- reading forward --------------------------------------------------------------------------------------------

    def _need(self, end: int) -> None:
        """Has bytes [0, end) of the file in the buffer."""
        have = len(self._buf)
        if end <= have:
            return
        if end > self.size:
            raise self.fail(f"cut short or damaged: the header runs past the file's {self.size} bytes")
        if end > _MAX_HEADER:
            raise self.fail(f"damaged: a header of more than {_MAX_HEADER >> 20} MiB")
        want = min(max(end, 2 * have, 1 << 20), self.size, _MAX_HEADER)
        self._buf.extend(bytes(want - have))
        read_into(self.fd, memoryview(self._buf)[have:], have, self.path, self.repair)

    def _u32(self) -> int:
        self._need(self._pos + 4)
        (value,) = _U32.unpack_from(self._buf, self._pos)
        self._pos += 4
        return value

    def _u64(self) -> int:
        self._need(self._pos + 8)
        (value,) = _U64.unpack_from(self._buf, self._pos)
        self._pos += 8
        return value

    def _string(self, what: str, limit: int = _MAX_HEADER) -> str:
        n = self._u64()
        if n > limit:
            raise self.fail(f"damaged: {what} of {n} bytes")
        self._need(self._pos + n)
        raw = bytes(self._buf[self._pos:self._pos + n])
        self._pos += n
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail(f"damaged: {what} is not UTF-8") from None

    def _skip_strings(self, count: int) -> None:
        """Steps over `count` strings. A tight loop: a vocabulary has up to half a million of them."""
        if count * 8 > self.size - self._pos:
            raise self.fail(f"damaged: an array of {count} strings does not fit the file")
        buf, pos, unpack = self._buf, self._pos, _U64.unpack_from
        left = count
        while left:
            try:
                for left in range(left, 0, -1):
                    pos += 8 + unpack(buf, pos)[0]
                left = 0
            except (struct.error, OverflowError):
                self._need(pos + 8)
        self._need(pos)
        self._pos = pos

    def _value(self, key: str):
        kind = self._u32()
        if code := _SCALARS.get(kind):
            n = struct.calcsize("<" + code)
            self._need(self._pos + n)
            (value,) = struct.unpack_from("<" + code, self._buf, self._pos)
            self._pos += n
            return value
        if kind == _STRING:
            return self._string(f"the value of {show(key)}")
        if kind != _ARRAY:
            raise self.fail(f"damaged: {show(key)} has unknown value type {kind}")
        kind, count = self._u32(), self._u64()
        if count > _MAX_ITEMS:
            raise self.fail(f"damaged: {show(key)} is an array of {count} items")
        array = GgufArray(self, key, kind, count, self._pos)
        if kind == _STRING:
            self._skip_strings(count)
        elif kind in _SCALARS:
            end = self._pos + count * struct.calcsize("<" + _SCALARS[kind])
            self._need(end)
            self._pos = end
        else:
            raise self.fail(f"damaged: {show(key)} is an array of value type {kind}")
        return array

    def _decode_array(self, key: str, kind: int, count: int, pos: int) -> list:
        if kind != _STRING:
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._buf, pos))
        buf, unpack, out = self._buf, _U64.unpack_from, []
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + unpack(buf, pos)[0]
                out.append(buf[start:pos].decode())
        except UnicodeDecodeError:
            raise self.fail(f"damaged: item {len(out)} of {show(key)} is not UTF-8") from None
        return out

    # -- the header -------------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        self._pos = 4
        self._need(min(self.size, 64))
        magic = bytes(self._buf[:4])
        refuse_lfs_pointer(self._buf[:64], self.path, self.repair)
        if magic != b"GGUF":
            raise self.fail("not a GGUF file")
        version = self._u32()
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian GGUF" if swapped in (1, 2, 3) else f"GGUF version {version}"
            raise ModelError(f"{self.path}: {kind} is not supported, only little-endian versions 2 and 3")
        n_tensors, n_keys = self._u64(), self._u64()
        if n_keys > _MAX_KEYS or n_tensors > _MAX_TENSORS:
            raise self.fail(f"damaged: it claims {n_keys} metadata keys and {n_tensors} tensors")
        metadata: dict = {}
        for _ in range(n_keys):
            key = self._string("a metadata key", _MAX_NAME)
            if key in metadata:
                raise self.fail(f"damaged: metadata key {show(key)} twice")
            metadata[key] = self._value(key)
        self.metadata: Mapping = metadata
        if isinstance(n := metadata.get("split.count"), int) and n > 1:
            raise ModelError(f"{self.path}: one of {n} parts; join them with 'llama-gguf-split --merge' first")
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align <= 0 or align % 8:
            raise self.fail(f"damaged: general.alignment is {show(align)}")
        entries = [self._entry() for _ in range(n_tensors)]
        start = -(-self._pos // align) * align
        self.tensors: dict[str, GgufTensor] = {}
        for name, kind, shape, at in entries:
            if name in self.tensors:
                raise self.fail(f"damaged: tensor {show(name)} twice")
            if at % align:
                raise self.fail(f"damaged: tensor {show(name)} is not aligned to {align} bytes")
            dtype, block, block_bytes = self._type(name, kind)
            if shape[-1] % block:
                raise self.fail(f"damaged: rows of {show(name)} have {shape[-1]} elements, no multiple of {block} ({dtype})")
            self.tensors[name] = GgufTensor(name, kind, dtype, shape, block, block_bytes, start + at)
        end = start
        for t in sorted(self.tensors.values(), key=lambda t: t.offset):
            if t.offset < end:
                raise self.fail(f"damaged: tensor {show(t.name)} overlaps the one before it")
            end = t.offset + t.n_bytes
            if end > self.size:
                raise self.fail(f"cut short: tensor {show(t.name)} ends at byte {end} of {self.size}")
        del self._buf[self._pos:]

    def _entry(self) -> tuple[str, int, tuple[int, ...], int]:
        """(name, ggml type, shape, offset from the start of the data) of the next tensor."""
        name = self._string("a tensor name", _MAX_NAME)
        n_dims = self._u32()
        if not 1 <= n_dims <= 4:
            raise self.fail(f"damaged: tensor {show(name)} has {n_dims} dimensions")
        shape = tuple(reversed([self._u64() for _ in range(n_dims)]))
        if not all(shape) or prod(shape) > 1 << 60:
            raise self.fail(f"damaged: tensor {show(name)} has shape {list(shape)}")
        return name, self._u32(), shape, self._u64()

    def _type(self, name: str, kind: int) -> tuple[str, int, int]:
        if kind in _NATIVE:
            return _NATIVE[kind]
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        try:
            known = GGMLQuantizationType(kind)
            return (known.name.lower(), *GGML_QUANT_SIZES[known])
        except (ValueError, KeyError):
            raise ModelError(f"{self.path}: tensor {show(name)} has unknown quantization {kind}; "
                             "update gguf (pip install -U gguf) or fetch another quantization") from None
