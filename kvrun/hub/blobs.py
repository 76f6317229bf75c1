"""Large files of a Hub repository, fetched into the shared cache so that an interrupted download goes on where it stopped.

huggingface_hub gives each download a file of its own, which is gone when it is interrupted, and an interrupted snapshot_download first
waits until its threads have fetched what they are at. So large files are fetched here, with the client's own http_get but in the main
thread, into one growing file per blob, under the client's own lock. The client then finds the blob and links to it.
"""

from __future__ import annotations

import os

from kvrun.errors import ModelError
from kvrun.hub.cache import hub_cache, repo_folder
from kvrun.hub.files import Progress


def is_large(size: int, checksum: str) -> bool:
    """Whether a file is one of those: kept by its sha256, and not beyond what the Hub gives out over plain HTTP."""
    from huggingface_hub import constants

    return len(checksum) == 64 and size <= constants.MAX_HTTP_DOWNLOAD_SIZE


def fetch_blob(hub, repo: str, commit: str, name: str, size: int, sha256: str, progress: Progress | None = None) -> None:
    """Has the file `name` of `repo`, which has `size` bytes, as the blob `sha256`. It appears whole and checked, or not at all.
    Errors: as the client raises them; ModelError for bytes that are not those."""
    from huggingface_hub.utils import WeakFileLock

    from kvrun.hub.verify import checksum_ok

    blob = repo_folder(repo) / "blobs" / sha256
    lock = hub_cache() / ".locks" / blob.parent.parent.name / f"{sha256}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            if checksum_ok(blob, sha256, progress):
                return
            blob.unlink()
        growing = blob.with_name(f"{sha256}.kvrun.incomplete")
        resumed = growing.exists() and growing.stat().st_size > 0
        _grow(hub, repo, commit, name, size, growing)
        whole = checksum_ok(growing, sha256, progress)
        if resumed and not whole:  # maybe what an earlier try had left was wrong
            growing.unlink()
            _grow(hub, repo, commit, name, size, growing)
            whole = checksum_ok(growing, sha256, progress)
        if not whole:
            growing.unlink()
            raise ModelError(f"{repo}: {name} arrived damaged (its checksum is wrong) and was removed; kvrun pull {repo} fetches it again")
        os.replace(growing, blob)


class _Bounded:
    """A file that takes no more than `size` bytes: a server may send for ever."""

    def __init__(self, file, size: int) -> None:
        self._file, self._size = file, size

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._size:
            raise OSError("Consistency check failed: more arrives than the file has")
        return self._file.write(data)


def _grow(hub, repo: str, commit: str, name: str, size: int, growing) -> None:
    """Appends what is missing, and has it on the disk."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    with open(growing, "ab") as out:
        if out.tell() > size:
            out.seek(0)
            out.truncate()
        url = hub.hf_hub_url(repo, name, revision=commit)
        try:
            http_get(url, _Bounded(out, size), resume_size=out.tell(), headers=build_hf_headers(), expected_size=size, displayed_filename=name)
        except OSError as error:
            if "Consistency check failed" in str(error):
                out.truncate(0)
                raise ModelError(f"{repo}: {name} arrived with another size than the Hub says it has, and was removed; "
                                 f"kvrun pull {repo} fetches it again") from error
            raise
        out.flush()
        os.fsync(out.fileno())
