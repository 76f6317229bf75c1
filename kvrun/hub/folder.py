"""Reading a model folder in the Hugging Face layout, and a GGUF file, into ModelFiles."""

from __future__ import annotations

import json
from pathlib import Path

from kvrun.errors import ModelError, NotFoundError, StorageError, show
from kvrun.hub.files import ModelFiles

_MAX_JSON = 16 << 20
_MAX_NAME = 255         # bytes that file systems allow a name
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path, repair: str) -> dict:
    """A JSON object. ModelError if it is none, is a git-LFS pointer, or is absurdly large."""
    from kvrun.weights.blob import refuse_lfs_pointer

    try:
        with path.open("rb") as f:
            raw = f.read(_MAX_JSON + 1)
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; {repair}") from None
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e.strerror}") from e
    if len(raw) > _MAX_JSON:
        raise ModelError(f"{path}: more than {_MAX_JSON >> 20} MiB, no configuration is that large")
    refuse_lfs_pointer(raw, path, repair)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path}: not valid JSON ({e}); {repair}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object; {repair}")
    return value


def read_index(path: Path, repair: str) -> dict[str, str]:
    """model.safetensors.index.json as tensor -> shard, each the name of a file that could lie beside it. ModelError."""
    mapping = read_json(path, repair).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ModelError(f"{path}: has no weight_map; {repair}")
    for name, shard in mapping.items():
        if type(shard) is not str or not shard.endswith(".safetensors") or set(shard) & set("/\\\0") or shard[0] == ".":
            raise ModelError(f"{path}: puts {show(name)} into {show(shard)}, which is no safetensors file of this folder")
    for shard in set(mapping.values()):
        if len(shard.encode("utf-8", "replace")) > _MAX_NAME or not shard.isprintable():
            raise ModelError(f"{path}: shard {show(shard)} is missing; {repair}")
    return mapping


def open_config(path: Path, name: str, repair: str = "fetch it again", **settings) -> ModelFiles:
    """ModelFiles of kind "config": the shape of a model in a folder that need hold no more than config.json."""
    return ModelFiles(name=name, kind="config", path=path, config=read_json(path / "config.json", repair), repair=repair,
                      generation_config={}, **{"revision": None} | settings)


def has_weights(path: Path) -> bool:
    """Whether a folder holds weights in a form that can be read."""
    return any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists()


def open_folder(path: Path, name: str, repair: str = "fetch it again", **settings) -> ModelFiles:
    """ModelFiles of a folder. ModelError for one without config.json or with pickled weights only."""
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such folder")
    if not (path / "config.json").exists():
        if list(path.glob("*.gguf")):
            raise ModelError(f"{path}: holds GGUF files; name the one that you mean")
        raise ModelError(f"{path}: no config.json, so no model in the Hugging Face layout")
    config = read_json(path / "config.json", repair)
    if not has_weights(path):
        if any(p for pattern in _PICKLES for p in path.glob(pattern)):
            raise ModelError(f"{path}: only pickled weights, which can run code when read; "
                             "look for a revision with *.safetensors")
        raise ModelError(f"{path}: no *.safetensors in it; {repair}")
    generation = path / "generation_config.json"
    return ModelFiles(name=name, kind="folder", path=path, config=config, repair=repair,
                      generation_config=read_json(generation, repair) if generation.exists() else {},
                      **{"revision": None} | settings)


def open_gguf(path: Path, name: str, repair: str = "fetch it again", **settings) -> ModelFiles:
    """ModelFiles of a GGUF file, its header parsed once and kept as `.gguf`."""
    from kvrun.weights.gguf_config import hf_config, hf_generation_config
    from kvrun.weights.gguf_file import GgufFile

    file = GgufFile(path, repair)
    licence = file.metadata.get("general.license")
    settings = {"licence": licence if isinstance(licence, str) else None, "revision": None} | settings
    return ModelFiles(name=name, kind="gguf", path=path, config=hf_config(file), repair=repair,
                      generation_config=hf_generation_config(file), gguf=file, **settings)
