"""Whether a session's document is one that could have been saved: every part of the type, the range and the size that the rest relies on.

Anybody may have changed the file. A name of a page must not lead out of the session's folder, a number must not make a list of a billion,
and what the document says of a sequence must agree with itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kvrun.errors import show

FORMAT = 1
MAX_BYTES = 256 << 20
_PAGE = 128
_MAX_TOKENS = 1 << 24              # read and said in one session
_MAX_IDS = 1 << 31
_MAX_READ = 1 << 27                # ids of all prompts of a session together, each the whole conversation before it
_MAX_GROUPS = 64
_FILE = re.compile(r"[0-9a-f]{40}\.safetensors")
_TEXTS = {"model": ("name", "call", "path", "kv", "weights"), "identity": ("weights", "tokenizer", "cache", "template", "ropes")}
_SAMPLER = {"temperature": (0.0, 100.0), "top_p": (0.0, 1.0), "top_k": (0, 1 << 30), "min_p": (0.0, 1.0), "repeat_penalty": (1e-6, 1e6),
            "seed": (0, 2**64 - 1)}


class Wrong(ValueError):
    """What is wrong with a document, as the end of a sentence."""


def check_document(value: Any) -> dict[str, Any]:
    """The document, which is then sound. Wrong."""
    document = _of(value, dict, "it")
    if document.get("format") != FORMAT:
        raise Wrong(f"it is of format {show(document.get('format'))}, and this kvrun reads {FORMAT}")
    for key in ("created", "saved"):
        _number(document.get(key), 0, 1e12, key)
    for part, names in _TEXTS.items():
        table = _of(document.get(part), dict, part)
        for name in names:
            _of(table.get(name), str, f"{part}.{name}")
    model = document["model"]
    _integer(model.get("n_ctx"), 1, _MAX_IDS, "model.n_ctx")
    if model.get("revision") is not None:
        _of(model["revision"], str, "model.revision")
    if document.setdefault("system") is not None:
        _of(document["system"], str, "system")
    sampler = _of(_of(document.get("settings"), dict, "settings").get("sampler", {}), dict, "settings.sampler")
    for name, (least, most) in _SAMPLER.items():
        if sampler.get(name) is not None:
            (_integer if type(most) is int else _number)(sampler[name], least, most, f"settings.sampler.{name}")
    _turns(_of(document.get("turns"), list, "turns"))
    tokens = _ids(document.get("tokens"), "tokens")
    positions = _runs(document.get("positions"), -1, len(tokens), "positions")
    if positions != len(tokens):
        raise Wrong(f"it has {len(tokens)} tokens at {positions} positions")
    _runs(document.get("drawn", []), 0, len(tokens), "drawn", ascending=True)
    _marks(_of(document.get("marks"), list, "marks"), len(tokens))
    for i, page in enumerate(_of(document.get("pages"), list, "pages")):
        group, base, rows, file = _fields(page, 4, f"pages[{i}]")
        _integer(group, 0, _MAX_GROUPS, f"pages[{i}]")
        _integer(base, 0, _MAX_IDS, f"pages[{i}]")
        _integer(rows, 1, _PAGE, f"pages[{i}]")
        _file(file, f"pages[{i}]")
    return document


def _turns(turns: list[Any]) -> None:
    before = total = 0
    for i, turn in enumerate(turns):
        where = f"turns[{i}]"
        _of(turn, dict, where)
        for role in ("user", "assistant"):
            _of(turn.get(role), str, f"{where}.{role}")
        same = _integer(turn.get("same"), 0, before, f"{where}.same")
        read = same + len(_ids(turn.get("read"), f"{where}.read"))
        before = read + len(_ids(turn.get("said"), f"{where}.said"))
        total += read
        if total > _MAX_READ:
            raise Wrong(f"its first {i + 1} prompts have {total} tokens")


def _marks(marks: list[Any], n_tokens: int) -> None:
    last = 0
    for i, mark in enumerate(marks):
        where = f"marks[{i}]"
        count, length, groups, evicted, turns, side = _fields(mark, 6, where)
        last = _integer(count, last + 1, n_tokens, f"{where}, its count,")
        _integer(length, 1, n_tokens, f"{where}, its length,")
        for runs in _of(groups, list, where):
            _runs(runs, 0, -(-length // _PAGE), where, ascending=True)
        if len(groups) > _MAX_GROUPS:
            raise Wrong(f"{where} has {len(groups)} groups")
        for positions in (evicted, turns):
            _ascending(_ids(positions, where), length, where)
        if any(base % _PAGE for base in evicted):
            raise Wrong(f"{where} has lost what is no page")
        if side is not None:
            _file(side, where)


# ---- parts ----


def _of(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise Wrong(f"{what} is {show(value)}, not a {kind.__name__}")
    return value


def _number(value: Any, least: float, most: float, what: str) -> None:
    if type(value) not in (int, float) or not least <= value <= most:
        raise Wrong(f"{what} is {show(value)}, not a number from {least:g} to {most:g}")


def _integer(value: Any, least: int, most: int, what: str) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Wrong(f"{what} is {show(value)}, not an integer from {least} to {most}")
    return value


def _fields(value: Any, n: int, what: str) -> list[Any]:
    if len(_of(value, list, what)) != n:
        raise Wrong(f"{what} has {len(value)} fields, not {n}")
    return value


def _ids(value: Any, what: str) -> list[int]:
    if len(_of(value, list, what)) > _MAX_TOKENS:
        raise Wrong(f"{what} has {len(value)} numbers")
    for item in value:
        if type(item) is not int or not 0 <= item < _MAX_IDS:
            raise Wrong(f"{what} holds {show(item)}")
    return value


def _ascending(values: list[int], most: int, what: str) -> None:
    if any(a >= b for a, b in _pairs(values)) or (values and values[-1] > most):
        raise Wrong(f"{what} holds positions out of order")


def _pairs(values: list[int]) -> Iterator[tuple[int, int]]:
    return zip(values, values[1:], strict=False)


def _runs(value: Any, least: int, most: int, what: str, *, ascending: bool = False) -> int:
    """How many numbers [first, how many] pairs stand for, each at least `least`; at most `most`. ascending: and below `most`."""
    n, end = 0, least
    for run in _of(value, list, what):
        first, count = _fields(run, 2, what)
        _integer(first, end if ascending else least, _MAX_IDS, what)
        _integer(count, 1, most - n, what)
        n, end = n + count, first + count
        if end > (most if ascending else _MAX_IDS):
            raise Wrong(f"{what} holds a run up to {show(end)}")
    return n


def _file(value: Any, what: str) -> None:
    if type(value) is not str or not _FILE.fullmatch(value):
        raise Wrong(f"{what} names {show(value)}, which is no page")
