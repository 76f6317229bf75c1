"""What a resolved model is: its files on this machine and the settings read from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrun.weights.gguf_file import GgufFile

Progress = Callable[[str, int, int | None], None]
"""(what is fetched or read, bytes done, bytes in all or None where unknown)"""


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine.

    name: what the user calls it. kind: "folder" (Hugging Face layout), "gguf", or "config" (config.json alone, where
    resolve was asked for no weights). path: that folder or file.
    revision: commit of a Hub repository, else None. config: config.json, or the same rebuilt from GGUF metadata.
    generation_config: generation_config.json, {} where there is none. n_ctx, sampling: the alias' defaults.
    source: "hub", "package" or "local". repair: what to do if a file turns out broken, as the end of a message.
    gguf: the opened file where kind is "gguf".
    """

    name: str
    kind: str
    path: Path
    revision: str | None
    config: dict
    generation_config: dict
    n_ctx: int | None = None
    sampling: dict = field(default_factory=dict)
    source: str = "local"
    licence: str | None = None
    repair: str = "fetch it again"
    gguf: GgufFile | None = None
