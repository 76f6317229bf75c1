"""Text in, token ids out, and back: tokenizers, chat templates, incremental decoding, stop strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrun.text.text import Text


def load_text(files) -> Text:
    """The tokenizer and chat template of ModelFiles. ModelError if they are missing, broken or of an unknown kind."""
    from kvrun.text.text import Text
    return Text(files)
