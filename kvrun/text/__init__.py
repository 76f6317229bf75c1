"""Text in, token ids out, and back: tokenizers, chat templates, incremental decoding, stop strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrun.text.text import Text


def load_text(files) -> Text:
    """The tokenizer and chat template of ModelFiles. ModelError if they are missing, broken or of an unknown kind."""
    from kvrun.text.text import Text
    return Text(files)


def prepare_chat() -> None:
    """Starts what chat templates are rendered with, in the background: called first thing by a command that will need
    it, it is ready when the weights are."""
    from kvrun.text.template import prepare
    prepare()


# Measured, as the growth of the peak of resident memory, on the tokenizers of SmolLM2 (49,152 entries) and Gemma 3 (262,144).
_GGUF_BYTES = 238                # per entry, built from GGUF metadata
_JSON_BYTES = 11.5               # per byte of tokenizer.json, which the tokenizers library reads as a whole
_JSON_ENTRY_BYTES = 100          # of tokenizer.json per entry, where there is no file to look at


def memory_bytes(files, vocab_size: int) -> int:
    """About how much memory load_text will have taken when it is done. Reads nothing."""
    if files.kind == "gguf":
        return _GGUF_BYTES * vocab_size
    try:
        size = (files.path / "tokenizer.json").stat().st_size
    except OSError:
        size = _JSON_ENTRY_BYTES * vocab_size
    return int(_JSON_BYTES * size)
