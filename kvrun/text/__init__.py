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
