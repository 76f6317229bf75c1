"""Ids back to text, one at a time."""

from __future__ import annotations

import codecs
import re
from functools import cache

from kvrun.text.tokenizer import Tokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"


@cache
def _bytes_of() -> dict[str, int]:
    from kvrun.text.gguf_tokenizer import byte_alphabet
    return {char: b for b, char in enumerate(byte_alphabet())}


class Detokenizer:
    """Gives out text as soon as it is complete; the pieces joined are what decoding all ids at once gives.

    That is the text of tokenizers' `decode`: a byte sequence that is no UTF-8 becomes U+FFFD, special tokens show
    nothing unless `special`, and ids without a token show nothing. Constant work per id.

    continued: the ids go on a text, so that a SentencePiece model's leading space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False, continued: bool = False):
        self._piece, self._size = tokenizer.piece, tokenizer.size
        self._hidden = () if special else frozenset(tokenizer.special.values())
        self._byte_level = tokenizer.decoding.byte_level
        self._strip = 0 if continued else tokenizer.decoding.strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()         # SentencePiece: the byte tokens since the last other one

    def push(self, id: int) -> str:
        """Text that became complete with this id, maybe ""."""
        if id in self._hidden or not 0 <= id < self._size or (piece := self._piece(id)) is None:
            return ""
        if self._byte_level:
            return self._utf8.decode(to_bytes(piece))
        if byte := BYTE.fullmatch(piece):
            self._run.append(int(byte[1], 16))
            return ""
        return self._leading(self._end_run() + piece.replace(SPACE, " "))

    def flush(self) -> str:
        """What is still held back, with U+FFFD for an unfinished character; the detokenizer is as new after it, but in
        the middle of a text."""
        return self._utf8.decode(b"", True) if self._byte_level else self._leading(self._end_run())

    def _end_run(self) -> str:
        """The text of the run of byte tokens. One bad byte makes U+FFFD of each byte of the run, which is why nothing
        of it can be given out before it ends (tokenizers' ByteFallback)."""
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _leading(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


def to_bytes(piece: str) -> bytes:
    """The bytes of a byte-level piece; an added token that is not spelled in the alphabet stands for itself."""
    table = _bytes_of()
    try:
        return bytes([table[char] for char in piece])
    except KeyError:
        return piece.encode()
