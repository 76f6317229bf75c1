"""Tokenizers rebuilt from GGUF metadata, against transformers and the SentencePiece library."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path

import pytest
import sentencepiece

from kvrun.errors import ModelError
from kvrun.text.gguf_tokenizer import from_gguf

_ALICE = Path(__file__).parents[1] / "data" / "alice.txt"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)


# -- byte-level BPE --------------------------------------------------------------------------------------------------

def test_smollm2_ids_are_those_of_transformers(smollm2, smollm2_text, texts):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    oracle = AutoTokenizer.from_pretrained(str(smollm2.path.parent), gguf_file=smollm2.path.name).backend_tokenizer
    # transformers does not know the cut named "smollm": the model's own tokenizer.json splits digits first.
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for special in (False, True):
        oracle.encode_special_tokens = not special
        for text in texts:
            assert smollm2_text.encode(text, special=special) == oracle.encode(text).ids, text


def test_smollm2_has_no_token_of_two_digits(smollm2_text):
    """Why its text is cut at every digit."""
    pieces = [smollm2_text.token_text(i) for i in range(smollm2_text.vocab_size)]
    assert {p for p in pieces if re.search("[0-9]", p)} == set("0123456789")


def test_a_long_text_after_short_ones(smollm2_text):
    """The pieces kept from text to text change nothing."""
    prose = _ALICE.read_text(encoding="utf-8")[:20000]
    whole = smollm2_text.encode(prose)
    for start in range(0, 4000, 500):
        smollm2_text.encode(prose[start:start + 500][::-1])
    assert smollm2_text.encode(prose) == whole


# -- SentencePiece ---------------------------------------------------------------------------------------------------

def test_gemma_ids_are_those_of_sentencepiece(gemma3, gemma3_text, texts):
    metadata = gemma3.gguf.metadata
    types = list(metadata["tokenizer.ggml.token_type"])
    types[metadata["tokenizer.ggml.unknown_token_id"]] = _UNKNOWN
    oracle = _processor(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], types, prefix=False)
    for text in texts:
        if "▁" not in text:     # typed as itself it is an added token for tokenizers, a space for SentencePiece
            assert gemma3_text.encode(text, bos=False) == oracle.encode(text), text


@pytest.mark.parametrize("prefix", [True, False])
def test_a_trained_model_gives_the_ids_of_sentencepiece(prefix, texts):
    tokens, scores, types = _trained()
    meta = _spm(tokens, scores, types, add_space_prefix=prefix)
    tokenizer = from_gguf(meta, "trained")
    oracle = _processor(tokens, scores, types, prefix)
    assert tokenizer.decoding.strip == prefix
    for text in texts:
        assert tokenizer.encoder.encode(text) == oracle.encode(text), text


def test_prefix_space_comes_after_each_special_token():
    """As in Llama-2's own tokenizer.json."""
    tokens, scores, types = _trained()
    tokenizer = from_gguf(_spm(tokens, scores, types), "trained")
    ids = tokenizer.encoder.encode("<s>the<s>the", special=True)
    the = tokens.index("▁the")
    assert ids == [1, the, 1, the]


def test_phi3_tokens_swallow_the_space_behind_them():
    tokens, scores, types = _trained()
    tokens, scores, types = [*tokens, "<|end|>"], [*scores, 0.0], [*types, _CONTROL]
    llama = from_gguf(_spm(tokens, scores, types), "m").encoder.encode("<|end|>\n the", special=True)
    phi3 = from_gguf(_spm(tokens, scores, types) | {"general.architecture": "phi3"}, "m").encoder
    assert phi3.encode("<|end|>\n the", special=True) == phi3.encode("<|end|>the", special=True) != llama


