"""Chat templates of real models, rendered as transformers renders them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvrun.errors import ModelError
from kvrun.text.template import ChatTemplate, TemplateError, choose

_FILES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
_TOOLS = [{"type": "function", "function": {
    "name": "get_weather", "description": "Gets the weather — \"now\" <b>",
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "Where"}, "unit": {"type": "string", "enum": ["c", "f"]},
        "days": {"type": ["integer", "null"], "default": None}}}}}]
_CALL = {"id": "abcdef123", "type": "function",
         "function": {"name": "get_weather", "arguments": {"city": "Zürich", "unit": "c"}}}


def _say(role: str, content, **more) -> dict:
    return {"role": role, "content": content, **more}


_CHATS = {
    "one": [_say("user", "Hello")],
    "system": [_say("system", "Be brief."), _say("user", "Hi there  ")],
    "several turns": [_say("system", "S"), _say("user", "1"), _say("assistant", "<think>\nhm\n</think>\n\n2"),
                      _say("user", " 3 "), _say("assistant", "4\n\n"), _say("user", "5")],
    "reasoning": [_say("user", "q"), _say("assistant", "a", reasoning_content="because"), _say("user", "r")],
    "tool": [_say("user", "w?"), _say("assistant", None, tool_calls=[_CALL]),
             _say("tool", "21°", name="get_weather", tool_call_id="abcdef123"), _say("assistant", "It is 21°."),
             _say("user", "thanks")],
    "parts": [_say("user", [{"type": "text", "text": "hello"}])],
    "braces": [_say("user", "日本 🎉 <|im_end|> \"q\" {{x}} {% y %}")],
    "wrong order": [_say("assistant", "x"), _say("user", "y"), _say("user", "z")],
}
_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}


@pytest.fixture(scope="module")
def oracle():
    """transformers' apply_chat_template without a vocabulary."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **_NAMES)


def _compare(source: str, oracle) -> int:
    """How many conversations the template renders, each as transformers does; the others both refuse."""
    template, rendered = ChatTemplate(source, "m"), 0
    for name, chat in _CHATS.items():
        for how in ({}, {"add_generation_prompt": False}, {"tools": _TOOLS}, {"enable_thinking": False}):
            try:
                want = oracle.apply_chat_template(
                    chat, chat_template=source, tokenize=False, **{"add_generation_prompt": True, **how})
            except Exception:
                with pytest.raises(TemplateError):
                    template.render(chat, **_NAMES, **how)
                continue
            assert template.render(chat, **_NAMES, **how) == want, (name, how)
            rendered += 1
    return rendered


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_real_template(path, oracle):
    assert _compare(path.read_text(encoding="utf-8"), oracle) >= 8


def test_template_of_smollm2(smollm2, oracle):
    assert _compare(smollm2.gguf.metadata["tokenizer.chat_template"], oracle) >= 24


@pytest.mark.parametrize("source", [
    "{% generation %}a{{ messages[0]['content'] }}{% endgeneration %}b",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n  {{ m.role }}\n{% endfor %}",
    "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ '<é>' | tojson }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n, dict(a=1) }}",
    "{{ bos_token }}{{ documents }}{{ tools is none }}{{ messages[0].tool_calls is defined }}{{ undefined_name }}",
    "{{ strftime_now('%Y') }}",
    "{{ raise_exception('no') }}",
    "{{ namespace(_a=1) }}", "{{ dict.__class__ }}|{{ messages.append(1) }}",
])
def test_what_templates_may_use(source, oracle):
    """Globals, filters, tags and white space are those of transformers."""
    try:
        want = oracle.apply_chat_template(_CHATS["tool"], chat_template=source, tools=_TOOLS, tokenize=False)
    except Exception:
        with pytest.raises(ModelError):
            ChatTemplate(source, "m").render(_CHATS["tool"], tools=_TOOLS, add_generation_prompt=False, **_NAMES)
        return
    got = ChatTemplate(source, "m").render(_CHATS["tool"], tools=_TOOLS, add_generation_prompt=False, **_NAMES)
    assert got == want


def test_a_template_that_raises_is_told_apart_and_the_next_one_renders():
    refusing = ChatTemplate("{{ raise_exception('only user\\nroles') }}", "model.gguf")
    with pytest.raises(TemplateError, match="^model.gguf: .*only user roles$"):
        refusing.render([_say("user", "x")])
    assert ChatTemplate("{{ messages[0].content }}", "m").render([_say("user", "x")]) == "x"


def test_which_of_several():
    assert choose({"default": "d", "tool_use": "t"}, None, "m") == "d"
    assert choose({"default": "d", "tool_use": "t"}, _TOOLS, "m") == "t"
    assert choose({"rag": "r"}, None, "m") == "r"
    with pytest.raises(ModelError, match="rag, tool_use"):
        choose({"rag": "r", "tool_use": "t"}, None, "m")
