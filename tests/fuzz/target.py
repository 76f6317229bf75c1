"""What a fuzz target is, and a place for its files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from kvrun.errors import KvrunError

CORPUS = Path(__file__).with_name("corpus")
LONGEST = 4000
"""Characters of a message: an error is one line that a person reads."""


@dataclass(frozen=True)
class Target:
    """One reader of foreign bytes. read: is given the bytes; whatever it raises but `refuses` is a finding. refuses: how the product says no.
    kind: of mutate.mutate. made: valid inputs that only this build can make; the others are in the corpus."""

    name: str
    read: Callable[[bytes], None]
    refuses: tuple[type[KvrunError], ...]
    kind: str
    made: Callable[[], list[bytes]] = field(default=list)

    def __call__(self, data: bytes) -> bool:
        """Whether the bytes were taken. A refusal must be readable."""
        try:
            self.read(data)
            return True
        except self.refuses as error:
            assert 0 < len(str(error)) <= LONGEST, f"a message of {len(str(error))} characters"
            return False

    def corpus(self) -> dict[str, bytes]:
        """Name -> input: what is kept for this target, and what `made` makes."""
        kept = {path.name: path.read_bytes() for path in sorted((CORPUS / self.name).iterdir())} if (CORPUS / self.name).is_dir() else {}
        return kept | {f"made-{i}": data for i, data in enumerate(self.made())}


@cache
def _root() -> Path:
    """A folder of this process, in memory where that can be: a target writes a file each time."""
    import atexit

    fast = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="kvrun-fuzz-", dir=fast if fast.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def place(name: str) -> Path:
    """The folder of that name, there."""
    folder = _root() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
