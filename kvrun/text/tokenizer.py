"""What every tokenizer of kvrun offers, wherever its files came from."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Protocol

from kvrun.errors import ModelError


MAX_TOKENS = 1 << 21
"""Entries of a vocabulary: the largest known one has 262,144."""
MAX_ADDED = 60_000
"""Tokens that are matched as whole strings: a stand-in character each, for guard.py, and a look at every text."""


class Encoder(Protocol):
    """Text -> ids, with nothing put before or after."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        """special: strings that spell special tokens become them."""

    def encode_marked(self, text: str, stand_ins: dict[str, str], plain: Set[str]) -> list[int]:
        """Like encode, for text in which characters stand for tokens.

        stand_ins: character -> the added token it stands for. plain: added tokens that stay text where they are
        spelled out, as all special ones do.
        """


@dataclass(frozen=True)
class Decoding:
    """How pieces become text.

    byte_level: pieces are spelled in GPT-2's alphabet of 256 characters, one a byte. Otherwise they are
    SentencePiece's: U+2581 for a space, <0xXX> for a byte. strip: leading spaces of the whole text that the encoder
    put there.
    """

    byte_level: bool
    strip: int = 0


@dataclass(frozen=True)
class Tokenizer:
    """piece: id -> its token as the vocabulary spells it, None for an id without one; ids run from 0 to below size.

    special: token -> id of those that text never shows. added: the other tokens that are matched as whole strings.
    prefix: ids that open every prompt (a BOS, or what the model's post-processor puts there). names: "bos_token" and
    its like -> token, for the chat template. ends: ids that the tokenizer's own files call an end of text or turn.
    templates: name -> chat template found with the tokenizer.
    """

    encoder: Encoder
    decoding: Decoding
    piece: Callable[[int], str | None]
    size: int
    special: dict[str, int]
    added: tuple[str, ...] = ()
    prefix: tuple[int, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    ends: frozenset[int] = frozenset()
    templates: dict[str, str] = field(default_factory=dict)


_TURN_ENDS = frozenset((
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>", "<EOT>",
    "[EOT]", "<|endoftext|>", "<|end_of_text|>", "<|user|>", "<end_of_utterance>", "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
))


def turn_ends(special: dict[str, int]) -> frozenset[int]:
    """Ids of the end-of-turn tokens of chat models among the special ones.

    Many files name only an end of text as EOS; the model then ends its turn with one of these, and would talk on as the
    user if it were not heeded.
    """
    return frozenset(special[token] for token in _TURN_ENDS & special.keys())


def open_tokenizer(files) -> Tokenizer:
    """The tokenizer of ModelFiles. ModelError names the file and what is wrong with it."""
    if files.kind == "gguf":
        from kvrun.text.gguf_tokenizer import from_gguf
        return from_gguf(files.gguf.metadata, str(files.path), files.repair)
    if files.kind == "folder":
        from kvrun.text.folder_tokenizer import from_folder
        return from_folder(files.path, files.repair)
    raise ModelError(f"{files.path}: no tokenizer is known for model files of kind {files.kind!r}")
