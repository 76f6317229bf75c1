"""A tokenizer from the metadata of a GGUF file.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (tokenizer.ggml.*). Two kinds: byte-level BPE ("gpt2")
and SentencePiece BPE ("llama", Llama-2, Mistral and Gemma alike).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvrun.errors import ModelError, show
from kvrun.text.lazy_bpe import Added, LazyBpe
from kvrun.text.pretokenizers import GPT2, pre_tokenizer
from kvrun.text.tokenizer import MAX_ADDED, MAX_TOKENS, Decoding, Tokenizer, turn_ends

_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4
_SPACE = "\u2581"
_MAX_LONG = 1 << 17      # pieces that every text is searched for; Gemma 3 has 45, SmolLM2 155
_MAX_SPECIAL = 1 << 10   # characters: every cut of the unknown token is looked at
# Converters fill ids that have a row in the embedding but no token with names like these; nobody can type them.
_FILLER = re.compile(r"\[PAD\d+\]")


def byte_alphabet() -> str:
    """The character of each byte 0..255 in byte-level BPE (GPT-2's encoder.py): printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    table.update((b, chr(256 + i)) for i, b in enumerate(b for b in range(256) if b not in table))
    return "".join(table[b] for b in range(256))


def from_gguf(metadata: Mapping, where: str, repair: str = "fetch it again") -> Tokenizer:
    """metadata: of an opened GGUF file. where: the file. ModelError if it has no usable tokenizer.

    repair: what to do with a damaged file, as the end of that error's message.
    """
    meta = _Metadata(metadata, where, repair)
    kind = meta.text("model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{where}: tokenizer kind {show(kind)} is not supported (tokenizer.ggml.model); "
                         "kvrun reads gpt2 and llama")
    tokens, types = meta.strings("tokens"), meta.numbers("token_type")
    if not tokens:
        raise meta.damaged("the vocabulary is empty (tokenizer.ggml.tokens)")
    if len(tokens) > MAX_TOKENS:
        raise meta.damaged(f"a vocabulary of {len(tokens)} tokens; at most {MAX_TOKENS} are taken")
    if types and len(types) != len(tokens):
        raise meta.damaged(f"{len(tokens)} tokens with {len(types)} types")
    odd = [i for i, t in enumerate(types) if t != _NORMAL and not _FILLER.fullmatch(tokens[i])]
    special = {tokens[i]: i for i in odd if types[i] in (_CONTROL, _UNKNOWN)}
    user = {tokens[i]: i for i in odd if types[i] == _USER}
    names, at = {}, {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("sep", "seperator"),
                      ("eot", "eot"), ("eom", "eom")):
        if (i := meta.id(key + "_token_id", len(tokens))) is not None:
            names[name + "_token"], at[name] = tokens[i], i
            special.setdefault(tokens[i], i)
            user.pop(tokens[i], None)
    rstrip = _strips_after(metadata)
    if len(special) + len(user) > MAX_ADDED:
        raise meta.damaged(f"{len(special) + len(user)} special and user-defined tokens; at most {MAX_ADDED} are taken")
    if any(len(tokens[i]) > _MAX_SPECIAL for i in at.values()):
        raise meta.damaged(f"a special token of more than {_MAX_SPECIAL} characters")
    added = {token: Added(i, True, rstrip(token)) for token, i in special.items() if token}
    added.update((token, Added(i, False, rstrip(token))) for token, i in user.items() if token)
    if kind == "gpt2":
        encoder, decoding, add_bos = _byte_level(meta, tokens, added)
    else:
        encoder, decoding, add_bos = _sentencepiece(meta, tokens, types, added, at.get("unk"))
    if encoder.n_long > _MAX_LONG:
        raise meta.damaged(f"{encoder.n_long} tokens that are longer than a word")
    add_bos = meta.flag("add_bos_token", add_bos)
    prefix = (at["bos"],) if add_bos and "bos" in at else ()
    ends = turn_ends(special) | {at[name] for name in ("eos", "eot", "eom") if name in at}
    return Tokenizer(encoder, decoding, lambda id: tokens[id] if 0 <= id < len(tokens) else None, len(tokens), special, tuple(user), prefix,
                     {k: v for k, v in names.items() if k not in ("eot_token", "eom_token")}, ends,
                     _templates(meta))


class _Metadata:
    """Typed looks at tokenizer.ggml.*: a value of the wrong type is a damaged file."""

    def __init__(self, metadata: Mapping, where: str, repair: str):
        self.metadata, self.where, self._repair = metadata, where, repair

    def damaged(self, what: str) -> ModelError:
        return ModelError(f"{self.where}: damaged: {what}; {self._repair}")

    def _get(self, key: str, kinds, default):
        value = self.metadata.get("tokenizer.ggml." + key)
        if value is None:
            return default
        if not isinstance(value, kinds):
            raise self.damaged(f"tokenizer.ggml.{key} is {value!r}"[:200])
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, str, default)
        if value is None:
            raise ModelError(f"{self.where}: has no tokenizer (tokenizer.ggml.{key} is missing)")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, bool, default)

    def id(self, key: str, size: int) -> int | None:
        value = self._get(key, int, None)
        if value is not None and not 0 <= value < size:
            # llama.cpp ignores such ids too: old converters wrote 2**32 - 1 for "none"
            return None
        return value

    def _array(self, key: str, item) -> list:
        value = self.metadata.get("tokenizer.ggml." + key)
        if value is None:
            return []
        if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
            raise self.damaged(f"tokenizer.ggml.{key} is no array")
        items = value if isinstance(value, list) else value[:]
        if items and not isinstance(items[0], item):
            raise self.damaged(f"tokenizer.ggml.{key} holds {type(items[0]).__name__}")
        return items

    def strings(self, key: str) -> list[str]:
        return self._array(key, str)

    def numbers(self, key: str) -> list:
        return self._array(key, (int, float))


