"""Incremental decoding against the decoders of the tokenizers library, on any ids."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from kvrun.text.detokenizer import Detokenizer
from kvrun.text.gguf_tokenizer import byte_alphabet
from kvrun.text.tokenizer import Decoding, Tokenizer

_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_PIECES = ["<s>", "</s>", *_BYTES, "▁", "▁▁", "▁Hello", "wor", "ld", "é", "日本", "<tag>", "\n", "<0x4>"]
_SPECIAL = {"<s>": 0, "</s>": 1}


def _sentencepiece(strip: int) -> Tokenizer:
    return Tokenizer(None, Decoding(False, strip), _PIECES.__getitem__, len(_PIECES), _SPECIAL)


def _decoder(strip: int):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", strip, 0)] if strip else []))


def _all(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


_utf8 = st.text("aé日🎉 ", max_size=4).map(lambda s: [_PIECES.index(f"<0x{b:02X}>") for b in s.encode()])
_any = st.integers(-2, len(_PIECES) + 1).map(lambda i: [i])
_ids = st.lists(st.one_of(_utf8, _any, st.sampled_from([[258], [259], [260]])), max_size=20).map(lambda x: sum(x, []))


@settings(max_examples=500)
@given(_ids, st.integers(0, 2))
def test_sentencepiece_ids_read_as_the_library_reads_them(ids, strip):
    pieces = [_PIECES[i] for i in ids if 2 <= i < len(_PIECES)]
    assert _all(Detokenizer(_sentencepiece(strip)), ids) == _decoder(strip).decode(pieces)


@settings(max_examples=300)
@given(_ids)
def test_what_was_given_out_stays(ids):
    """Each step's text continues the last: decoding the ids so far, shorter by what is held back."""
    detokenizer, shown = Detokenizer(_sentencepiece(1)), ""
    for n, id in enumerate(ids, 1):
        shown += detokenizer.push(id)
        whole = _decoder(1).decode([_PIECES[i] for i in ids[:n] if 2 <= i < len(_PIECES)])
        assert whole.startswith(shown)
        if 258 <= id < len(_PIECES):
            assert whole == shown       # nothing is held back after a token that is no byte


@settings(max_examples=300)
@given(st.lists(st.integers(0, 49151), max_size=30), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_byte_level_ids_read_as_the_library_reads_them(smollm2_text, ids, text):
    for sequence in (ids, smollm2_text.encode(text)):
        tokenizer = smollm2_text._tokenizer
        pieces = [tokenizer.piece(i) for i in sequence if i not in smollm2_text.special_ids]
        assert _all(smollm2_text.detokenizer(), sequence) == decoders.ByteLevel().decode(pieces)
    # SmolLM2's vocabulary lacks a few bytes (control characters, F1 to F4); its own tokenizer drops them.
    spelled = {smollm2_text._tokenizer.piece(i) for i in range(smollm2_text.vocab_size)}
    if all(byte_alphabet()[b] in spelled for b in text.encode()):
        assert _all(smollm2_text.detokenizer(), smollm2_text.encode(text)) == text


def test_unfinished_character_is_held_back(smollm2_text):
    ids = smollm2_text.encode("🎉🦄")
    detokenizer = smollm2_text.detokenizer()
    steps = [detokenizer.push(id) for id in ids]
    assert "".join(steps) == "🎉🦄" and "�" not in "".join(steps) and "" in steps
    cut = smollm2_text.detokenizer()
    assert [cut.push(id) for id in ids[:1]] == [""] and cut.flush() == "�"


def test_special_tokens_show_only_when_asked(smollm2_text):
    ids = smollm2_text.encode("<|im_start|>user", special=True)
    assert ids[0] in smollm2_text.special_ids
    assert _all(smollm2_text.detokenizer(), ids) == "user"
    assert _all(smollm2_text.detokenizer(special=True), ids) == "<|im_start|>user"
    assert smollm2_text.token_text(ids[0]) == "<|im_start|>"


def test_leading_space_of_a_continued_text_stays():
    space_hello = [_PIECES.index("▁Hello")]
    assert _all(Detokenizer(_sentencepiece(1)), space_hello) == "Hello"
    assert _all(Detokenizer(_sentencepiece(1), continued=True), space_hello) == " Hello"
