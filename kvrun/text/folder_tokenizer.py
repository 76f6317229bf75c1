"""A tokenizer from a Hugging Face folder.

tokenizer.json is taken as it is, by the tokenizers library; tokenizer_config.json and the older files beside it say
what it leaves open: the names of special tokens, further ones, and the chat template.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvrun.errors import ModelError, StorageError, show
from kvrun.hub.folder import read_json
from kvrun.text.tokenizer import MAX_ADDED, Decoding, Tokenizer, turn_ends
from kvrun.text.tokenizer_guard import why_not

_MAX_JSON = 64 << 20            # bytes; the largest known tokenizer.json has about 35 MB
_MAX_ID = 10                    # digits
_SURROGATE = re.compile("[\ud800-\udfff]")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_SAMPLE = "a B\n 1é日🎉"         # encoded once, so that a tokenizer that panics does so while the model loads
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class _Folder:
    path: Path
    repair: str

    def broken(self, name: str, what: str) -> ModelError:
        return ModelError(f"{self.path / name}: {what}; {self.repair}")

    def json(self, name: str) -> dict:
        """A file's object, {} if there is no such file."""
        try:
            return read_json(self.path / name, self.repair) if (self.path / name).exists() else {}
        except OSError as e:
            raise self.broken(name, f"cannot be read: {e.strerror}") from None

    def guarded(self, call: Callable):
        """The result of a call of the tokenizers library. What it raises, a panic of its Rust side included, becomes a
        ModelError, and Rust's own account of a panic is kept off standard error."""
        try:
            with _held_stderr():
                return call()
        except Exception as e:
            raise self._unusable(e) from None
        except BaseException as e:
            if not _is_panic(e):
                raise
            raise self._unusable(e) from None

    def _unusable(self, e: BaseException) -> ModelError:
        return self.broken("tokenizer.json", f"the tokenizer cannot be used: {' '.join(str(e).split())[:300]}")


def from_folder(path: Path, repair: str = "fetch it again") -> Tokenizer:
    """ModelError if the folder has no usable tokenizer.json, or one that the tokenizers library cannot carry out.

    repair: what to do then, as the end of its message.
    """
    folder = _Folder(Path(path), repair)
    path = folder.path / "tokenizer.json"
    if not path.is_file():
        older = " (only the older tokenizer.model)" if (folder.path / "tokenizer.model").is_file() else ""
        raise folder.broken(".", f"no tokenizer.json{older}, which kvrun reads")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON + 1)
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e.strerror}") from None
    if len(data) > _MAX_JSON:
        raise folder.broken(path.name, f"more than {_MAX_JSON >> 20} MiB, and no tokenizer is that large")
    if (why := why_not(data)) is not None:
        raise folder.broken(path.name, f"the tokenizer cannot be used: {why}")
    config, older = folder.json("tokenizer_config.json"), folder.json("special_tokens_map.json")
    from tokenizers import Tokenizer as Library
    library = folder.guarded(lambda: Library.from_buffer(data))
    library.no_truncation()
    library.no_padding()
    names = {name: content for name in _NAMES if (content := _content(config.get(name, older.get(name)))) is not None}
    _add_tokens(library, folder, config, older, names)
    decoder = library.get_added_tokens_decoder()
    special = {token.content: i for i, token in decoder.items() if token.special}
    prefix = _prefix(library, folder)
    ends = turn_ends(special)
    if (eos := library.token_to_id(names.get("eos_token", ""))) is not None:
        ends |= {eos}
    return Tokenizer(
        _LibraryEncoder(library, folder), _decoding(library, folder), library.id_to_token,
        max([library.get_vocab_size(), *(i + 1 for i in decoder)]), special,
        tuple(token.content for token in decoder.values() if not token.special), prefix, names, ends,
        _templates(folder, config))


class _LibraryEncoder:
    def __init__(self, library, folder: _Folder):
        self._library, self._folder = library, folder
        self._marked: tuple[tuple, object] | None = None

    def encode(self, text: str, special: bool = False) -> list[int]:
        self._library.encode_special_tokens = not special
        return self._folder.guarded(lambda: self._library.encode(text, add_special_tokens=False).ids)

    def encode_marked(self, text: str, stand_ins: dict[str, str], plain: Set[str]) -> list[int]:
        """A copy of the tokenizer learns the stand-ins; that costs as much as loading it, once for each set of them."""
        from tokenizers import AddedToken, Tokenizer as Library
        key = tuple(sorted(stand_ins.items())), frozenset(plain)
        if self._marked is None or self._marked[0] != key:
            copy = self._folder.guarded(lambda: Library.from_str(self._library.to_str()))
            known = {token.content: token for token in copy.get_added_tokens_decoder().values()}
            # Special tokens are not matched below, so a token that must stay text is made one.
            copy.add_special_tokens([token for content, token in known.items() if content in plain])
            for mark, token in stand_ins.items():
                like = known[token]
                copy.add_tokens([AddedToken(mark, lstrip=like.lstrip, rstrip=like.rstrip, normalized=False)])
            copy.encode_special_tokens = True
            self._marked = key, copy
        copy = self._marked[1]
        back = {copy.token_to_id(mark): self._library.token_to_id(token) for mark, token in stand_ins.items()}
        return [back.get(i, i) for i in self._folder.guarded(lambda: copy.encode(text, add_special_tokens=False).ids)]


