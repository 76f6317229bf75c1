"""What kvrun's own sources never do: run what a file holds, ask a shell, or open a connection that nobody asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvrun

from ..cli.conftest import KVRUN
from .disks import without_network

SOURCES = sorted(Path(kvrun.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop", "runpy", "imp"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
ATTRIBUTES = {("os", "system"), ("os", "popen"), ("torch", "load"), ("np", "load"), ("numpy", "load"), ("importlib", "import_module"),
              ("yaml", "load"), ("subprocess", "getoutput"), ("subprocess", "getstatusoutput"), ("torch.hub", "load"), ("jit", "load")}
KEYWORDS = {"trust_remote_code", "shell", "allow_pickle", "weights_only"}
# The names of our own families and commands, which no file can choose: kvrun/models/family.py and kvrun/cli/main.py list them.
ALLOWED = {("family.py", "import_module"), ("main.py", "import_module")}


def found(path: Path, text: str) -> list[str]:
    """What a source does that none should, with its line."""
    out = []
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        out += [f"{path.name}:{node.lineno} imports {name}" for name in names if name.partition(".")[0] in MODULES]
        if isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            out.append(f"{path.name}:{node.value.lineno} {node.arg}=")
        if isinstance(node, ast.Attribute) and (ast.unparse(node.value).rpartition(".")[2], node.attr) in ATTRIBUTES \
                and (path.name, node.attr) not in ALLOWED:
            out.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
        if isinstance(node, ast.Name) and node.id in CALLS:
            out.append(f"{path.name}:{node.lineno} {node.id}")
    return out


def test_no_source_runs_what_a_file_holds():
    assert len(SOURCES) > 100
    assert [line for path in SOURCES for line in found(path, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "eval('1')", "f = exec", "import os\nos.system('ls')",
    "import subprocess\nsubprocess.run('ls', shell=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "import numpy as np\nnp.load('x')",
    "__import__('os')", "import importlib\nimportlib.import_module(name)", "os.popen('id')", "import marshal",
])
def test_and_the_check_would_find_it(text):
    assert found(Path("x.py"), text)


def test_every_process_of_ours_is_named_by_its_program():
    """No command line is put together from text: each is a list."""
    calls = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in ("subprocess.run", "subprocess.Popen", "subprocess.check_output")]
    assert calls and all(isinstance(call.args[0], (ast.List, ast.Name)) for call in calls)


def test_row_26_offline_in_a_namespace_without_a_network(environment, scripted, tmp_path):
    """Everything that works offline works where there is no network at all, and what would be fetched is refused in a line."""
    alone = without_network()
    mine = environment | {"XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    mine.pop("HF_HUB_OFFLINE", None)

    def run(*args, input=b"", **env):
        return subprocess.run([*alone, *KVRUN, *map(str, args)], input=input, capture_output=True, env=mine | env, timeout=120)

    assert run("run", scripted, "x").stdout == run("run", scripted, "x", "--offline").stdout == "Größe,\nWelt\n".encode()
    assert run("chat", scripted, "--offline", input=b"x\n").stdout == "Größe,\nWelt\n".encode()
    for args in (("plan", scripted), ("show", scripted), ("verify", scripted), ("ls",), ("doctor",), ("session", "ls")):
        assert run(*args).returncode == 0, args
    for args, env in ((("run", "org/absent", "x", "--offline"), {}), (("run", "org/absent", "x"), {"HF_HUB_OFFLINE": "1"}),
                      (("run", "org/absent", "x"), {}), (("pull", "org/absent"), {"HF_HUB_OFFLINE": "1"})):
        refused = run(*args, **env)
        assert refused.returncode == 3 and refused.stderr.count(b"\n") == 1 and b"org/absent" in refused.stderr, refused.stderr


WATCH = """
import sys
def watch(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        print("SOCKET", event, args, file=sys.stderr)
sys.addaudithook(watch)
from kvrun.__main__ import main
sys.exit(main())
"""


def test_row_26_offline_asks_for_no_address_and_no_connection(environment, scripted, tmp_path):
    mine = environment | {"XDG_STATE_HOME": str(tmp_path / "state")}
    for args, input in ((("run", scripted, "x", "--offline"), b""), (("chat", scripted, "--offline"), b"x\n"), (("doctor",), b""),
                        (("plan", scripted), b""), (("run", "org/absent", "x", "--offline"), b""), (("run", "smollm2-135m", "x", "--offline"), b"")):
        result = subprocess.run([sys.executable, "-c", WATCH, *map(str, args)], input=input, capture_output=True, env=mine, timeout=120)
        assert b"SOCKET" not in result.stderr and result.returncode in (0, 3), (args, result.stderr)
