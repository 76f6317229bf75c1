"""The Hugging Face Hub, through its own client and into its shared cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gaierror

from kvrun.errors import AccessError, KvrunError, ModelError, NotFoundError, StorageError
from kvrun.hub.cache import discard, hub_cache, is_whole, repo_folder, snapshot_folder, weight_files
from kvrun.hub.files import Progress
from kvrun.hub.store import storage_error, watching

# everything a model needs but its weights; fetched first, so that a snapshot with all weights is whole
_SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
          "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
          "chat_template.json", "additional_chat_templates/*.jinja", "model.safetensors.index.json"]
_TIMEOUT = 10.0  # seconds for the first answer; later ones follow HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT


def offline_by_environment() -> bool:
    """HF_HUB_OFFLINE, as the Hub's client reads it."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE


def cached_snapshot(repo: str, revision: str) -> Path | None:
    """The snapshot folder of a model that is whole in the cache, else None. Opens no socket."""
    folder = snapshot_folder(repo, revision)
    return folder if folder and is_whole(folder) else None


def cached_file(repo: str, file: str, revision: str) -> Path | None:
    """A file of a cached snapshot, else None. Opens no socket."""
    folder = snapshot_folder(repo, revision)
    return folder / file if folder and (folder / file).is_file() else None


def commit_of(path: Path, repo: str) -> str:
    """The commit whose snapshot `path` lies in."""
    return path.relative_to(repo_folder(repo) / "snapshots").parts[0]


def fetch_snapshot(repo: str, revision: str, progress: Progress | None = None, check: bool = False) -> Path:
    """The snapshot folder of `repo` at `revision`, with what a model needs and nothing else; what is there already is
    not fetched again. What arrives is checked against its sha256.

    check: hash what is there too, and fetch it again where it is damaged.
    Errors: AccessError (licence or token), NotFoundError (repository, revision, no connection), ModelError (pickles
    only, damaged), StorageError (disk).
    """
    with _client(repo, revision) as hub:
        listing = _listing(hub, repo, revision)
        names = set(listing.files)
        if "config.json" not in names:
            hint = f"; name one of its GGUF files: {repo}/{_a_gguf(names)}" if _a_gguf(names) else ""
            raise ModelError(f"{repo}: no config.json, so no model in the Hugging Face layout{hint}")
        if not any(n.endswith(".safetensors") for n in names):
            raise ModelError(f"{repo}: no safetensors, only pickled weights, which can run code when read; "
                             "look for a conversion (or another --revision) with *.safetensors")
        small = [n for n in names if any(_matches(n, pattern) for pattern in _SMALL)]
        _download(hub, repo, revision, listing, small, None, check)
        folder = snapshot_folder(repo, listing.commit)
        if folder is None:
            raise NotFoundError(f"{repo}@{revision}: changed while it was fetched; try again")
        weights = weight_files(folder) if "model.safetensors" not in names else ["model.safetensors"]
        if "model.safetensors.index.json" not in names and "model.safetensors" not in names:
            weights = [n for n in names if n.endswith(".safetensors") and "/" not in n]
        if not weights or ("model.safetensors.index.json" not in names and len(weights) > 1):
            raise ModelError(f"{repo}: neither model.safetensors nor an index that says which of its files make a model")
        for name in weights:
            if name not in names:
                raise ModelError(f"{repo}: the index names {name!r}, which the repository does not have")
        _download(hub, repo, listing.commit, listing, weights, progress, check)
    return folder


def fetch_file(repo: str, file: str, revision: str, progress: Progress | None = None, check: bool = False) -> Path:
    """One file of a repository (a GGUF). Errors as fetch_snapshot."""
    with _client(repo, revision) as hub:
        listing = _listing(hub, repo, revision)
        if file not in listing.files:
            raise NotFoundError(f"{repo}@{revision}: has no file {file}")
        _download(hub, repo, revision, listing, [file], progress, check)
    return snapshot_folder(repo, listing.commit) / file


class _Listing:
    """A repository at one commit. files: name -> (size, checksum: sha256 for large files, git's blob id for others)."""

    def __init__(self, info):
        self.commit: str = info.sha
        # names become paths below the cache: one that would leave it is as good as absent
        self.files = {s.rfilename: (s.size or 0, s.lfs["sha256"] if s.lfs else s.blob_id)
                      for s in info.siblings or [] if all(p.strip(".") for p in s.rfilename.split("/"))}


def _listing(hub, repo: str, revision: str) -> _Listing:
    return _Listing(hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT))


def _matches(name: str, pattern: str) -> bool:
    head, star, tail = pattern.partition("*")
    return name == pattern if not star else (
        name.startswith(head) and name.endswith(tail) and "/" not in name[len(head):])


def _a_gguf(names: set[str]) -> str | None:
    found = sorted(n for n in names if n.endswith(".gguf"))
    return found[0] if found else None