def _add_tokens(library, folder: _Folder, config: dict, older: dict, names: dict[str, str]) -> None:
    """Tokens that only tokenizer_config.json lists, and those it calls special (as transformers adds them)."""
    from tokenizers import AddedToken
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        if len(listed) > MAX_ADDED:
            raise folder.broken("tokenizer_config.json", f"{len(listed)} added tokens; at most {MAX_ADDED} are taken")
        for key, entry in sorted(listed.items(), key=lambda item: _number(item[0])):
            content = _content(entry)
            if _number(key) < 0 or not isinstance(entry, dict) or content is None:
                raise folder.broken("tokenizer_config.json", f"damaged: added token {show(key)}")
            if library.token_to_id(content) is None:
                flags = {flag: bool(entry.get(flag)) for flag in _FLAGS}
                library.add_tokens([AddedToken(content, **flags)])
                if library.token_to_id(content) != int(key):
                    raise folder.broken("tokenizer.json", f"has no token {show(content)}, which tokenizer_config.json "
                                                          f"gives the id {key}")
    more = [*names.values()]
    for source in (config, older):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            value = source.get(key)
            value = value.values() if isinstance(value, dict) else value
            if isinstance(value, (list, tuple, type({}.values()))):
                more += filter(None, map(_content, value))
    known = {token.content: token for token in library.get_added_tokens_decoder().values()}
    library.add_special_tokens([known.get(content, AddedToken(content, normalized=False, special=True))
                                for content in dict.fromkeys(more) if library.token_to_id(content) is not None])


def _prefix(library, folder: _Folder) -> tuple[int, ...]:
    """What the file's post-processor puts before a prompt. What it puts behind (an EOS of a T5, say) would end the
    prompt, and is left out. tokenizer_config.json's add_bos_token counts for nothing beside a tokenizer.json, as in
    transformers 5."""
    def probe() -> tuple[int, ...]:
        bare = library.encode(_SAMPLE, add_special_tokens=False).ids
        whole = library.encode(_SAMPLE).ids
        library.decode(whole)
        at = next((i for i in range(len(whole)) if whole[i:i + len(bare)] == bare), 0)
        return tuple(whole[:at])
    return folder.guarded(probe)


def _decoding(library, folder: _Folder) -> Decoding:
    state = json.loads(library.decoder.__getstate__()) if library.decoder is not None else {"type": None}
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Decoding(byte_level=True)
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0].get("pattern") == {"String": "\u2581"}:
        strips = steps[3:]
        at_start = all(s["type"] == "Strip" and s["content"] == " " and not s["stop"] for s in strips)
        if steps[0]["content"] == " " and at_start:
            return Decoding(byte_level=False, strip=sum(s["start"] for s in strips))
    raise ModelError(f"{folder.path / 'tokenizer.json'}: decoder {' + '.join(map(str, kinds))} is not supported; "
                     "kvrun reads byte-level and SentencePiece ones")


def _templates(folder: _Folder, config: dict) -> dict[str, str]:
    """chat_template.jinja and additional_chat_templates/, else tokenizer_config.json, else chat_template.json."""
    files = {"default": folder.path / "chat_template.jinja"} if (folder.path / "chat_template.jinja").is_file() else {}
    files |= {path.stem: path for path in sorted((folder.path / "additional_chat_templates").glob("*.jinja"))}
    if files:
        try:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except (OSError, UnicodeDecodeError) as e:
            raise folder.broken("chat_template.jinja", f"a chat template cannot be read: {e}") from None
    for value in (config.get("chat_template"), folder.json("chat_template.json").get("chat_template")):
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, list):
            try:
                return {str(entry["name"]): str(entry["template"]) for entry in value}
            except (TypeError, KeyError):
                raise folder.broken("tokenizer_config.json", "damaged: chat_template") from None
    return {}


def _content(token) -> str | None:
    """A special token of a config: a string, or an object with its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token and not _SURROGATE.search(token) else None


def _number(key: str) -> int:
    """The id that a key spells, -1 for none."""
    return int(key) if key.isascii() and key.isdecimal() and len(key) <= _MAX_ID else -1


def _is_panic(e: BaseException) -> bool:
    return type(e).__name__ == "PanicException"         # of pyo3_runtime, which cannot be imported; no Exception


@contextmanager
def _held_stderr():
    """Holds back what is written to descriptor 2; it comes out at the end, unless a panic ends it."""
    try:
        kept = os.dup(2)
    except OSError:                     # no standard error
        yield
        return
    with open(os.memfd_create("stderr"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as e:
            panicked = _is_panic(e)
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            if not panicked:
                held.seek(0)
                if data := held.read():
                    os.write(2, data)
