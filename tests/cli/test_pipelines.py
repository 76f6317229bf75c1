"""kvrun run as a step of a pipeline: events, extraction, many prompts, grammars, and the prompt cache between runs."""

import json
import re
import subprocess

import pytest

from ..engine.tiny_model import random_model, scripted_model
from .conftest import KVRUN


@pytest.fixture
def cached(environment, tmp_path):
    """cached(*args, input=b"") -> CompletedProcess, with a cache folder of this test alone"""
    def run(*args, input=b""):
        return subprocess.run([*KVRUN, *map(str, args)], input=input, capture_output=True, timeout=120,
                              env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    return run


def lines(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_jsonl_tells_what_happens_as_it_happens(kvrun, scripted):
    result = kvrun("run", scripted, "hello", "--jsonl", "--logprobs", "2")
    events = lines(result)
    assert result.returncode == 0 and result.stderr == b""
    assert [e["event"] for e in events] == ["prefill", "token", "token", "token", "token", "stop"]
    assert "".join(e["text"] for e in events if e["event"] == "token") == "Größe,\nWelt" == events[-1]["text"]
    assert len(events[1]["top"]) == 2 and events[-1]["finish_reason"] == "eos" and events[-1]["usage"]["completion_tokens"] == 4


@pytest.fixture(scope="session")
def thinker(tmp_path_factory):
    return scripted_model(tmp_path_factory.mktemp("thinker"), [b"<think>", b"\nhm\n", b"</think>", b"\n\n", b"Yes", b"!"])


def test_reasoning_never_reaches_stdout(kvrun, thinker):
    shown, hidden = kvrun("run", thinker, "x"), kvrun("run", thinker, "x", "--think", "hide")
    assert (shown.stdout, shown.stderr) == (b"Yes!\n", b"hm\n\n") and (hidden.stdout, hidden.stderr) == (b"Yes!\n", b"")
    said = json.loads(kvrun("run", thinker, "x", "--json").stdout)
    assert (said["answer"], said["reasoning"]) == ("Yes!", "hm\n") and said["text"] == "<think>\nhm\n</think>\n\nYes!"
    assert [e["event"] for e in lines(kvrun("run", thinker, "x", "--jsonl"))] == ["prefill", *["reasoning"] * 3, *["token"] * 3, "stop"]
    assert kvrun("run", thinker, "x", "--raw").stdout == b"<think>\nhm\n</think>\n\nYes!\n"


@pytest.mark.parametrize(("script", "code"), [
    ([b"Here:\n", b"```", b"python\n", b"a = 1\n", b"\nb\n", b"```\n", b"text\n", b"```x\n"], b"a = 1\n\nb\n"),
    ([b"~~~~\n", b"```\n", b"in\n", b"~~~~", b"\n!"], b"```\nin\n"),
    ([b"```\n", b"open to the end"], b"open to the end\n"),
])
def test_extract_prints_the_first_code_block(kvrun, tmp_path, script, code):
    result = kvrun("run", scripted_model(tmp_path / "m", script), "x", "-x")
    assert (result.returncode, result.stdout, result.stderr) == (0, code, b"")


def test_extract_without_a_code_block(kvrun, scripted):
    result = kvrun("run", scripted, "x", "-x")
    assert (result.returncode, result.stdout) == (1, b"") and b"no fenced code block" in result.stderr and result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("window", "kv"), [(0, "f16"), (40, "f16"), (0, "q4")])
def test_each_line_is_answered_as_if_alone(kvrun, tmp_path, rng, window, kv):
    folder = random_model(tmp_path / "m", 3, window=window)
    (tmp_path / "book").write_text("once upon a time " * 20)
    asked = ["one", "another one that is much longer " * 8, "two", "größer"]
    args = ("-f", tmp_path / "book", "Answer:", "--max-tokens", "30", "--temp", "1", "--top-k", "50", "--seed", "4", "--kv", kv)
    result = kvrun("run", folder, *args, "--each", "--stats", input=("\n\n".join(asked) + "\n").encode())
    assert result.returncode == 0, result.stderr
    told = result.stderr.decode()
    assert told.count("\n") == 1 and int(re.search(r"4 answers, (\d+) prompt tokens shared", told)[1]) > 340
    book = (tmp_path / "book").read_text().rstrip("\n")
    for line, said in zip(asked, lines(result), strict=True):
        alone = json.loads(kvrun("run", folder, f"{book}\n\nAnswer:\n\n{line}", *args[3:], "--json", "--no-prompt-cache").stdout)
        assert said["input"] == line and said["tokens"] == alone["tokens"]
        assert said["usage"]["cached_tokens"] > 30


def test_each_goes_on_after_a_line_that_cannot_be_answered(kvrun, scripted):
    result = kvrun("run", scripted, "--each", "-n", "128", input=b"one\n" + b"x" * 300 + b"\nca\xe9\nfour\n")
    said = lines(result)
    assert result.returncode == 2 and [("error" in line) for line in said] == [False, True, True, False]
    assert "128" in said[1]["error"] and "line 3" in said[2]["error"]
    assert kvrun("run", scripted, "--each", input=b"\n").returncode == 2


def test_options_that_do_not_go_together(kvrun, scripted, tmp_path):
    for args in (["--json", "--jsonl"], ["--json", "-x"], ["--each", "-x"], ["--schema", "a", "--regex", "b"]):
        result = kvrun("run", scripted, "x", *args)
        assert result.returncode == 2 and result.stderr.count(b"\n") == 1 and result.stdout == b""


def test_a_cache_that_cannot_be_written_is_no_failure(environment, scripted, tmp_path):
    (tmp_path / "file").write_text("")
    result = subprocess.run([*KVRUN, "run", str(scripted), "x " * 300], stdin=subprocess.DEVNULL, capture_output=True,
                            env=environment | {"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert (result.returncode, result.stderr) == (0, b"")
