"""--schema and --regex: what is said is what is allowed, and the rest is refused by name."""

import json
import random
import re
from decimal import Decimal

import pytest

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from kvrun.backends.batch import Sampler  # noqa: E402
from kvrun.errors import UsageError  # noqa: E402
from kvrun.text.grammar import _JSON_STYLE, from_regex, from_schema  # noqa: E402

from ..engine.running import collect  # noqa: E402
from ..engine.tiny_model import scripted_model  # noqa: E402


@pytest.fixture(scope="module")
def smol(smollm2):
    from kvrun.runtime import open_engine

    engine = open_engine(smollm2, n_ctx=1024)
    yield engine
    engine.close()


def random_schema(draw: random.Random, depth: int = 0) -> dict:
    """What a short answer can fulfil: bounded strings, numbers, enums, arrays and objects."""
    kinds = ["string", "integer", "boolean", "enum", "number", "null"] + ["object", "array"] * (depth < 2)
    kind = draw.choice(kinds) if depth else "object"
    if kind == "string":
        return draw.choice([{"type": "string", "maxLength": draw.randint(1, 12)}, {"type": "string", "pattern": "^[a-z]{2,6}$"}])
    if kind == "integer":
        low = draw.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 500)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01}  # or digits might never end
    if kind == "enum":
        return {"enum": draw.sample(["red", "green", 1, 2, None, "ünïcode", True], 3)}
    if kind == "array":
        return {"type": "array", "items": random_schema(draw, depth + 1), "minItems": 1, "maxItems": draw.randint(1, 3)}
    if kind == "object":
        names = draw.sample(["name", "age", "tags", "kind", "größe", "a b"], draw.randint(1, 3))
        return {"type": "object", "properties": {name: random_schema(draw, depth + 1) for name in names}, "required": names,
                "additionalProperties": False}
    return {"type": kind}


def test_what_a_real_model_says_validates(smol):
    """100 random schemas, drawn anew. All that they allow is short, so every answer comes to its end."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    prompt = smol.text.encode_chat([{"role": "user", "content": "Make up some data."}])
    grammar = from_schema(smol.text, "{}", "s")
    for _ in range(100):
        schema = random_schema(draw)
        grammar = _again(grammar, schema)
        sampler = Sampler(seed=draw.getrandbits(32), temperature=draw.choice([0.0, 0.7, 1.5]), top_p=draw.choice([1.0, 0.9]))
        answer = collect(smol.generate(prompt, sampler=sampler, max_tokens=400, constraint=grammar.begin()))
        assert answer.reason == "eos", (schema, answer.text)
        # Decimals: of floats, 0.58 is no multiple of 0.01.
        jsonschema.validate(*(json.loads(text, parse_float=Decimal) for text in (answer.text, json.dumps(schema))))


def _again(grammar, schema):
    """Another schema over the same vocabulary, which takes a while to prepare."""
    from copy import copy

    from llguidance import LLMatcher

    other = copy(grammar)
    other._grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_JSON_STYLE)
    return other


@pytest.mark.parametrize("pattern", ["yes|no", "[0-9]{3}-[0-9]{2}", "(red|green), (1|2)", "größer?", "a{5,9}!"])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_the_whole_answer_matches(smol, pattern, temperature):
    prompt = smol.text.encode_chat([{"role": "user", "content": "Say it."}])
    answer = collect(smol.generate(prompt, sampler=Sampler(seed=1, temperature=temperature, repeat_penalty=1.1),
                                   constraint=from_regex(smol.text, pattern).begin()))
    assert re.fullmatch(pattern, answer.text) and answer.reason == "eos"


def test_a_choice_is_drawn_in_proportion(smol):
    """Of two allowed answers each comes as often as the model's own chances say, though it would rather say neither."""
    import numpy as np

    prompt = smol.text.encode_chat([{"role": "user", "content": "Heads or tails?"}])
    grammar = from_regex(smol.text, "A|B")
    said = [collect(smol.generate(prompt, sampler=Sampler(seed=seed, temperature=1.0), constraint=grammar.begin())).text for seed in range(150)]
    collect(smol.generate(prompt, max_tokens=1))
    logits = np.array(smol.executor.logits()[-1], np.float64)
    a, b = (smol.text.encode(letter, bos=False)[0] for letter in "AB")
    expected = 1 / (1 + np.exp(logits[b] - logits[a]))
    assert abs(said.count("A") / 150 - expected) < 4 * np.sqrt(expected * (1 - expected) / 150) + 0.01


def test_reasoning_is_free_and_the_answer_is_not(kvrun, tmp_path):
    folder = scripted_model(tmp_path / "m", [b"<think>", b"\nhm, 5? ", b"</think>", b"\n\n", b"Yes", b"7", b"!"])
    said = json.loads(kvrun("run", folder, "x", "--json", "--regex", "[0-9]{2}").stdout)
    assert said["reasoning"].startswith("hm, 5? ") and re.fullmatch("[0-9]{2}", said["answer"])


def test_on_the_command_line(kvrun, scripted, tmp_path):
    (tmp_path / "s.json").write_text('{"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": false}')
    result = kvrun("run", scripted, "x", "--schema", tmp_path / "s.json")
    assert result.returncode == 0 and json.loads(result.stdout)["a"] in ("x", "y") and result.stderr == b""


def test_an_answer_that_is_cut_before_it_is_whole_is_an_error(kvrun, scripted, tmp_path):
    (tmp_path / "s.json").write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 20}')
    cut = kvrun("run", scripted, "x", "--schema", tmp_path / "s.json", "--max-tokens", "5", "--json")
    assert cut.returncode == 1 and cut.stderr.count(b"\n") == 1 and b"--schema" in cut.stderr and b"--max-tokens" in cut.stderr
    assert json.loads(cut.stdout)["finish_reason"] == "length"
    whole = kvrun("run", scripted, "x", "--regex", "a{3,}", "--max-tokens", "5")
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, b"aaaaa\n", b"")


def test_an_end_token_beyond_the_vocabulary(kvrun, tmp_path):
    folder = scripted_model(tmp_path / "m", [b"Welt"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 1000000000]}')
    assert kvrun("run", folder, "x", "--regex", "ab").stdout == b"ab\n"


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", "a\\b"])
def test_a_pattern_that_is_none(smol, pattern):
    with pytest.raises(UsageError, match="--regex"):
        from_regex(smol.text, pattern)