def _download(hub, repo: str, revision: str, listing: _Listing, names: list[str], progress: Progress | None,
              check: bool) -> None:
    """Has `names` in the snapshot, each checked if it was fetched now (or `check`)."""
    from kvrun.hub.blobs import fetch_blob, is_large
    from kvrun.hub.verify import checksum_ok

    blobs = repo_folder(repo) / "blobs"
    snapshot = repo_folder(repo) / "snapshots" / listing.commit
    fresh = []
    for name in names:
        here = snapshot / name
        if here.is_file() and not (check and not checksum_ok(here, listing.files[name][1], progress)):
            continue
        if here.exists():
            discard(here)
        fresh.append(name)
    if not fresh and revision == listing.commit:
        return
    total = sum(listing.files[n][0] for n in fresh)
    sums = [listing.files[n][1] for n in fresh]
    label = f"fetching {repo}"
    with watching(lambda: _arrived(blobs, sums), label, total, progress if fresh else None):
        large = [name for name in fresh if is_large(*listing.files[name])]
        for name in large:
            fetch_blob(hub, repo, listing.commit, name, *listing.files[name])
        # the names are literal, but the client takes patterns
        hub.snapshot_download(repo, revision=revision, allow_patterns=[_literal(n) for n in names] or ["config.json"])
    if progress and fresh:
        progress(label, total, total)
    for name in fresh:
        here = snapshot / name
        if not here.is_file():
            raise NotFoundError(f"{repo}@{revision}: {name} did not arrive; try again")
        if name in large and here.resolve().name == listing.files[name][1]:
            continue  # checked before it got that name
        if not checksum_ok(here, listing.files[name][1], progress):
            discard(here)
            raise ModelError(f"{repo}: {name} arrived damaged (its checksum is wrong) and was removed; "
                             f"kvrun pull {repo} fetches it again")


def _arrived(blobs: Path, sums: list[str]) -> int:
    """Bytes of these blobs on disk, finished or growing."""
    return sum(max((p.stat().st_size for p in blobs.glob(f"{s}*")), default=0) for s in sums)


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


@contextmanager
def _client(repo: str, revision: str) -> Iterator:
    """The huggingface_hub module, quiet, its errors mapped to ours. No message of ours carries a token."""
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()
    url = re.sub(r"://[^/\s@]+@", "://", f"{constants.ENDPOINT}/{repo}")  # an endpoint may carry a password
    try:
        yield hub
    except KvrunError:
        raise
    except Exception as e:
        error = _mapped(e, repo, revision, url)
        if error is None:
            raise
        raise error from e


def _mapped(e: Exception, repo: str, revision: str, url: str) -> KvrunError | None:
    from huggingface_hub import errors

    for cause in _causes(e):
        if isinstance(cause, errors.GatedRepoError):
            return AccessError(f"{repo}: gated; accept its licence at {url}, then log in (hf auth login, or HF_TOKEN)")
        if isinstance(cause, errors.RepositoryNotFoundError):
            return NotFoundError(f"{repo}: no such repository at {url}, or it is private and no token was given "
                                 "(hf auth login, or HF_TOKEN)")
        if isinstance(cause, errors.RevisionNotFoundError):
            return NotFoundError(f"{repo}: no revision {revision!r} at {url}")
        if isinstance(cause, errors.HfHubHTTPError):
            status = getattr(cause.response, "status_code", None)
            if status in (401, 403):
                return AccessError(f"{repo}: the Hub refused access ({status}) to {url}; "
                                   "check the token (hf auth login, or HF_TOKEN) and that the licence is accepted")
            later = "; try again later, what has arrived is kept" if status == 429 or (status or 0) >= 500 else ""
            return NotFoundError(f"{repo}: the Hub answered {status} for {url}{later}")
        if isinstance(cause, errors.HFValidationError):
            return NotFoundError(f"{repo}: not a repository name")
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, (ConnectionError, TimeoutError)) \
                and type(cause) in (OSError, PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return storage_error(cause, hub_cache())
    if "space" in str(e).lower() and "disk" in str(e).lower():
        return StorageError(f"{hub_cache()}: no space left on the disk for {repo}")
    if isinstance(e, (OSError, errors.EntryNotFoundError)) or type(e).__module__.partition(".")[0].startswith(
            ("httpx", "httpcore", "requests", "urllib3")):
        first = _causes(e)[-1]
        endpoint, why = os.path.dirname(os.path.dirname(url)), getattr(first, "strerror", None) or type(first).__name__
        if any("Connect" in type(cause).__name__ or isinstance(cause, (ConnectionError, gaierror)) for cause in _causes(e)):
            return NotFoundError(f"{repo}: the Hub cannot be reached at {endpoint} ({why}); --offline uses only what is on this machine")
        return NotFoundError(f"{repo}: the download from {endpoint} broke off ({why}); try again, what has arrived is kept")
    return None


def _causes(e: BaseException) -> list[BaseException]:
    out: list[BaseException] = []
    while e is not None and e not in out and not isinstance(e, KvrunError):  # those are of an earlier source
        out.append(e)
        e = e.__cause__ or e.__context__
    return out
