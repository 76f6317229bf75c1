"""MODEL -> ModelFiles: alias, folder, org/name[@revision], file.gguf or org/name/file.gguf."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvrun.errors import KvrunError, NotFoundError, UsageError
from kvrun.hub.catalog import Alias, load_catalog
from kvrun.hub.files import ModelFiles, Progress
from kvrun.hub.folder import has_weights, open_config, open_folder, open_gguf
from kvrun.hub.store import package_path

_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?P<file>/[\w./-]+\.gguf)?(@(?P<revision>[\w./-]+))?")


def resolve(model: str, *, revision: str | None = None, offline: bool = False, progress: Progress | None = None,
            weights: bool = True) -> ModelFiles:
    """The files of `model` on this machine, fetched if they are not here yet.

    What is here is used as it lies, without asking any server; `pull` asks for news. offline (or HF_HUB_OFFLINE): no
    socket is opened. weights: False is content with the shape: a folder that holds config.json alone, and of a Hub
    repository that is not here no more than that is fetched. Errors: NotFoundError, AccessError, ModelError, StorageError, UsageError.
    """
    where = locate(model, revision)
    if isinstance(where, Alias):
        return _alias(where, revision, offline, progress)
    if isinstance(where, Path):
        if not weights and (where / "config.json").exists() and not has_weights(where):
            return open_config(where, model)
        return open_gguf(where, model) if where.is_file() else open_folder(where, model)
    repo, file, wanted = where
    if not weights and not file:
        return _hub_config(repo, wanted, offline, progress, model)
    return _hub(repo, file, wanted, offline, progress, name=model, settings={})


def locate(model: str, revision: str | None = None) -> Alias | Path | tuple[str, str | None, str]:
    """What `model` names, without touching a network: an Alias, a folder or file on this machine, or
    (repo, GGUF file of it or None, revision). NotFoundError, UsageError."""
    if not model or "\0" in model:
        raise UsageError("MODEL is empty: give an alias, a folder, org/name or a .gguf file")
    local = Path(model).expanduser()
    if _exists(local) and ("/" in model or os.sep in model or local.is_file()):
        if revision:
            raise UsageError(f"--revision {revision}: {model} is on this machine and has no revisions")
        return local
    catalog = load_catalog()
    if alias := catalog.aliases.get(model):
        return alias
    if _exists(local):
        return local
    if model.startswith(("/", "./", "../", "~")):
        raise NotFoundError(f"{model}: no such file or folder")
    if not (match := _HUB.fullmatch(model)):
        if model.lower().endswith(".gguf"):
            raise NotFoundError(f"{model}: no such file")
        raise catalog.nearest(model)
    if revision and match["revision"] and revision != match["revision"]:
        raise UsageError(f"{model} and --revision {revision} name different revisions")
    return match["repo"], match["file"] and match["file"][1:], match["revision"] or revision or "main"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system, or a folder that may not be looked into
        return False


def alias_settings(alias: Alias) -> dict:
    """What an alias adds to the ModelFiles of its file."""
    found = {"n_ctx": alias.n_ctx, "sampling": dict(alias.sampling), "licence": alias.licence}
    return {k: v for k, v in found.items() if v is not None}


def open_package(alias: Alias, path: Path) -> ModelFiles:
    """ModelFiles of an alias' packaged file, which lies at `path`."""
    return open_gguf(path, alias.name, repair=f"kvrun pull {alias.name}", source="package", **alias_settings(alias))


def _alias(alias: Alias, revision: str | None, offline: bool, progress: Progress | None) -> ModelFiles:
    """Sources in order: what is on this machine (the alias' own path, the store, the shared Hub cache); the package;
    the Hub.

    The package goes before the Hub because an alias should be the same file everywhere: it is pinned by sha256 where
    "main" moves, a third of the size, needs no licence click, and the index answers on machines that block the Hub.
    """
    settings = alias_settings(alias)
    if alias.path and not revision:
        path = Path(alias.path).expanduser()
        return (open_folder if path.is_dir() else open_gguf)(path, alias.name, **settings)
    package = alias.package if not revision else None
    wanted = revision or alias.revision
    if package and package_path(package).exists():
        return open_package(alias, package_path(package))
    from kvrun.hub import remote

    if alias.repo and remote.cached_snapshot(alias.repo, wanted):
        return _hub(alias.repo, None, wanted, True, progress, alias.name, settings)
    if package and (offline or remote.offline_by_environment()):
        raise NotFoundError(f"{alias.name}: not on this machine (looked for offline); 'kvrun pull {alias.name}' fetches it")
    if not package:
        if not alias.repo:
            raise UsageError(f"{alias.name}: has no repo, so no revision {revision}")
        return _hub(alias.repo, None, wanted, offline, progress, alias.name, settings)
    from kvrun.hub.package import fetch_package

    try:
        return open_package(alias, fetch_package(package, progress))
    except NotFoundError as unreachable:
        if not alias.repo:
            raise
        try:
            return _hub(alias.repo, None, wanted, False, progress, alias.name, settings)
        except KvrunError as e:
            raise type(e)(f"{e}; before that, {unreachable}") from e


def _hub(repo: str, file: str | None, revision: str, offline: bool, progress: Progress | None, name: str,
         settings: dict) -> ModelFiles:
    """A repository, or one GGUF file of it: from the shared cache where it is whole there, else fetched."""
    from kvrun.hub import remote

    repair = f"kvrun pull {name}"
    if file:
        path = remote.cached_file(repo, file, revision)
        if path is None:
            _refuse_offline(offline, name, repair)
            path = remote.fetch_file(repo, file, revision, progress)
        return open_gguf(path, name, repair=repair, source="hub", revision=remote.commit_of(path, repo), **settings)
    folder = remote.cached_snapshot(repo, revision)
    if folder is None:
        _refuse_offline(offline, name, repair)
        folder = remote.fetch_snapshot(repo, revision, progress)
    return open_folder(folder, name, repair=repair, source="hub", revision=folder.name, **settings)


def _hub_config(repo: str, revision: str, offline: bool, progress: Progress | None, name: str) -> ModelFiles:
    """A repository as it is in the shared cache where it is whole there, else its config.json."""
    from kvrun.hub import remote

    if remote.cached_snapshot(repo, revision) is not None:
        return _hub(repo, None, revision, True, progress, name, {})
    repair = f"kvrun pull {name}"
    path = remote.cached_file(repo, "config.json", revision)
    if path is None:
        _refuse_offline(offline, name, repair)
        path = remote.fetch_file(repo, "config.json", revision, progress)
    return open_config(path.parent, name, repair=repair, source="hub", revision=path.parent.name)


def _refuse_offline(offline: bool, name: str, repair: str) -> None:
    from kvrun.hub.remote import offline_by_environment

    if offline or offline_by_environment():
        raise NotFoundError(f"{name}: not on this machine (looked for offline); '{repair}' fetches it")
