"""The named cuts of GGUF files."""

from __future__ import annotations

import pytest
from tokenizers import Regex, pre_tokenizers

from kvrun.errors import ModelError
from kvrun.text.pretokenizers import PRE_TOKENIZERS, pre_tokenizer

# What the models' own tokenizer.json files make of it.
_TEXT = "I'LL pay 12345 €,\n\n  ok"
_WORDS = {
    "gpt-2": ["I", "'", "LL", " pay", " 12345", " €,", "\n\n ", " ok"],
    "smollm": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " €,", "\n\n ", " ok"],
    "llama-bpe": ["I", "'LL", " pay", " ", "123", "45", " €,\n\n", " ", " ok"],
    "qwen2": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " €,\n\n", " ", " ok"],
    "tekken": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " €,\n\n", " ", " ok"],
    "gpt-4o": ["I'LL", " pay", " ", "123", "45", " €,\n\n", " ", " ok"],
    "deepseek-coder": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " ", "€", ",", "\n", "\n", " ", " ok"],
}


def _cut(name: str, text: str) -> list[str]:
    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre_tokenizer(name, "m").splits]
    return [word for word, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", _WORDS)
def test_words(name):
    assert _cut(name, _TEXT) == _WORDS[name]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_cut_keeps_every_character(name, texts):
    for text in texts[:120]:
        assert "".join(_cut(name, text)) == text


def test_an_unknown_name_is_refused_by_name():
    with pytest.raises(ModelError, match="m.gguf.*'nobody-knows'"):
        pre_tokenizer("nobody-knows", "m.gguf")
