"""Every failure is one line on stderr, nothing on stdout, and its exit code."""

import json
import subprocess

import pytest

from kvrun.cli.main import _guarded

from ..engine.tiny_model import scripted_model
from .conftest import KVRUN, LINES


def check(result, code, *words):
    assert result.returncode == code, result.stderr
    assert result.stdout == b""
    line = result.stderr.decode()
    assert line.startswith("kvrun: error: ") and line.count("\n") == 1 and line.endswith("\n"), line
    assert "Traceback" not in line
    for word in words:
        assert word in line


def test_usage(kvrun, scripted):
    check(kvrun("rnu"), 2, "'rnu'", "run")
    check(kvrun("run"), 2, "MODEL", "kvrun run --help")
    check(kvrun("run", scripted, "x", "--no-such"), 2, "--no-such")
    check(kvrun("run", scripted, "x", "--temp", "warm"), 2, "--temp")
    check(kvrun("run", scripted, "x", "--top-p", "1.5"), 2, "--top-p")
    check(kvrun("run", scripted, "x", "--device", "abacus"), 2, "--device")
    for kv in ("q3", "", "q4/", "q8/q4/q4", "f32/q8", "bf16"):
        check(kvrun("run", scripted, "x", "--kv", kv), 2, f"--kv {kv}")
    check(kvrun("run", "no-such-model", "x", "--kv", "q5"), 2, "--kv q5")      # before a model is looked for
    check(kvrun("run", scripted, "x", "--logprobs", "3"), 2, "--json")
    check(kvrun("run", scripted, "x", "--raw", "-s", "y"), 2, "--raw")
    check(kvrun("run", scripted, "x", "--repeat-penalty", "0"), 2, "--repeat-penalty")


def test_an_option_of_another_tool(kvrun):
    """It is named as it is here, where the command has it."""
    check(kvrun("run", "-m", "x"), 2, "-m; here it is MODEL", "kvrun run --help")
    check(kvrun("run", "x", "y", "--ctx-size", "64"), 2, "--ctx-size; here it is -n/--n-ctx")
    check(kvrun("run", "x", "y", "-ngl", "99"), 2, "-ngl; here it is --device", "kvrun run --help")
    check(kvrun("run", "-hf", "org/name"), 2, "-hf; here it is MODEL")
    check(kvrun("chat", "x", "-ctk", "q8_0"), 2, "-ctk; here it is --kv")
    check(kvrun("chat", "x", "-fa", "on"), 2, "No such option: -fa (see 'kvrun chat --help')")
    check(kvrun("run", "x", "y", "--max-new-tokens", "5"), 2, "here it is --max-tokens")
    for args in (("bench", "x", "--ctx-size", "64"), ("-m", "x"), ("ls", "-ngl")):
        assert b"here it is" not in kvrun(*args).stderr


def test_an_option_of_another_tool_may_be_a_text(kvrun, scripted):
    for args in (("-s", "-fa", "x"), ("--", "-ngl")):
        assert kvrun("run", scripted, *args).returncode == 0


def test_an_argument_too_many(kvrun):
    check(kvrun("run", "x", "why", "is", "the", "sky", "blue"), 2, "(is the sky blue): a prompt of several words stands in quotes")
    check(kvrun("chat", "x", "-c", "4096"), 2, "(4096): MODEL stands alone; the context's size is -n/--n-ctx")


def test_a_model_is_no_command(kvrun):
    for model in ("smollm2-135m", "org/name", "x.gguf"):
        check(kvrun(model, "hi"), 2, f"{model} is a model", f"'kvrun chat {model}'", f"'kvrun run {model} PROMPT'")


def test_no_arguments_show_the_help(kvrun):
    result = kvrun()
    assert result.returncode == 2 and b"Commands:" in result.stdout and b"-h, --help" in result.stdout and result.stderr == b""
    for args in ((), ("run",), ("session", "ls")):
        assert kvrun("help", *args).stdout == kvrun(*args, "--help").stdout
    check(kvrun("help", "rnu"), 2, "'rnu'", "run")


