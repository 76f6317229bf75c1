"""Tokenizers of Hugging Face folders, against transformers reading the same folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kvrun.errors import ModelError
from kvrun.text.folder_tokenizer import from_folder

_ALICE = Path(__file__).parents[1] / "data" / "alice.txt"


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|bos|>", "<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_ALICE.read_text(encoding="utf-8").splitlines()[:500], trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False),
                          AddedToken("<|user|>", normalized=False, rstrip=True)])
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """Llama-2's shape: a space before every stretch of text, bytes for what is unknown."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁ab", "ab"]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("▁", "a"), ("▁a", "b"), ("a", "b")],
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder: (tokenizer, tokenizer_config or None, further files)."""
    def write(tokenizer, config: dict | None = None, **files) -> Path:
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        if config is not None:
            files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        for name, content in files.items():
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path
    return write


def _decoded(tokenizer, ids: list[int]) -> str:
    from kvrun.text.detokenizer import Detokenizer
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@pytest.mark.parametrize("make", [_byte_level, _sentencepiece])
def test_ids_and_text_are_those_of_transformers(make, folder, texts):
    from transformers import PreTrainedTokenizerFast
    path = folder(make(), {})
    ours, oracle = from_folder(path), PreTrainedTokenizerFast.from_pretrained(str(path))
    for text in texts:
        text += "<|user|>  a<think></s>"
        for special in (False, True):
            want = oracle.encode(text, add_special_tokens=False, split_special_tokens=not special)
            assert ours.encoder.encode(text, special) == want
            assert _decoded(ours, want) == oracle.decode(want, skip_special_tokens=True)


@pytest.mark.parametrize(("make", "config"), [
    (_byte_level, {}), (_byte_level, {"bos_token": "<|bos|>", "add_bos_token": True}), (_sentencepiece, {}),
    (_sentencepiece, {"bos_token": {"__type": "AddedToken", "content": "<s>"}}),
    (_sentencepiece, {"bos_token": "<s>", "add_bos_token": False}),
])
def test_what_comes_before_a_prompt(make, config, folder):
    from transformers import PreTrainedTokenizerFast
    path = folder(make(), config)
    ours, oracle = from_folder(path), PreTrainedTokenizerFast.from_pretrained(str(path))
    assert [*ours.prefix, *ours.encoder.encode("a b")] == oracle.encode("a b")


def test_special_tokens_of_the_config_and_the_older_file(folder):
    path = folder(_byte_level(), {"eos_token": "<|end|>", "additional_special_tokens": ["<think>"]},
                  **{"special_tokens_map.json": {"bos_token": {"content": "<|bos|>"}, "eos_token": "ignored"}})
    ours = from_folder(path)
    assert ours.names == {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
    assert set(ours.special) == {"<|bos|>", "<|end|>", "<think>"} and ours.added == ("<|user|>",)
    assert ours.ends == {1}


def test_tokens_only_the_config_lists(folder):
    size = from_folder(folder(_byte_level())).size
    listed = {str(size): {"content": "<|new|>", "special": True}}
    ours = from_folder(folder(_byte_level(), {"added_tokens_decoder": listed}))
    assert ours.encoder.encode("<|new|>", special=True) == [size] and ours.size == size + 1
    with pytest.raises(ModelError, match="<|new|>"):
        from_folder(folder(_byte_level(), {"added_tokens_decoder": {"7000": listed[str(size)]}}))


def test_where_templates_are_found(folder, tmp_path):
    make = _byte_level()
    older = {"chat_template.json": {"chat_template": "oldest"}}
    assert from_folder(folder(make)).templates == {}
    assert from_folder(folder(make, None, **older)).templates == {"default": "oldest"}
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    assert from_folder(folder(make, {"chat_template": named}, **older)).templates == {"default": "d", "tool_use": "t"}
    assert from_folder(folder(make, {"chat_template": "config"}, **older)).templates == {"default": "config"}
    path = folder(make, {"chat_template": "config"}, **{"chat_template.jinja": "file"}, **older)
    assert from_folder(path).templates == {"default": "file"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r")
    assert from_folder(path).templates == {"default": "file", "rag": "r"}


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer.json, .*; fetch it again"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelError, match="tokenizer.model"):
        from_folder(tmp_path)


_BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
_DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _file(**parts) -> str:
    return json.dumps({"version": "1.0", "added_tokens": [], "model": _BPE, "decoder": _DECODER, **parts})


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", "[" * 100_000, _file()[:60], "\x00" * 100, _file(model={"type": "Nobody"}),
    _file(model=dict(_BPE, merges=["a zz"])), _file(model=dict(_BPE, vocab={"a": -1})), _file(decoder=None),
    _file(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), _file(added_tokens=[{"id": "x"}]),
    _file(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    _file(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    _file(model={"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]]}),
    _file(model={"type": "WordPiece", "vocab": {}, "unk_token": "?", "continuing_subword_prefix": "",
                 "max_input_chars_per_word": 1}),
    _file(post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?", "type_id": 0}}],
                          "pair": [], "special_tokens": {}}),
])
def test_a_broken_file_is_one_line(content, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        from_folder(tmp_path, "kvrun pull it")
    message = str(caught.value)
    assert "tokenizer.json" in message and "\n" not in message and len(message) < 600
    assert message.endswith("; kvrun pull it") or "not supported" in message
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\xff", "[" * 100_000])
def test_a_broken_config_is_named(name, content, folder):
    path = folder(_byte_level())
    (path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=name):
        from_folder(path)
