"""One model's text side: encoding prompts and conversations, decoding answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvrun.errors import ModelError
from kvrun.text.bounds import reserve
from kvrun.text.detokenizer import BYTE, SPACE, Detokenizer, to_bytes
from kvrun.text.tokenizer import open_tokenizer

_SURROGATES = re.compile("[\ud800-\udfff]")


class Text:
    """The tokenizer and chat template of one model.

    eos_ids: ids that end an answer, from generation_config, config and tokenizer together. special_ids: ids whose text
    is not shown. vocab_size: ids run from 0 to below it; the model's embedding may have more rows.
    """

    def __init__(self, files):
        self._tokenizer = open_tokenizer(files)
        self._where = str(files.path)
        self._template = None
        self.vocab_size = self._tokenizer.size
        self.special_ids = frozenset(self._tokenizer.special.values())
        self.eos_ids = self._tokenizer.ends | _eos_of(files.generation_config) | _eos_of(files.config)

    # -- encoding ---------------------------------------------------------------------------------------------------

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of a text. special: strings that spell special tokens become them; otherwise they stay text.

        bos: put before it what the tokenizer puts before a prompt (a BOS, or nothing), once: not if the text, read with
        `special`, already begins with it. Lone surrogates count as U+FFFD.
        """
        reserve(text)
        ids = self._tokenizer.encoder.encode(_clean(text), special)
        return self._with_prefix(ids) if bos else ids

    def _with_prefix(self, ids: list[int]) -> list[int]:
        prefix = list(self._tokenizer.prefix)
        n = len(prefix)
        while n and ids[:n] == prefix:
            ids = ids[n:]
        return prefix + ids

    # -- conversations ----------------------------------------------------------------------------------------------

    @property
    def has_template(self) -> bool:
        """Whether the model came with a chat template."""
        return bool(self._tokenizer.templates)

    @property
    def templates(self) -> dict[str, str]:
        """Name -> source of the model's chat templates."""
        return dict(self._tokenizer.templates)

    def use_template(self, source: str, where: str) -> None:
        """Replaces the model's chat templates by `source`. where: the file it came from, for errors."""
        self._tokenizer = replace(self._tokenizer, templates={"default": source})
        self._template, self._where = None, where

    def render(self, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, tools=None,
               documents=None, **kwargs) -> str:
        """The conversation as one string, by the model's chat template. kwargs: further names the template may read
        (enable_thinking, ...). TemplateError if the template refuses the conversation."""
        return self._chat_template(tools).render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, documents=documents,
            **{**self._tokenizer.names, **kwargs})

    def _chat_template(self, tools):
        from kvrun.text.template import ChatTemplate, choose
        if not self._tokenizer.templates:
            raise ModelError(f"{self._where}: the model has no chat template; use 'kvrun run --raw' or --template-file")
        source = choose(self._tokenizer.templates, tools, self._where)
        if self._template is None or self._template.source != source:
            self._template = ChatTemplate(source, self._where)
        return self._template

    def encode_chat(self, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, tools=None,
                    documents=None, **kwargs) -> list[int]:
        """Renders and encodes a conversation; special tokens that the template writes are read as such, those typed in
        a message, a tool or a document stay text (see guard.py). Exactly one BOS where the model has one."""
        from kvrun.text.guard import Guard
        guard = Guard(self._tokenizer.special, self._tokenizer.added, self._chat_template(tools).source)
        messages, tools, documents = guard.hide(messages, tools, documents)
        rendered = _clean(self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools,
                                      documents=documents, **kwargs))
        reserve(rendered)
        encoder = self._tokenizer.encoder
        if guard.hidden:
            ids = encoder.encode_marked(*guard.split(rendered))
        else:
            ids = encoder.encode(rendered, special=True)
        return self._with_prefix(ids)

    # -- decoding ---------------------------------------------------------------------------------------------------

    def detokenizer(self, *, special: bool = False, continued: bool = False) -> Detokenizer:
        """A fresh incremental decoder; see Detokenizer."""
        return Detokenizer(self._tokenizer, special, continued)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for in the middle of a text; those of its name for a special one."""
        piece = self._tokenizer.piece(id)
        if piece is None:
            return b""
        if self._tokenizer.decoding.byte_level:
            return to_bytes(piece)
        byte = BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()

    def token_text(self, id: int) -> str:
        """The text of one token by itself, special tokens included; bytes that make no character show as U+FFFD."""
        one = self.detokenizer(special=True, continued=True)
        return one.push(id) + one.flush()


def _clean(text: str) -> str:
    return _SURROGATES.sub("\ufffd", text)


def _eos_of(config: Mapping | None) -> frozenset[int]:
    """eos_token_id of a config: an int, a list, or nothing."""
    value = (config or {}).get("eos_token_id")
    values = value if isinstance(value, (list, tuple)) else [value]
    return frozenset(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)