def test_input_that_is_no_text(kvrun, scripted, tmp_path):
    check(kvrun("run", scripted, "x", input=b"caf\xe9"), 2, "0xe9", "offset 3")
    check(kvrun("run", scripted, "x", input=b"ab\x00cd"), 2, "zero byte", "offset 2")
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n")
    check(kvrun("run", scripted, "x", "-f", path), 2, "picture.png", "0x89")
    check(kvrun("run", scripted, b"\xff".decode(errors="surrogateescape")), 2, "UTF-8")
    check(kvrun("run", scripted, "x", "-f", tmp_path / "absent"), 9, "absent")


def test_input_without_end(environment, scripted):
    """It is refused where no context could hold it, and of a chat's lines the next is taken."""
    result = subprocess.run(["bash", "-c", f"yes | {' '.join(KVRUN)} run {scripted} x"], capture_output=True, env=environment, timeout=60)
    check(result, 2, "standard input has more than 64 MiB")
    lines = f"(head -c 70000000 /dev/zero; echo; echo hi) | {' '.join(KVRUN)} chat {scripted} --no-save"
    result = subprocess.run(["bash", "-c", lines], capture_output=True, env=environment, timeout=60)
    assert result.returncode == 0 and result.stdout.count(b"\n") == 2
    assert result.stderr == b"kvrun: error: line 1 of standard input has more than 64 MiB; it was skipped\n"


def test_a_full_context_names_what_helps(kvrun, tmp_path):
    """A larger n_ctx only where there is one."""
    folder = scripted_model(tmp_path / "m", LINES, loop=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    check(kvrun("run", folder, "word " * 300, "-n", "64"), 7, "the context holds 64; shorten the prompt, use a larger --n-ctx (at most 512), or use --overflow evict")
    check(kvrun("run", folder, "word " * 300), 7, "the context holds 512, all that the model was trained for; shorten the prompt or use --overflow evict")
    for args, words in ((("-n", "64"), b"use a larger --n-ctx (at most 512) or --overflow evict to go on"), ((), b"; use --overflow evict to go on")):
        result = kvrun("run", folder, "go", *args)
        assert result.returncode == 7 and words in result.stderr


def test_a_model_that_is_not_there(kvrun, tmp_path):
    check(kvrun("run", "smolm2-135m", "x"), 3, "smollm2-135m")
    check(kvrun("run", tmp_path / "absent.gguf", "x"), 3, "absent.gguf")
    check(kvrun("run", "xyzzy", "x"), 3, "'kvrun ls --aliases' lists the aliases")
    for link in ("hf.co/org/name", "https://huggingface.co/org/name/tree/main"):
        check(kvrun("run", link, "x"), 3, "write org/name")


def test_a_name_with_escapes_is_shown_not_executed(kvrun):
    check(kvrun("run", "./no\x1b[2J\nsuch", "x"), 3, "\\x1b[2J\\nsuch")


def test_verbose_adds_the_trace(kvrun, tmp_path):
    result = kvrun("run", tmp_path / "absent.gguf", "x", "-v")
    err = result.stderr.decode()
    assert result.returncode == 3 and err.startswith("Traceback") and err.splitlines()[-1].startswith("kvrun: error: ")


@pytest.mark.parametrize(("error", "code", "words"), [
    (MemoryError(), 6, "out of memory"),
    (OSError(28, "No space left on device", "/data/x"), 9, "no space left on the disk: /data/x"),
    (PermissionError(13, "Permission denied", "/data/x"), 9, "Permission denied: /data/x"),
    (ZeroDivisionError("oops"), 1, "internal error: ZeroDivisionError: oops; run it again with -v"),
])
def test_what_nobody_expected_still_is_one_line(capfd, error, code, words):
    def fail() -> int:
        raise error

    assert _guarded(fail) == code
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
