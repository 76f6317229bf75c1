"""Every failure is one line on stderr, nothing on stdout, and its exit code."""

import pytest

from kvrun.cli.main import _guarded


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
    for args in (("bench", "x", "--ctx-size", "64"), ("-m", "x")):
        assert b"here it is" not in kvrun(*args).stderr


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


def test_a_model_that_is_not_there(kvrun, tmp_path):
    check(kvrun("run", "smolm2-135m", "x"), 3, "smollm2-135m")
    check(kvrun("run", tmp_path / "absent.gguf", "x"), 3, "absent.gguf")


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
