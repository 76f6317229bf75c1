"""Weight files: safetensors folders and GGUF behind one TensorSource."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrun.hub.files import ModelFiles
    from kvrun.weights.source import TensorSource


def open_source(files: ModelFiles) -> TensorSource:
    """The tensors of a model. Headers are checked here, data is read later. ModelError, StorageError."""
    if files.kind == "gguf":
        from kvrun.weights.gguf_source import GgufSource

        return GgufSource(files.gguf)
    from kvrun.weights.folder import FolderSource

    return FolderSource(files.path, files.repair)
