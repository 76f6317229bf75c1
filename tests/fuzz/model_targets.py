"""Everything that a model brings along: weights, index, configs, tokenizer, template, GGUF; and models.toml."""

from __future__ import annotations

from math import prod

import kvrun.models.decoder
import kvrun.models.tensors
import kvrun.text.detokenizer
import kvrun.text.folder_tokenizer
import kvrun.text.gguf_tokenizer
import kvrun.text.guard
import kvrun.text.lazy_bpe  # noqa: F401 - loaded here, so that the fuzzer sees their branches
from kvrun.blueprint import Blueprint, Shape
from kvrun.cli.options import SamplingOptions, build_sampler
from kvrun.errors import ModelError, NotFoundError, OutOfMemoryError, StorageError, UsageError
from kvrun.hub.catalog import _read as read_catalog
from kvrun.hub.facts import facts, has_template
from kvrun.hub.files import ModelFiles
from kvrun.hub.folder import open_config, open_gguf, read_json
from kvrun.models import check_tensors, load_spec, tensor_refs
from kvrun.text.template import ChatTemplate
from kvrun.text.text import Text
from kvrun.weights import open_source
from kvrun.weights.folder import FolderSource

from .target import CORPUS, Target, place

BAD_MODEL = (ModelError, StorageError, NotFoundError)
_MOST = 1 << 16  # elements of a tensor that is read
_SAID = [{"role": "user", "content": "Hi <|im_end|> there"}, {"role": "assistant", "content": "a\nb"}, {"role": "user", "content": "é 🎉"}]


def _valid(target: str, name: str) -> bytes:
    return (CORPUS / target / name).read_bytes()


# ---- weights ----


def _read_all(source) -> None:
    for name in source.names()[:64]:
        source.stored(name)
        _, shape = source.info(name)
        if prod(shape) <= _MOST:
            tensor = source.read(name)
            assert len(memoryview(tensor.data).cast("B")) >= 0
    source.fingerprint()


def _safetensors(data: bytes) -> None:
    folder = place("safetensors")
    (folder / "model.safetensors").write_bytes(data)
    source = FolderSource(folder)
    try:
        _read_all(source)
    finally:
        source.close()


def _index(data: bytes) -> None:
    folder = place("index")
    if not (folder / "model-00001-of-00002.safetensors").exists():
        for i in (1, 2):
            (folder / f"model-0000{i}-of-00002.safetensors").write_bytes(_valid("safetensors", f"shard{i}"))
    (folder / "model.safetensors.index.json").write_bytes(data)
    source = FolderSource(folder)
    try:
        _read_all(source)
    finally:
        source.close()


# ---- configs ----


def _config(data: bytes) -> None:
    """What `kvrun plan` does with a config.json."""
    folder = place("config")
    (folder / "config.json").write_bytes(data)
    files = open_config(folder, "m")
    with Blueprint(files, Shape("cpu", 2)) as blueprint:
        spec = blueprint.spec
        load_spec(files.config, "config.json", n_ctx=spec.n_positions)
        tensor_refs(spec, files.config, "folder")
        for kv in ("f16", "q8", "q4"):
            n_ctx = min(4096, spec.n_positions)
            assert blueprint.memory(kv, n_ctx).total > 0 or blueprint.format_notice(kv)


def _generation_config(data: bytes) -> None:
    path = place("generation") / "generation_config.json"
    path.write_bytes(data)
    config = read_json(path, "fetch it again")
    sampler = build_sampler(SamplingOptions(), config, {})
    assert 0 <= sampler.temperature < float("inf") and 0 <= sampler.top_p <= 1 and 0 <= sampler.min_p <= 1
    assert 0 < sampler.repeat_penalty < float("inf") and 0 <= sampler.top_k < 2**31
    files = _tokenizer_folder("generation")
    Text(ModelFiles("m", "folder", files, None, {}, config))


# ---- text ----