def _trained() -> tuple[list[str], list[float], list[int]]:
    """(tokens, scores, types) of a small SentencePiece BPE model with byte fallback and a user-defined piece."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_ALICE.read_text(encoding="utf-8").splitlines()[:800]), model_writer=out,
        model_type="bpe", vocab_size=900, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=["<tag>"], minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    kinds = [_UNKNOWN if model.is_unknown(i) else _CONTROL if model.is_control(i) else _BYTE if model.is_byte(i)
             else _USER if model.id_to_piece(i) == "<tag>" else _NORMAL for i in range(len(model))]
    return [model.id_to_piece(i) for i in range(len(model))], [model.get_score(i) for i in range(len(model))], kinds


def _spm(tokens, scores, types, **more) -> dict:
    meta = {"model": "llama", "tokens": list(tokens), "scores": list(scores), "token_type": list(types),
            "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items()} | {"general.architecture": "llama"}


def _processor(tokens, scores, types, prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's own reader of such a vocabulary (sentencepiece_model.proto, written by hand)."""
    def varint(n: int) -> bytes:
        return bytes([n & 127 | (128 if n > 127 else 0)]) + (varint(n >> 7) if n > 127 else b"")

    def number(field: int, n: int) -> bytes:
        return varint(field << 3) + varint(n)

    def blob(field: int, data: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(data)) + data

    def piece(token: str, score: float, kind: int) -> bytes:
        spelled = blob(1, token.replace(" ", "▁").encode())
        return blob(1, spelled + varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind))

    trainer = number(3, 2) + number(35, 1)                                      # BPE, byte fallback
    normalizer = blob(1, b"identity") + number(3, prefix) + number(4, 0) + number(5, 1)
    model = b"".join(map(piece, tokens, scores, types)) + blob(2, trainer) + blob(3, normalizer)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


# -- what is read from the metadata ----------------------------------------------------------------------------------

def _tiny(**more) -> dict:
    alphabet = "abcdefgh "
    tokens = [*alphabet.replace(" ", "Ġ"), "ab", "<|end|>", "<|im_end|>", "[PAD12]"]
    meta = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": ["a b"],
            "token_type": [_NORMAL] * 10 + [_CONTROL, _CONTROL, _USER], "eos_token_id": 10, "bos_token_id": 10, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items() if value is not None}


def test_bos_is_added_as_the_file_says_or_its_kind_does():
    assert from_gguf(_tiny(), "m").prefix == ()
    assert from_gguf(_tiny(pre="llama-bpe"), "m").prefix == (10,)
    assert from_gguf(_tiny(pre="llama-bpe", add_bos_token=False), "m").prefix == ()
    assert from_gguf(_tiny(add_bos_token=True), "m").prefix == (10,)
    assert from_gguf(_tiny(add_bos_token=True, bos_token_id=None), "m").prefix == ()
    tokens, scores, types = _trained()
    assert from_gguf(_spm(tokens, scores, types), "m").prefix == (1,)


def test_ends_are_eos_eot_eom_and_known_turn_ends():
    assert from_gguf(_tiny(), "m").ends == {10, 11}
    assert from_gguf(_tiny(eot_token_id=3, eom_token_id=4), "m").ends == {3, 4, 10, 11}


def test_filler_of_the_embedding_is_no_token_to_type():
    tokenizer = from_gguf(_tiny(), "m")
    assert "[PAD12]" not in tokenizer.added
    assert 12 not in tokenizer.encoder.encode("a[PAD12]", special=True)


def test_templates_by_name():
    named = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    assert from_gguf(_tiny() | named, "m").templates == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize(("change", "message"), [
    ({"model": "t5"}, "'t5'"),
    ({"model": None}, "tokenizer.ggml.model"),
    ({"model": 7}, "damaged"),
    ({"pre": "nobody-knows"}, "'nobody-knows'"),
    ({"tokens": []}, "empty"),
    ({"tokens": "abc"}, "damaged"),
    ({"tokens": [1, 2]}, "damaged"),
    ({"token_type": [1, 1]}, "13 tokens with 2 types"),
    ({"add_bos_token": "yes"}, "damaged"),
    ({"merges": [1]}, "damaged"),
    ({"merges": ["a zz", "ab"]}, None),             # merges of no piece never apply
    ({"bos_token_id": 4294967295}, None),           # old converters' "none"
    ({"model": "llama"}, "0 scores"),
])
def test_damaged_metadata_is_named(change, message):
    if message is None:
        assert from_gguf(_tiny(**change), "m.gguf").encoder.encode("abc")
        return
    with pytest.raises(ModelError, match=message) as caught:
        from_gguf(_tiny(**change), "m.gguf")
    assert str(caught.value).startswith("m.gguf: ") and "\n" not in str(caught.value)
