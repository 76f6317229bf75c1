"""models.toml: the aliases that ship with kvrun, and the user's own on top."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from kvrun.errors import NotFoundError, StorageError, UsageError, show

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*)==([\w.!+-]+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_FILE = 1 << 20
# of a sampling table: name -> (lowest, highest, type)
_SAMPLING = {"temperature": (0.0, 10.0, float), "top_p": (0.0, 1.0, float), "min_p": (0.0, 1.0, float),
             "top_k": (0, 1 << 20, int), "repetition_penalty": (0.01, 10.0, float)}


@dataclass(frozen=True)
class Part:
    """One piece of a packaged file: `member` of the wheel of `requirement` (NAME==VERSION)."""

    requirement: str
    member: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """A GGUF file carried by wheels: the parts, in order, concatenated. size in bytes."""

    file: str
    size: int
    sha256: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Alias:
    """A short name for a model, with the defaults that suit it."""

    name: str
    description: str = ""
    licence: str | None = None
    repo: str | None = None
    revision: str = "main"
    path: str | None = None
    package: Package | None = None
    gated: bool = False
    n_ctx: int | None = None
    sampling: dict = field(default_factory=dict)


_LINK = re.compile(r"(https?://)?(hf\.co|huggingface\.co)/(?P<repo>[\w.-]+/[\w.-]+?)(/.*)?")


@dataclass(frozen=True)
class Catalog:
    """aliases: by name. default: the one that a command without MODEL takes."""

    aliases: dict[str, Alias]
    default: str

    def nearest(self, name: str) -> NotFoundError:
        """The error for a name that is none, offering the closest ones."""
        from difflib import get_close_matches

        near = get_close_matches(name.lower(), self.aliases, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "'kvrun ls --aliases' lists the aliases"
        if link := _LINK.fullmatch(name):
            hint = f"write {link['repo']}"
        return NotFoundError(f"{name}: no alias, folder, org/name or .gguf file of that name; {hint}")


def user_file() -> Path:
    """Where the user's own models.toml would be."""
    import platformdirs

    return Path(platformdirs.user_config_dir("kvrun", appauthor=False)) / "models.toml"


def shipped_file() -> Path:
    """The models.toml that came with kvrun: in the package when installed, at the top of a source tree."""
    installed = Path(__file__).with_name("models.toml")
    return installed if installed.is_file() else Path(__file__).parents[2] / "models.toml"


def load_catalog() -> Catalog:
    """Both files, the user's winning name by name. UsageError naming file, alias and key for anything malformed."""
    shipped, mine = _read(shipped_file()), user_file()
    own = _read(mine) if mine.is_file() else Catalog({}, "")
    aliases = shipped.aliases | own.aliases
    default = own.default or shipped.default
    if default not in aliases:
        raise UsageError(f"{mine}: default = {show(default)}, but there is no such model")
    return Catalog(aliases, default)


def _read(path: Path) -> Catalog:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_FILE + 1)
        if len(raw) > _MAX_FILE:
            raise UsageError(f"{path}: more than {_MAX_FILE >> 20} MiB, no list of models is that large")
        data = tomllib.loads(raw.decode())
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:           # a number of thousands of digits is no TOMLDecodeError
        raise UsageError(f"{path}: not valid TOML: {str(e)[:200]}") from None
    top = _Table(path, "", data)
    default = top.take("default", str, "")
    models = top.take("models", dict, {})
    top.done()
    return Catalog({name: _alias(_Table(path, f"models.{name if len(name) <= 64 else show(name)}", entry), name) for name, entry in models.items()}, default)


class _Table:
    """Takes typed values out of a TOML table; what is left at the end is a mistake."""

    def __init__(self, path: Path, where: str, data):
        self.path, self.where = path, where
        if not isinstance(data, dict):
            raise UsageError(f"{path}: {where} is not a table")
        self.data = dict(data)

    def fail(self, what: str) -> UsageError:
        return UsageError(f"{self.path}: {self.where + ': ' if self.where else ''}{what}")

    def take(self, key: str, kind: type, default=..., check=None):
        """The value under `key`; `check`: a pattern that a string must match in full, or a test."""
        value = self.data.pop(key, default)
        if value is ...:
            raise self.fail(f"{key} is missing")
        if value is default:
            return value
        if kind is float and type(value) is int and value.bit_length() <= 128:
            value = float(value)
        if type(value) is not kind:
            raise self.fail(f"{key} must be a {kind.__name__}, not {show(value)}")
        if check and not (check.fullmatch(value) if isinstance(check, re.Pattern) else check(value)):
            raise self.fail(f"{key} = {show(value)} is not valid")
        return value

    def done(self) -> None:
        if self.data:
            raise self.fail(f"unknown key {show(next(iter(self.data)))}")


def _alias(t: _Table, name: str) -> Alias:
    if not _NAME.fullmatch(name) or name.endswith(".gguf"):
        raise t.fail("a name is lower-case letters, digits, '.', '_' and '-'")
    package = t.take("package", dict, None)
    sampling = _Table(t.path, f"{t.where}.sampling", t.take("sampling", dict, {}))
    alias = Alias(
        name=name,
        description=t.take("description", str, ""),
        licence=t.take("licence", str, None),
        repo=t.take("repo", str, None, _REPO),
        revision=t.take("revision", str, "main", lambda v: bool(v.strip())),
        path=t.take("path", str, None),
        package=_package(_Table(t.path, f"{t.where}.package", package)) if package is not None else None,
        gated=t.take("gated", bool, False),
        n_ctx=t.take("n_ctx", int, None, lambda v: v > 0),
        sampling={k: sampling.take(k, kind, check=lambda v, lo=lo, hi=hi: lo <= v <= hi)
                  for k, (lo, hi, kind) in _SAMPLING.items() if k in sampling.data},
    )
    t.done()
    sampling.done()
    if not (alias.repo or alias.path or alias.package):
        raise t.fail("needs repo, path or package")
    return alias


def _plain(name: str) -> bool:
    return name not in (".", "..") and not set(name) & set("/\\\0") and bool(name)


def _inside(name: str) -> bool:
    return all(_plain(p) for p in name.split("/")) and str(PurePosixPath(name)) == name


def _package(t: _Table) -> Package:
    parts = []
    for i, entry in enumerate(t.take("parts", list, check=bool)):
        p = _Table(t.path, f"{t.where}.parts[{i}]", entry)
        parts.append(Part(p.take("requirement", str, check=_REQUIREMENT), p.take("member", str, check=_inside),
                          p.take("size", int, check=lambda v: v > 0), p.take("sha256", str, check=_SHA256)))
        p.done()
    package = Package(t.take("file", str, check=lambda v: _plain(v) and v.endswith(".gguf")), t.take("size", int),
                      t.take("sha256", str, check=_SHA256), tuple(parts))
    t.done()
    if package.size != sum(p.size for p in parts):
        raise t.fail("size is not the sum of the parts'")
    return package
