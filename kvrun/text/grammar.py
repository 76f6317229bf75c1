"""Answers that a JSON schema or a regular expression allows, through llguidance (the `grammar` extra).

The model's own draw is kept wherever the grammar allows it, which costs a look at one token. Only a draw that is not allowed asks for the
mask of all that are, and is drawn again from those. Both together are a draw from the allowed tokens in proportion to their chances.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvrun.backends.batch import Sampler
from kvrun.backends.sampling import draw
from kvrun.errors import KvrunError, UsageError
from kvrun.text.reasoning import TAGS, Reasoning

if TYPE_CHECKING:
    from kvrun.text.text import Text

# As json.dumps writes it: a small model given free white space writes nothing else.
_JSON_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_SEED_OFFSET = 0x9E3779B97F4A7C15   # the second draw at a position must not depend on the first
_NEGLIGIBLE = 40.0                  # logits this far below the best, in units of the temperature: a chance below 1e-17


class Grammar:
    """A schema or a pattern, ready for the answers of one model."""

    def __init__(self, text: Text, grammar: str, what: str) -> None:
        """grammar: in llguidance's own form. what: the option, for errors. UsageError names what is not supported."""
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

        self._text = text
        ends = sorted(id for id in text.eos_ids if id < text.vocab_size)    # a file may name others, which are never drawn
        if not ends:
            raise UsageError(f"{what}: this model has no token that ends an answer")
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(text, ends)), n_vocab=text.vocab_size, eos_token=ends)
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem:
            raise UsageError(f"{what}: {' '.join(str(problem).split())}")
        self._grammar = grammar

    def begin(self, reasoning: str | None = None) -> Constraint:
        """The constraint of one answer. reasoning: the tag of a block that the prompt has opened: what is said in it is free."""
        from llguidance import LLMatcher

        return Constraint(LLMatcher(self._tokenizer, self._grammar, log_level=0), self._text, reasoning)


class Constraint:
    """What one answer may say next. finished: nothing more."""

    def __init__(self, matcher: Any, text: Text, reasoning: str | None) -> None:
        self._matcher = matcher
        self._text = text
        self._eos = text.eos_ids
        self._detokenizer = text.detokenizer(special=True, continued=True)
        self._thoughts = Reasoning(reasoning) if reasoning else None
        self._begun = False
        self.finished = False

    def choose(self, drawn: int, logits: Callable[[], np.ndarray], sampler: Sampler, recent: list[int], position: int) -> int:
        """`drawn` where it is allowed, else another draw. logits: float32 [vocab] that it was drawn from."""
        if self._thoughts is not None or (not self._begun and self._opens_block(drawn)):
            return drawn
        if self._allows(drawn):
            return drawn
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        ids = np.flatnonzero(np.unpackbits(allowed, bitorder="little")[: self._text.vocab_size])
        if self._matcher.is_error() or not len(ids):
            raise KvrunError(f"the grammar allows nothing more: {' '.join(self._matcher.get_error().split()) or 'no token fits'}")
        chances = np.asarray(logits(), np.float32)[ids]
        if sampler.temperature > 0:
            near = chances >= chances.max() - _NEGLIGIBLE * max(sampler.temperature, 1.0) * max(sampler.repeat_penalty, 1.0)
            ids, chances = ids[near], chances[near]
        places = {int(token): place for place, token in enumerate(ids)} if sampler.repeat_penalty != 1.0 else {}
        known = [places[token] for token in recent if token in places]
        return int(ids[draw(chances, replace(sampler, seed=(sampler.seed + _SEED_OFFSET) % 2**64), known, position)])

    def _allows(self, token: int) -> bool:
        if token in self._eos:
            return self._matcher.is_accepting()
        return self._matcher.validate_tokens([token]) == 1

    def _opens_block(self, token: int) -> bool:
        return self._text.token_text(token).strip() in TAGS

    @property
    def whole(self) -> bool:
        """Whether what was said may end here."""
        return self._thoughts is None and (self.finished or self._matcher.is_accepting())

    def accept(self, token: int) -> None:
        """`token` has been said."""
        if not self._begun and self._thoughts is None and self._opens_block(token) and not self._allows(token):
            self._thoughts = Reasoning()
        self._begun = True
        if self._thoughts is not None:
            self._thoughts.push(self._detokenizer.push(token))
            if not self._thoughts.thinking:
                self._thoughts = None
            return
        self._matcher.consume_token(token)
        self.finished = self._matcher.is_stopped()


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, text: Text, ends: list[int]) -> None:
        self.eos_token_id = ends[0]
        self.bos_token_id = None
        self.tokens = [text.token_bytes(i) for i in range(text.vocab_size)]
        self.special_token_ids = sorted(text.special_ids.union(ends))
        self._text = text

    def __call__(self, text: str) -> list[int]:
        return self._text.encode(text, bos=False)


def available() -> None:
    """UsageError where llguidance is not installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise UsageError("--schema and --regex need llguidance; install it with: pip install llguidance") from None


def from_schema(text: Text, schema: str, where: str) -> Grammar:
    """The grammar of a JSON schema, given as JSON text. UsageError where it is none, or asks for what is not supported."""
    from llguidance import LLMatcher

    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--schema {where}: not JSON: {error}") from None
    if not isinstance(parsed, dict | bool):
        raise UsageError(f"--schema {where}: a schema is an object")
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(parsed), defaults=_JSON_STYLE)
    except ValueError as error:
        raise UsageError(f"--schema {where}: {' '.join(str(error).split())}") from None
    return Grammar(text, grammar, f"--schema {where}")


def from_regex(text: Text, pattern: str) -> Grammar:
    """The grammar of a regular expression that the whole answer matches. UsageError where it is none."""
    from llguidance import LLMatcher

    if re.search(r"\\[bBAzZ]|\(\?[=!<]", pattern):
        raise UsageError(f"--regex {pattern}: anchors inside, look-ahead and look-behind are not supported; the whole answer is matched as it is")
    return Grammar(text, LLMatcher.grammar_from_regex(pattern), f"--regex {pattern}")
