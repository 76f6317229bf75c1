"""One change to a valid file, of the kind that breaks readers: both fuzzers draw from here.

Structured changes of JSON keep it JSON and change a value, a type, a size or the nesting; changes of bytes put sizes and offsets that overflow
where the file has some, cut, repeat and move pieces.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random

SIZES = [0, 1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 129, 255, 256, 1000, 4096, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53,
         2**60, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -2**31, -2**63]
_STRINGS = ["", " ", "\0", "\n", "\x1b[2J", "../x", "/etc/passwd", "\ud800", "\u202e", "a" * 300, "full_attention", "sliding_attention", "default", "yarn",
            "longrope", "llama3", "linear", "float16", "F32", "BF16", "[/x]", "%s%n", "{}", "<s>", "</s>", "LlamaForCausalLM", "Gemma3ForCausalLM",
            "MistralForCausalLM", "Phi3ForCausalLM", "gelu_pytorch_tanh", "x" * 5000]
_VALUES = [None, True, False, 0.0, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 0.5, 1.5, 10**30, 10**400, [], {}, [[]], [None],
           [0] * 300, {"": None}]


def mutate(data: bytes, draw: Random, kind: str) -> bytes:
    """`data` with one to four changes. kind: "json", "lines" (of text) or "binary"."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = _KINDS[kind](data, draw)
    return data


# ---- JSON ----


def _json(data: bytes, draw: Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return _binary(data, draw)
    if draw.random() < 0.15:
        return _binary(data, draw)
    places = list(_places(value))
    if not places:
        return json.dumps(_odd(draw)).encode()
    try:
        _change(places, draw)
        return json.dumps(value).encode()
    except (ValueError, RecursionError, OverflowError):  # a value inside itself, a float of a huge integer
        return data


def _change(places: list, draw: Random) -> None:
    holder, key = draw.choice(places)
    how = draw.randrange(8)
    if how < 3:
        holder[key] = _odd(draw)
    elif how == 3:
        del holder[key]
    elif how == 4:
        other_holder, other = draw.choice(places)
        holder[key] = other_holder[other]
    elif how == 5 and isinstance(holder, dict):
        holder[draw.choice((draw.choice(_STRINGS), f"{key}x"))] = holder.pop(key)
    elif how == 6:
        holder[key] = _nudged(holder[key], draw)
    else:
        holder[key] = _wrapped(holder[key], draw)


def _places(value: object, depth: int = 0):
    """Every (container, key) of a JSON value."""
    if depth < 40 and isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key], depth + 1)


def _odd(draw: Random) -> object:
    pool = draw.choice((SIZES, _STRINGS, _VALUES))
    value = draw.choice(pool)
    return value.copy() if isinstance(value, (list, dict)) else value


def _nudged(value: object, draw: Random) -> object:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return draw.choice((value + 1, value - 1, -value, value * 2, value * 1.5, float(value), str(value)))
    if isinstance(value, str):
        at = draw.randrange(len(value) + 1)
        return value[:at] + draw.choice(_STRINGS) + value[at + draw.randrange(3):]
    if isinstance(value, list):
        return draw.choice((value * 2, value[:-1], value[1:], value + [_odd(draw)], value[::-1]))
    return value


def _wrapped(value: object, draw: Random) -> object:
    for _ in range(draw.choice((1, 1, 3, 30, 200))):
        value = [value] if draw.random() < 0.5 else {"a": value}
    return value


# ---- lines of text ----


def _lines(data: bytes, draw: Random) -> bytes:
    lines = data.split(b"\n")
    at, how = draw.randrange(len(lines)), draw.randrange(6)
    if how == 0:
        lines.insert(at, draw.choice(lines))
    elif how == 1:
        del lines[at]
    elif how == 2 and b"=" in lines[at]:
        value = json.dumps(_odd(draw)).replace("null", draw.choice(("1979-05-27", "0x" + "f" * 5000, "[" * 3000, "nan", "{}")))
        lines[at] = lines[at].split(b"=")[0] + b"= " + value.encode()
    elif how == 3:
        words = lines[at].split(b" ")
        words[draw.randrange(len(words))] = str(draw.choice((*SIZES, *_STRINGS, "9" * 5000, "~nobody"))).encode("utf-8", "surrogatepass")
        lines[at] = b" ".join(words)
    else:
        return _binary(data, draw)
    return b"\n".join(lines)


# ---- bytes ----


def _binary(data: bytes, draw: Random) -> bytes:
    if not data:
        return draw.randbytes(draw.randrange(1, 64))
    out = bytearray(data)
    at, how = draw.randrange(len(out)), draw.randrange(8)
    if draw.random() < 0.5:
        at %= min(len(out), 4096)          # headers are at the beginning
    if how < 2:                            # a size or an offset
        code = draw.choice("BHIQ")
        piece = struct.pack("<" + code, draw.choice(SIZES) % 2 ** (8 * struct.calcsize("<" + code)))
        out[at : at + len(piece)] = piece
    elif how == 2:
        out[at] ^= 1 << draw.randrange(8)
    elif how == 3:                         # cut short
        del out[at:]
    elif how == 4:
        del out[at : at + draw.choice((1, 4, 8, 32))]
    elif how == 5:
        out[at:at] = draw.randbytes(draw.choice((1, 4, 8, 32)))
    elif how == 6:                         # a piece of it again, elsewhere
        start = draw.randrange(len(out))
        out[at:at] = out[start : start + draw.choice((1, 8, 64, 512))]
    else:
        out[at : at + draw.choice((1, 8, 64))] = bytes([draw.choice((0, 0xFF, 0x5B, 0x7B, 0x22, 0x80))]) * draw.choice((1, 8, 64))
    return bytes(out)


_KINDS: dict[str, Callable[[bytes, Random], bytes]] = {"json": _json, "lines": _lines, "binary": _binary}
