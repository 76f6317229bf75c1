"""What can be said of a model without loading it, and what is on this machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from kvrun.hub.cache import cached_models
from kvrun.hub.catalog import Catalog
from kvrun.hub.files import ModelFiles
from kvrun.hub.folder import read_json
from kvrun.hub.store import package_path, store_dir

_F16_BYTES = 2


@dataclass(frozen=True)
class Facts:
    """A model as `kvrun show` tells it. parameters: elements of all tensors. dtypes: stored kind -> elements.

    window: positions a sliding layer sees, 0 without one. kv_bytes_per_token: K and V of one token in all layers in 16
    bits; kv_bytes_per_token_full: of the full-attention layers alone, all that grows with the context.
    """

    name: str
    source: str
    path: str
    revision: str | None
    licence: str | None
    architecture: str
    parameters: int
    dtypes: dict[str, int]
    file_bytes: int
    layers: int
    sliding_layers: int
    window: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    n_ctx: int | None
    tokenizer: str
    chat_template: bool
    kv_bytes_per_token: int
    kv_bytes_per_token_full: int
    sampling: dict


def facts(files: ModelFiles) -> Facts:
    """Reads headers only. ModelError."""
    from kvrun.models import load_spec
    from kvrun.weights import open_source

    spec = load_spec(files.config, str(files.path))
    source = open_source(files)
    try:
        dtypes: Counter[str] = Counter()
        for name in source.names():
            dtypes[source.stored(name)] += prod(source.info(name)[1])
    finally:
        source.close()
    sliding = [layer.window for layer in spec.layers if layer.window]
    a_layer = 2 * spec.kv_heads * spec.head_dim * _F16_BYTES
    tokenizer, template = _gguf_text(files) if files.kind == "gguf" else _folder_text(files)
    return Facts(
        name=files.name, source=files.source, path=str(files.path), revision=files.revision, licence=files.licence,
        architecture=spec.architecture, parameters=dtypes.total(), dtypes=dict(dtypes.most_common()),
        file_bytes=_bytes(files.path), layers=len(spec.layers), sliding_layers=len(sliding), window=max(sliding, default=0),
        hidden=spec.hidden, ffn=spec.ffn, heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim,
        vocab_size=spec.vocab_size, context=spec.n_positions, n_ctx=files.n_ctx, tokenizer=tokenizer,
        chat_template=template, kv_bytes_per_token=a_layer * len(spec.layers),
        kv_bytes_per_token_full=a_layer * (len(spec.layers) - len(sliding)), sampling=files.sampling)


def has_template(files: ModelFiles) -> bool:
    """Whether the model comes with a chat template. Reads headers only."""
    return (_gguf_text(files) if files.kind == "gguf" else _folder_text(files))[1]


def _gguf_text(files: ModelFiles) -> tuple[str, bool]:
    meta = files.gguf.metadata
    kind, pre = meta.get("tokenizer.ggml.model", "none"), meta.get("tokenizer.ggml.pre")
    return f"{kind} ({pre})" if pre else str(kind), "tokenizer.chat_template" in meta


def _folder_text(files: ModelFiles) -> tuple[str, bool]:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    tokenizer = next((n for n in names if (files.path / n).exists()), "none")
    template = any((files.path / n).exists() for n in ("chat_template.jinja", "chat_template.json"))
    if not template and (config := files.path / "tokenizer_config.json").exists():
        template = bool(read_json(config, files.repair).get("chat_template"))
    return tokenizer, template


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.iterdir() if p.is_file())


@dataclass(frozen=True)
class Local:
    """A model on this machine. aliases: names of the catalog that mean it. format: "gguf", "safetensors" or
    "incomplete". source: "package" or "hub"."""

    name: str
    aliases: tuple[str, ...]
    n_bytes: int
    format: str
    source: str
    path: str
    revision: str | None = None


def local_models(catalog: Catalog) -> list[Local]:
    """What the store and the shared Hub cache hold."""
    aliases = catalog.aliases.values()
    store = store_dir()
    known = {package_path(a.package).parent.name: a for a in aliases if a.package}
    out = []
    for folder in sorted(p for p in store.glob("*") if p.is_dir()):
        alias = known.get(folder.name)
        whole = [p for p in folder.glob("*.gguf")]
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        if size:
            out.append(Local(alias.name if alias else folder.name, (alias.name,) if alias else (), size,
                             "gguf" if whole else "incomplete", "package", str(folder)))
    for model in cached_models():
        ref = "main" if "main" in model.refs else model.refs[0] if model.refs else model.commit
        names = tuple(a.name for a in aliases
                      if not model.file and a.repo == model.repo and a.revision in (*model.refs, model.commit))
        name = f"{model.repo}/{model.file}" if model.file else model.repo
        out.append(Local(name if ref == "main" else f"{name}@{ref}", names, model.n_bytes,
                         "gguf" if model.file else "safetensors", "hub", str(model.path), model.commit))
    return out