def _byte_level(meta: _Metadata, tokens: list[str], added: dict[str, Added]) -> tuple[LazyBpe, Decoding, bool]:
    how = pre_tokenizer(meta.text("pre", "default"), meta.where)
    merges = meta.strings("merges")
    order = dict(zip(merges, range(len(merges))))
    alphabet = byte_alphabet()
    spelling = str.maketrans({chr(b): alphabet[b] for b in range(256)})

    def nfc(text: str) -> str:
        if not how.nfc:
            return text
        from unicodedata import normalize
        return normalize("NFC", text)

    def configure(tokenizer) -> None:
        from tokenizers import Regex, normalizers, pre_tokenizers
        if how.nfc:
            tokenizer.normalizer = normalizers.NFC()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=how.splits[-1] == GPT2)
        splits = how.splits[:-1] if how.splits[-1] == GPT2 else how.splits
        cuts = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])

    encoder = LazyBpe(
        dict(zip(tokens, range(len(tokens)))), added,
        rank=lambda left, right: order.get(f"{left} {right}"),
        normalize=lambda text: nfc(text).encode().decode("latin-1").translate(spelling),
        configure=configure, options={"ignore_merges": how.whole_words}, always=set(alphabet).intersection(tokens))
    return encoder, Decoding(byte_level=True), how.add_bos


def _sentencepiece(meta: _Metadata, tokens: list[str], types: list[int], added: dict[str, Added],
                   unk: int | None) -> tuple[LazyBpe, Decoding, bool]:
    scores = meta.numbers("scores")
    if len(scores) != len(tokens) or not types:
        raise meta.damaged(f"{len(tokens)} tokens with {len(scores)} scores and {len(types)} types")
    # Converters write Gemma's runs of spaces as spaces; its SentencePiece model has U+2581 there, as everywhere.
    ids = dict(zip(tokens, range(len(tokens))))
    for token in [t for t in added if " " in t]:
        added[token.replace(" ", _SPACE)] = added.pop(token)
        ids[token.replace(" ", _SPACE)] = ids.pop(token)
    gemma = str(meta.metadata.get("general.architecture", "")).startswith("gemma")

    def rank(left: str, right: str):
        """Two pieces merge if together they are a piece; the best score first.

        How equal scores fall is no part of SentencePiece, but of the conversion that made the model's tokenizer.json:
        Gemma's (2 and 3: all 514,906 merges of Gemma 3's file come out in its order) take user-defined pieces as score
        0 and the longer left half first, Llama-2's and Mistral's the smaller ids.
        """
        i = ids.get(left + right)
        if i is None:
            return None
        score = 0.0 if types[i] in (_CONTROL, _USER) else scores[i]
        if gemma:
            return -score, -len(left), -len(right), i, ids[left], ids[right]
        return -score, i, ids[left], ids[right]

    prefix = _SPACE if meta.flag("add_space_prefix", True) else ""

    def configure(tokenizer) -> None:
        from tokenizers import normalizers
        space = normalizers.Replace(" ", _SPACE)
        # After every special token too, as Llama-2's own tokenizer.json does and llama.cpp for every such file.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(prefix), space]) if prefix else space

    bytes_ = {f"<0x{b:02X}>" for b in range(256)} & ids.keys()
    options = {"fuse_unk": True, "byte_fallback": len(bytes_) == 256}
    if unk is not None:
        options["unk_token"] = tokens[unk]
    encoder = LazyBpe(ids, added, rank, normalize=lambda text: text.replace(" ", _SPACE), configure=configure,
                      options=options, prefix=prefix, always=bytes_ | ({tokens[unk]} if unk is not None else set()))
    return encoder, Decoding(byte_level=False, strip=1 if prefix else 0), True


def _strips_after(metadata: Mapping):
    """Which added tokens swallow the white space after them: Phi-3's tokenizer.json says so of all but three, a GGUF
    file cannot (llama.cpp keeps the same list)."""
    if metadata.get("general.architecture") == "phi3" and metadata.get("tokenizer.ggml.model") == "llama":
        return lambda token: token not in ("<unk>", "<s>", "<|endoftext|>")
    return lambda token: False


def _templates(meta: _Metadata) -> dict[str, str]:
    found = {}
    for key, value in meta.metadata.items():
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
            if not isinstance(value, str):
                raise meta.damaged(f"{key} is no text")
            found[key[len("tokenizer.chat_template."):] or "default"] = value
    return found
