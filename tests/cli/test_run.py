"""kvrun run through pipes: clean bytes, honest codes, JSON that says all."""

import json
import signal
import subprocess

import pytest

from ..engine.tiny_model import random_model
from .conftest import HOSTILE, KVRUN, LINES

SAID = "Größe,\nWelt\n".encode()


def shell(command: str, environment: dict, **variables: str) -> subprocess.CompletedProcess:
    """Runs a bash line in which $kvrun is the command."""
    return subprocess.run(["bash", "-c", command.replace("$kvrun", " ".join(KVRUN))], capture_output=True,
                          env=environment | variables, timeout=120)


def test_the_answer_and_nothing_else(kvrun, scripted):
    result = kvrun("run", scripted, "hello")
    assert (result.returncode, result.stdout, result.stderr) == (0, SAID, b"")


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_utf8_whatever_the_locale(kvrun, scripted, locale):
    result = kvrun("run", scripted, "Straße 世界", env=locale)
    assert (result.returncode, result.stdout, result.stderr) == (0, SAID, b"")


def test_a_pipe_gets_the_model_s_bytes_and_no_escape_of_ours(kvrun, hostile):
    result = kvrun("run", hostile, "x", "--stats", "--color", "auto")
    assert result.stdout == b"".join(HOSTILE) + b"\n"
    assert b"\x1b" not in result.stderr


def test_stats_are_one_line_on_stderr(kvrun, scripted):
    result = kvrun("run", scripted, "hello", "--stats", "-q")
    assert result.stdout == SAID
    line = result.stderr.decode()
    assert line.count("\n") == 1 and "answer 4 tok" in line and "greedy" in line and line.rstrip().endswith("eos")


def test_help_into_a_reader_that_leaves(environment):
    result = shell('for i in 1 2 3; do $kvrun run --help | true; echo "${PIPESTATUS[0]}"; done', environment)
    assert set(result.stdout.split()) <= {b"0", b"141"} and result.stderr == b""


def test_closed_streams(environment, scripted):
    closed_err = shell(f"$kvrun run {scripted} x --stats 2>&-", environment)
    assert (closed_err.returncode, closed_err.stdout) == (0, SAID)
    closed_err = shell("$kvrun run ./absent.gguf x 2>&-", environment)
    assert (closed_err.returncode, closed_err.stdout) == (3, b"")
    closed_out = shell(f"$kvrun run {scripted} x >&-", environment)
    assert closed_out.returncode == 9 and closed_out.stderr.count(b"\n") == 1 and b"standard output" in closed_out.stderr
    closed_in = shell(f"$kvrun run {scripted} x <&-", environment)
    assert (closed_in.returncode, closed_in.stdout, closed_in.stderr) == (0, SAID, b"")
    full = shell(f"$kvrun run {scripted} x >/dev/full", environment)
    assert full.returncode == 9 and b"standard output" in full.stderr


def prompt_of(kvrun, folder, *args, input: bytes = b"") -> str:
    """The text that the model read, taken from the JSON of --echo."""
    result = kvrun("run", folder, *args, "--json", "--echo", "--max-tokens", "0", input=input)
    assert result.returncode == 0, result.stderr
    return bytes(b for place in json.loads(result.stdout)["prompt_logprobs"] for b in [place["id"]] if b < 256).decode()


def test_where_the_prompt_comes_from(kvrun, without_template, tmp_path):
    (tmp_path / "a").write_bytes(b"file a\n")
    (tmp_path / "b").write_bytes("\ufefffile b\r\n".encode())
    files = ["-f", tmp_path / "a", "-f", tmp_path / "b"]
    assert prompt_of(kvrun, without_template, "ask", input=b"piped\n") == "piped\n\nask"
    assert prompt_of(kvrun, without_template, "-", input=b"piped\n") == "piped"
    assert prompt_of(kvrun, without_template, input="größer".encode()) == "größer"
    assert prompt_of(kvrun, without_template, *files, "ask", input=b"piped\n\n") == "file a\n\nfile b\n\npiped\n\n\nask"
    assert prompt_of(kvrun, without_template, "--raw", input=b"as it is\n") == "as it is\n"
    assert prompt_of(kvrun, without_template, "--raw", "ask ", input=b"piped\n") == "piped\n\nask "


def test_the_template_is_used_unless_raw(kvrun, random_folder):
    assert prompt_of(kvrun, random_folder, "ask", "-s", "sys") == "system\nsysuser\naskassistant\n"
    assert prompt_of(kvrun, random_folder, "ask", "--raw") == "ask"


