"""Help that is there at once and tells the truth."""

import shlex
import subprocess
import sys

import pytest
import typer

from kvrun.cli.main import command_line

COMMAND = typer.main.get_command(command_line())
HEAVY = ("torch", "numpy", "transformers", "tokenizers", "huggingface_hub", "rich", "jinja2", "prompt_toolkit", "gguf", "cffi")


LEAVES = {name: command for name, command in COMMAND.commands.items() if not hasattr(command, "commands")}
LEAVES |= {f"{group} {name}": command for group, members in COMMAND.commands.items() for name, command in getattr(members, "commands", {}).items()}


@pytest.mark.parametrize("args", [[], *(name.split() for name in sorted({*COMMAND.commands, *LEAVES}))], ids=lambda a: " ".join(["kvrun", *a]))
def test_help_imports_nothing_heavy(args, environment):
    code = (f"import sys\nfrom kvrun.cli.main import main\ncode = main({[*args, '--help']!r})\n"
            f"sys.stderr.write(' '.join(m for m in {HEAVY!r} if m in sys.modules))\nsys.exit(code)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert result.returncode == 0 and result.stderr == b""
    assert b"Usage: kvrun" in result.stdout and b"{" not in result.stdout.split(b"\n")[0] and b"\x1b" not in result.stdout


@pytest.mark.parametrize("name", ["", *sorted(LEAVES)])
def test_every_example_is_a_command_line_that_parses(name):
    text = LEAVES[name].help if name else COMMAND.help
    found = [line.strip() for line in text.split("Examples:")[1].split("Exit codes")[0].splitlines() if "kvrun" in line]
    assert len(found) >= 3
    for line in found:
        words = shlex.split(line[line.index("kvrun") :])
        stop = next((i for i, word in enumerate(words) if word in ("|", ">", "&&")), len(words))
        used = next(leaf for leaf in (" ".join(words[1:3]), words[1]) if leaf in LEAVES)
        assert not name or used == name
        # raises for a wrong option or value; runs nothing
        LEAVES[used].make_context(used, words[1 + len(used.split()) : stop])


def test_version(kvrun):
    from kvrun import __version__

    result = kvrun("--version")
    assert (result.returncode, result.stdout) == (0, f"kvrun {__version__}\n".encode())


def test_doctor_reports_without_importing_torch(environment):
    import json

    code = ("import sys\nfrom kvrun.cli.main import main\ncode = main(['doctor', '--json'])\n"
            "sys.stderr.write(' '.join(m for m in ('torch', 'transformers') if m in sys.modules))\nsys.exit(code)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    report = json.loads(result.stdout)
    assert report["versions"]["torch"][0].isdigit() and report["versions"]["kvrun"]
    assert str(environment["HOME"]) in report["places"]["packaged models"]
    if "problem" not in report["native kernels"]:
        assert report["native kernels"]["instruction set"] in ("plain", "avx2", "avx512", "amx")
        assert report["memory reading"]["1 thread"].endswith("GB/s")


def test_doctor_for_people(kvrun):
    result = kvrun("doctor")
    assert result.returncode == 0 and result.stderr == b""
    for heading in (b"versions", b"native kernels", b"memory", b"cuda", b"places"):
        assert b"\n" + heading + b"\n" in b"\n" + result.stdout


@pytest.mark.parametrize(("words", "offered"), [
    ("kvrun ver", b"verify"), ("kvrun run smollm2-", b"smollm2-135m"), ("kvrun chat --mark", b"--markdown"), ("kvrun session exp", b"export"),
    ("kvrun run x --kv q8", b"q8/q4"),
])
def test_the_shell_completes(environment, words, offered):
    """As the script does that --install-completion writes for bash."""
    result = subprocess.run([sys.executable, "-m", "kvrun"], capture_output=True, timeout=60, env=environment | {
        "_KVRUN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)})
    assert offered in result.stdout.split() and result.stderr == b""
