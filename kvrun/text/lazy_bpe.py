"""Byte-pair encoding over a large vocabulary without building it.

Building a tokenizers BPE of Gemma's 262,144 tokens and 514,906 merges takes about a second, most of a cold start. But
a text can only ever meet tokens that it contains: every merge on the way joins two neighbouring stretches of it. So
each text gets the BPE of the tokens that occur in it, a few thousand at most, and the ids come out the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

_SHORT = 16       # tokens up to this many characters are looked up by stretch of text, the few longer ones searched for

_KEEP = 10_000    # pieces; building a BPE of so many takes about 20 ms


@dataclass(frozen=True)
class Added:
    """A token matched as a string before the BPE runs. special: only when special tokens are asked for."""

    id: int
    special: bool
    rstrip: bool = False


class LazyBpe:
    """ids: piece -> id, in the spelling the BPE sees. added: string as typed -> Added.

    rank(left, right) -> sort key of that merge, None if it is none. normalize: text -> what the BPE sees.
    prefix: put before each stretch of text between added tokens ("" for none). always: pieces every BPE must have.
    configure(tokenizer) sets normalizer and pre-tokenizer; options go to tokenizers.models.BPE.
    """

    def __init__(self, ids: dict[str, int], added: dict[str, Added], rank: Callable[[str, str], object],
                 normalize: Callable[[str], str], configure: Callable, options: dict,
                 prefix: str = "", always: Iterable[str] = ()):
        self.ids, self.added = ids, added
        self._rank, self._normalize, self._configure = rank, normalize, configure
        self._options, self._prefix = options, prefix
        self._long = [piece for piece in ids if len(piece) > _SHORT]
        self._always = frozenset(always)
        self._known: set[str] = set(always)
        self._present: dict[str, Added] = {}
        self._built = None

    @property
    def n_long(self) -> int:
        """How many pieces are searched for in every text."""
        return len(self._long)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """See Encoder."""
        known, present = self._pieces(text)
        if self._built is None or not (known <= self._known and present.keys() <= self._present.keys()):
            # What earlier texts needed is kept for the next turn of a conversation, up to a point.
            if len(self._known) > _KEEP:
                self._known, self._present = set(self._always), {}
            self._known |= known
            self._present |= present
            self._built = self._build(self._known, self._present, {})
        tokenizer, back = self._built
        tokenizer.encode_special_tokens = not special
        return [back[i] for i in tokenizer.encode(text, add_special_tokens=False).ids]

    def encode_marked(self, text: str, stand_ins: dict[str, str], plain: Set[str]) -> list[int]:
        """See Encoder."""
        known, present = self._pieces(text)
        matched = {token: spec for token, spec in present.items() if not spec.special and token not in plain}
        tokenizer, back = self._build(known | self._always, matched, stand_ins)
        return [back[i] for i in tokenizer.encode(text, add_special_tokens=False).ids]

    def _pieces(self, text: str) -> tuple[set[str], dict[str, Added]]:
        """The pieces that occur in `text` as the BPE may see it, and the added tokens that occur in it."""
        present = {token: spec for token, spec in self.added.items() if token in text}
        forms = [self._normalize(text)]
        if self._prefix:
            either = "|".join(map(re.escape, sorted(present, key=len, reverse=True))) or "(?!)"
            forms += [self._prefix + self._normalize(part) for part in re.split(either, text)]
        found: set[str] = set()
        for form in forms:
            for size in range(1, min(_SHORT, len(form)) + 1):
                found |= {form[i:i + size] for i in range(len(form) - size + 1)} & self.ids.keys()
            if len(form) > _SHORT:
                found.update(piece for piece in self._long if piece in form)
        return found, present

    def _build(self, known: set[str], present: dict[str, Added], stand_ins: dict[str, str]):
        """(tokenizers.Tokenizer, its id -> our id) of those pieces and added tokens."""
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import BPE

        ids, rank = self.ids, self._rank
        known = known | {token for token in present if token in ids}
        merges = []
        for piece in known:
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in known and right in known and (key := rank(left, right)) is not None:
                    merges.append((key, left, right))
        merges.sort()
        vocab = {piece: i for i, piece in enumerate(known)}
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=[(left, right) for _, left, right in merges], **self._options))
        self._configure(tokenizer)
        for token, spec in present.items():
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=spec.special, rstrip=spec.rstrip)])
        for mark, token in stand_ins.items():
            tokenizer.add_tokens([AddedToken(mark, normalized=False, rstrip=self.added[token].rstrip)])
        back = [ids[piece] for piece in vocab] + [0] * (len(present) + len(stand_ins))
        for token, spec in present.items():
            back[tokenizer.token_to_id(token)] = spec.id
        for mark, token in stand_ins.items():
            back[tokenizer.token_to_id(mark)] = self.added[token].id
        return tokenizer, back
