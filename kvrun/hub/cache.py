"""The shared Hugging Face cache, read without asking any server.

Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache: models--ORG--NAME/{refs,snapshots,blobs}; a
file of a snapshot is a link to a blob, whose name is the file's checksum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvrun.errors import KvrunError
from kvrun.hub.folder import read_index

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAFE_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")


@dataclass(frozen=True)
class CachedModel:
    """A whole model in the cache. file: its GGUF file, None for safetensors. refs: the branches and tags that point to
    `commit`. n_bytes: of all its files."""

    repo: str
    file: str | None
    commit: str
    refs: tuple[str, ...]
    path: Path
    n_bytes: int


def hub_cache() -> Path:
    """HF_HUB_CACHE, or HF_HOME/hub, or its default: as huggingface_hub has it."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def repo_folder(repo: str) -> Path:
    """Where everything of `repo` lies."""
    return hub_cache() / ("models--" + repo.replace("/", "--"))


def snapshot_folder(repo: str, revision: str) -> Path | None:
    """The snapshot that `revision` (branch, tag, commit) names, whether whole or not; None where there is none."""
    base = repo_folder(repo)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        if not _SAFE_REVISION.fullmatch(revision) or ".." in revision:
            return None
        try:
            commit = (base / "refs" / revision).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    folder = base / "snapshots" / commit
    return folder if folder.is_dir() else None


def is_whole(folder: Path) -> bool:
    """Whether a snapshot has a config, a tokenizer and every weight file. `pull` fetches weights last, so whatever else
    the repository has is there too."""
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not (folder / "config.json").is_file() or not any((folder / t).is_file() for t in tokenizers):
        return False
    weights = weight_files(folder)
    return bool(weights) and all((folder / w).is_file() for w in weights)


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that the folder should have, the index's where there is one; [] if it has none."""
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = [p.name for p in folder.glob("*.safetensors")]
        return single if len(single) == 1 else []
    try:
        return sorted(set(read_index(index, "").values()))
    except KvrunError:
        return []


def cached_models() -> Iterator[CachedModel]:
    """Every whole model of the cache: folders with safetensors, and GGUF files."""
    for base in sorted(hub_cache().glob("models--*--*")):
        repo = base.name.removeprefix("models--").replace("--", "/", 1)
        refs: dict[str, list[str]] = {}
        for ref in (base / "refs").rglob("*"):
            if ref.is_file():
                refs.setdefault(ref.read_text("utf-8", "replace").strip(), []).append(
                    ref.relative_to(base / "refs").as_posix())
        for folder in sorted((base / "snapshots").glob("*")):
            named = tuple(refs.get(folder.name, ()))
            if is_whole(folder):
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.suffix != ".gguf")
                yield CachedModel(repo, None, folder.name, named, folder, size)
            for file in sorted(f for f in folder.rglob("*.gguf") if f.is_file()):
                yield CachedModel(repo, file.relative_to(folder).as_posix(), folder.name, named, file, file.stat().st_size)


def discard(link: Path) -> None:
    """Removes a file of a snapshot, and the blob that it links to unless another snapshot does too."""
    blob, snapshots = link.resolve(), next(p for p in link.parents if p.name == "snapshots")
    link.unlink()
    if not any(other.is_symlink() and other.resolve() == blob for other in snapshots.rglob(link.name)):
        blob.unlink(missing_ok=True)