def test_a_template_of_the_user_s_own(kvrun, random_folder, without_template, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    for folder in (random_folder, without_template):
        assert prompt_of(kvrun, folder, "größer", "--template-file", path) == "[user] größer"
    path.write_text("{% for")
    broken = kvrun("run", random_folder, "x", "--template-file", path)
    assert broken.returncode == 5 and b"mine.jinja" in broken.stderr and broken.stderr.count(b"\n") == 1
    absent = kvrun("run", random_folder, "x", "--template-file", tmp_path / "absent")
    assert absent.returncode == 9 and b"absent" in absent.stderr


def test_json(kvrun, scripted):
    result = kvrun("run", scripted, "hello", "--json", "--logprobs", "3", "--echo", "-n", "256")
    assert result.returncode == 0 and result.stderr == b"" and result.stdout.endswith(b"}\n") and result.stdout.count(b"\n") == 1
    said = json.loads(result.stdout)
    assert said["text"] == "Größe,\nWelt" and said["finish_reason"] == "eos"
    assert [t["index"] for t in said["tokens"]] == [0, 1, 2, 3]
    for token in said["tokens"]:
        assert set(token) == {"index", "id", "token", "logprob", "top"} and len(token["top"]) == 3
        assert token["top"][0] == {"id": token["id"], "token": token["token"], "logprob": token["logprob"]}
        assert -1e-3 < token["logprob"] <= 0
    assert said["tokens"][3]["token"] == "Welt"
    prompt = said["prompt_logprobs"]
    assert prompt[0]["logprob"] is None and prompt[0]["top"] == [] and all(p["logprob"] <= 0 for p in prompt[1:])
    assert said["usage"] == {"prompt_tokens": len(prompt), "cached_tokens": 0, "completion_tokens": 4, "total_tokens": len(prompt) + 4}
    assert (said["n_ctx"], said["kv"], said["model"]) == (256, "f16", str(scripted))
    assert said["timing"]["prefill_seconds"] > 0


def test_json_without_logprobs(kvrun, scripted):
    said = json.loads(kvrun("run", scripted, "hello", "--json").stdout)
    assert said["prompt_logprobs"] is None and all(t["logprob"] is None and t["top"] == [] for t in said["tokens"])


def test_json_holds_no_raw_control_character(kvrun, hostile):
    out = kvrun("run", hostile, "x", "--json").stdout
    assert json.loads(out)["text"].encode() == b"".join(HOSTILE)
    assert not any(c in out.decode() for c in "\x1b\x9b\x07\u202e")


def test_a_reported_seed_gives_the_answer_again(kvrun, random_folder):
    args = ("run", random_folder, "hello", "--json", "--temp", "1", "--max-tokens", "20")
    first, second = (json.loads(kvrun(*args).stdout) for _ in range(2))
    assert first["seed"] != second["seed"] and first["tokens"] != second["tokens"]
    again = json.loads(kvrun(*args, "--seed", first["seed"]).stdout)
    assert again["tokens"] == first["tokens"] and again["seed"] == first["seed"]


def test_stop_and_max_tokens(kvrun, scripted):
    assert kvrun("run", scripted, "x", "--stop", "We").stdout == "Größe,\n".encode()
    assert kvrun("run", scripted, "x", "--stop", "Welt", "--stop", "ö").stdout == b"Gr\n"
    assert kvrun("run", scripted, "x", "--max-tokens", "2").stdout == "Grö\ufffd\n".encode()
    assert kvrun("run", scripted, "x", "--max-tokens", "0").stdout == b"\n"


def test_an_answer_cut_by_the_context_is_said(kvrun, endless):
    result = kvrun("run", endless, "x", "-n", "64")
    assert result.returncode == 7 and result.stdout.startswith(LINES[0] + LINES[1]) and result.stdout.endswith(b"\n")
    assert b"64 tokens" in result.stderr and result.stderr.count(b"\n") == 1
    said = json.loads(kvrun("run", endless, "x", "-n", "64", "--json").stdout)
    assert said["finish_reason"] == "context" and said["usage"]["total_tokens"] == 65


def start_answering(environment, folder):
    process = subprocess.Popen([*KVRUN, "run", str(folder), "x", "-n", "100000"], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    return process, process.stdout.readline()


def test_sigint_ends_the_answer_and_keeps_what_was_said(environment, endless):
    process, first = start_answering(environment, endless)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b""
    said = (first + out).splitlines(keepends=True)
    assert said == (LINES * 1000)[: len(said)]


def test_two_runs_at_once_do_not_disturb_each_other(environment, scripted):
    both = [subprocess.Popen([*KVRUN, "run", str(scripted), "x"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=environment) for _ in range(2)]
    assert [p.communicate(timeout=60) for p in both] == [(SAID, b"")] * 2


def test_kv_says_what_the_cache_has(kvrun, random_folder, tmp_path):
    for kv in ("q8", "q4", "f16/q4"):
        said = json.loads(kvrun("run", random_folder, "x" * 150, "--kv", kv, "--max-tokens", "20", "--json").stdout)
        assert said["kv"] == kv and len(said["tokens"]) == 20
    biased = random_model(tmp_path / "biased", 3, key_bias=200.0)
    result = kvrun("run", biased, "x" * 150, "--kv", "q4", "--max-tokens", "20", "--json")
    assert json.loads(result.stdout)["kv"] == "q8/q4" and result.returncode == 0
    assert b"bias of 200" in result.stderr and result.stderr.count(b"\n") == 1
