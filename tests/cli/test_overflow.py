"""--overflow, --keep and --evict as users have them."""

import json
import re

import pytest

from ..engine.tiny_model import random_model, scripted_model
from .conftest import LINES, dropped_on_stderr

PAGE = 128


def test_json_of_an_answer_that_fits(kvrun, scripted):
    said = json.loads(kvrun("run", scripted, "x", "--json", "-n", "512", "--overflow", "evict").stdout)
    assert (said["evicted_tokens"], said["evictions"], said["reread_tokens"]) == (0, [], 0)


def test_keep(kvrun, endless):
    def lowest(*args) -> int:
        said = json.loads(kvrun("run", endless, "go", "-n", "1024", "--overflow", "evict", "--max-tokens", "1100", "--json", *args).stdout)
        return min(a for e in said["evictions"] for a, _ in e["positions"])

    assert lowest() == PAGE
    assert lowest("--keep", "300") == 3 * PAGE
    assert lowest("-s", "be brief " * 40) == 3 * PAGE, "the system prompt is kept"
    assert lowest("-s", "be brief " * 40, "--keep", "0") == PAGE


@pytest.mark.parametrize(("args", "message"), [
    (["--overflow", "evict", "--keep", "600", "-n", "512"], "--keep 600 .*--n-ctx 512: at most 256 "),
    (["--overflow", "evict", "-n", "256"], "--n-ctx 384 or more"),
    (["--overflow", "evict", "-n", "512", "-s", "long " * 100], "at most 256 "),
    (["--keep", "10"], "--overflow evict"),
    (["--evict", "strided"], "--overflow evict"),
    (["--overflow", "evict", "--evict", "lru"], "lru"),
    (["--overflow", "wrap"], "wrap"),
    (["--overflow", "evict", "--keep", "-1"], "--keep"),
])
def test_what_cannot_be(kvrun, scripted, args, message):
    for command in (["run", scripted, "x"], ["chat", scripted]):
        result = kvrun(*command, *args, input=b"x\n")
        assert result.returncode == 2 and result.stdout == b"" and result.stderr.count(b"\n") == 1
        assert re.search(message.encode(), result.stderr), result.stderr


def test_what_a_long_prompt_drops_is_one_line(kvrun, chat, random_folder):
    args = (random_folder, "-n", "512", "--overflow", "evict", "--max-tokens", "3")
    result = kvrun("run", *args, "--json", "word " * 1500)
    said = json.loads(result.stdout)
    assert len(said["evictions"]) > 3 and result.stderr.count(b"\n") == 1 and dropped_on_stderr(result.stderr) == said["evicted_tokens"]
    first, last = (pick(p for e in said["evictions"] for span in e["positions"] for p in span) for pick in (min, max))
    assert f"positions {first}-{last - 1}\n".encode() in result.stderr
    shown = chat(*args).ask("word " * 1500, "dropped")
    assert shown.count("context full: dropped ") == 1


@pytest.fixture(scope="session")
def short_range(tmp_path_factory):
    """Counts lines for ever; trained for 512 positions."""
    folder = scripted_model(tmp_path_factory.mktemp("short"), LINES, loop=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


def test_the_trained_length_is_said(kvrun, short_range):
    args = ("run", short_range, "go", "-n", "512", "--overflow", "evict", "--max-tokens", "1000")
    result = kvrun(*args)
    assert result.returncode == 0 and result.stdout == b"".join((LINES * 20)[:1000])
    rereads = re.findall(rb"position 512 is the last .*: reading the (\d+) tokens", result.stderr)
    said = json.loads(kvrun(*args, "--json").stdout)
    assert said["reread_tokens"] == sum(map(int, rereads)) == 320 * len(rereads) > 0
    assert {e["reason"] for e in said["evictions"]} == {"n_positions"}
    assert said["evicted_tokens"] == sum(map(int, re.findall(rb"trained length reached: dropped (\d+) tokens", result.stderr)))


def test_a_chat_far_past_its_context(kvrun, tmp_path):
    folder = scripted_model(tmp_path / "m", [b"yes", b"!"])
    messages = b"".join(b"message %d %s\n" % (i, b"and so on " * 12) for i in range(40))
    result = kvrun("chat", folder, "-n", "512", "--overflow", "evict", "-s", "be brief", "--stats", input=messages)
    assert result.returncode == 0 and result.stdout == b"yes!\n" * 40
    prompts = [(int(n), int(cached)) for n, cached in re.findall(rb"prompt (\d+) tok \((\d+) cached\)", result.stderr)]
    assert prompts[-1][0] > 10 * 512 and all(cached < 512 for _, cached in prompts)
    assert dropped_on_stderr(result.stderr) > 9 * 512 and b"again" not in result.stderr
    stopping = kvrun("chat", folder, "-n", "512", "-s", "be brief", input=messages)
    assert b"context full: the prompt has" in stopping.stderr and b"--overflow evict" in stopping.stderr


def test_a_drop_amid_the_answer_has_its_own_line(environment, endless):
    from .conftest import KVRUN
    from .terminal import Screen

    screen = Screen([*KVRUN, "run", str(endless), "go", "-n", "384", "--overflow", "evict", "--max-tokens", "420"], environment,
                    rows=450, columns=100)
    assert screen.end() == 0
    lines = screen.display.rstrip().split("\n")
    notices = [line for line in lines if line.startswith("kvrun: context full: dropped 128 tokens")]
    assert len(notices) >= 1 and all(re.fullmatch(r"line \d+|kvrun: .*", line) for line in lines)


def test_logprobs_of_a_long_prompt(kvrun, tmp_path):
    folder = random_model(tmp_path / "m", 7, template=None)
    said = json.loads(kvrun("run", folder, "word " * 200, "-n", "512", "--overflow", "evict", "--json", "--echo", "--max-tokens", "1").stdout)
    assert len(said["prompt_logprobs"]) == said["usage"]["prompt_tokens"] > 990
    assert said["evicted_tokens"] >= 489