def _tokenizer_folder(name: str):
    folder = place(name)
    if not (folder / "tokenizer.json").exists():
        (folder / "tokenizer.json").write_bytes(_valid("tokenizer", "byte-level"))
        (folder / "tokenizer_config.json").write_bytes(_valid("tokenizer_config", "plain"))
    return folder


def _use_text(text: Text) -> None:
    for special in (False, True):
        ids = text.encode("a B\n 1é日🎉 <|im_end|></s><s>" + 40 * " a", special=special)
        assert all(type(i) is int and i >= 0 for i in ids)
        decode = text.detokenizer(special=special)
        assert isinstance("".join(map(decode.push, ids)) + decode.flush(), str)
    for i in (0, 1, text.vocab_size - 1, *sorted(text.eos_ids)[:4]):
        text.token_text(i)
        text.token_bytes(i)
    if text.has_template:
        text.encode_chat(_SAID)


def _tokenizer(data: bytes) -> None:
    folder = _tokenizer_folder("tokenizer")
    (folder / "tokenizer.json").write_bytes(data)
    _use_text(Text(ModelFiles("m", "folder", folder, None, {}, {})))


def _tokenizer_config(data: bytes) -> None:
    """As tokenizer_config.json and as the older files beside it."""
    folder = _tokenizer_folder("tokenizer_config")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json"):
        (folder / name).write_bytes(data)
    files = ModelFiles("m", "folder", folder, None, {}, {})
    has_template(files)
    _use_text(Text(files))


def _template(data: bytes) -> None:
    source = data.decode("utf-8", "replace")
    text = ChatTemplate(source, "m").render(_SAID, bos_token="<s>", tools=[{"name": "f", "parameters": {}}])
    assert isinstance(text, str)


def _gguf(data: bytes) -> None:
    """What show, plan and run do before they compute."""
    path = place("gguf") / "model.gguf"
    path.write_bytes(data)
    files = open_gguf(path, "m")
    try:
        failed = None
        for part in (_gguf_text, facts, _gguf_plan, _gguf_tensors):
            try:
                part(files)
            except (*BAD_MODEL, UsageError, OutOfMemoryError) as error:
                failed = error
        if failed:
            raise failed
    finally:
        files.gguf.close()


def _gguf_text(files: ModelFiles) -> None:
    has_template(files)
    build_sampler(SamplingOptions(), files.generation_config, {})
    _use_text(Text(files))


def _gguf_plan(files: ModelFiles) -> None:
    with Blueprint(files, Shape("cpu", 2)) as blueprint:
        blueprint.memory("q4", min(4096, blueprint.spec.n_positions))


def _gguf_tensors(files: ModelFiles) -> None:
    source = open_source(files)
    try:
        _read_all(source)
        spec = load_spec(files.config, "m")
        check_tensors(spec, tensor_refs(spec, files.config, "gguf"), source)
    finally:
        source.close()


# ---- models.toml ----


def _models_toml(data: bytes) -> None:
    path = place("toml") / "models.toml"
    path.write_bytes(data)
    for alias in read_catalog(path).aliases.values():
        assert alias.repo or alias.path or alias.package


TARGETS = [
    Target("safetensors", _safetensors, BAD_MODEL, "binary"),
    Target("index", _index, BAD_MODEL, "json"),
    Target("config", _config, (*BAD_MODEL, UsageError, OutOfMemoryError), "json"),
    Target("generation_config", _generation_config, (*BAD_MODEL, UsageError), "json"),
    Target("tokenizer", _tokenizer, BAD_MODEL, "json"),
    Target("tokenizer_config", _tokenizer_config, BAD_MODEL, "json"),
    Target("template", _template, BAD_MODEL, "binary"),
    Target("gguf", _gguf, (*BAD_MODEL, UsageError, OutOfMemoryError), "binary"),
    Target("models_toml", _models_toml, (UsageError, StorageError), "lines"),
]
