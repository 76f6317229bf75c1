"""Files made to be too much: each is refused in a process that has little memory and little time, and nothing else is harmed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .target import CORPUS

MEMORY = 700 << 20
"""Bytes of address space for the process, its libraries included."""
SECONDS = 30
"""Of computing."""


def limited(code: str, *arguments: object, memory: int = MEMORY) -> str:
    """What `code` prints, in a process with limits: the class of what was raised, and the message."""
    program = f"import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))\nresource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))\n"
    program += "try:\n" + textwrap.indent(textwrap.dedent(code), "    ") + "\n    print('taken')\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf(*pairs: bytes, n_keys: int | None = None, n_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(pairs) if n_keys is None else n_keys) + b"".join(pairs)


def array(key: bytes, kind: int, count: int) -> bytes:
    return string(key) + struct.pack("<IIQ", 9, kind, count)


GGUF = {
    "a string of 2^62 bytes": (gguf(string(b"general.architecture") + struct.pack("<IQ", 8, 1 << 62)), "damaged"),
    "a key of 2^40 bytes": (gguf(struct.pack("<Q", 1 << 40)), "a metadata key of"),
    "an array of 2^63 strings": (gguf(array(b"tokenizer.ggml.tokens", 8, 1 << 63)), "an array of"),
    "an array of 2^30 bytes": (gguf(array(b"x", 0, 1 << 30)) + bytes(4096), "an array of"),
    "an array of arrays": (gguf(array(b"x", 9, 1 << 20)), "an array of value type 9"),
    "2^60 keys": (gguf(n_keys=1 << 60), "claims"),
    "2^50 tensors": (gguf(n_tensors=1 << 50), "claims"),
    "a tensor of 2^63 elements": (gguf(n_tensors=1) + string(b"a") + struct.pack("<IQQIQ", 2, 1 << 31, 1 << 32, 0, 0), "has shape"),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf(tmp_path, name):
    """The file is stretched with a hole to 8 GiB, so that no size in it is refused for the end of the file alone."""
    data, says = GGUF[name]
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(8 << 30)
    said = limited("from kvrun.weights.gguf_file import GgufFile\nfrom pathlib import Path\nGgufFile(Path(sys.argv[1]))", path)
    assert said.startswith("ModelError") and says in said


SAFETENSORS = {
    "a header of 2^63 bytes": struct.pack("<Q", 1 << 63),
    "a header of 4 GiB": struct.pack("<Q", 4 << 30) + b'{"a"',
    "a header of 99 MB": struct.pack("<Q", 99_000_000) + b'{"a":' + b"[" * 1000,
    "a tensor of 2^60 elements": struct.pack("<Q", 80) + json.dumps({"a": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}).ljust(80).encode(),
    "a nested header": struct.pack("<Q", 4096) + b"[" * 4096,
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(tmp_path, name):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(SAFETENSORS[name])
        file.truncate(6 << 30)
    code = "from kvrun.weights.folder import FolderSource\nfrom pathlib import Path\nFolderSource(Path(sys.argv[1]))"
    # the library that validates the header maps the whole file, which costs address space and no memory
    assert limited(code, tmp_path, memory=MEMORY + (6 << 30)).startswith("ModelError")


CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 1e4, "tie_word_embeddings": False}


@pytest.mark.parametrize(("key", "value"), [
    ("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("hidden_size", 1 << 40), ("num_attention_heads", 1 << 30), ("head_dim", 1 << 31),
    ("max_position_embeddings", 1 << 62), ("layer_types", ["full_attention"] * 500_000), ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0] * 500_000}),
    ("eos_token_id", 1 << 80), ("intermediate_size", "9" * 100_000), ("rope_theta", 1e308)])
def test_config(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}), encoding="utf-8")
    said = limited("from kvrun.hub.folder import open_config\nfrom kvrun.models import load_spec\nfrom pathlib import Path\n"
                   "load_spec(open_config(Path(sys.argv[1]), 'm').config, 'config.json')", tmp_path)
    assert said.startswith("ModelError") and len(said) < 500


def test_nested_json(tmp_path):
    (tmp_path / "config.json").write_text("[" * 1_000_000, encoding="utf-8")
    said = limited("from kvrun.hub.folder import open_config\nfrom pathlib import Path\nopen_config(Path(sys.argv[1]), 'm')", tmp_path)
    assert said.startswith("ModelError") and "not valid JSON" in said


@pytest.mark.parametrize("name", sorted(path.name for path in (CORPUS / "tokenizer").glob("bomb-*")))
def test_tokenizers(tmp_path, name):
    """They are refused, or as harmless as they look when read; a doubling, an exponential regular expression and ids of 2^32 are refused."""
    (tmp_path / "tokenizer.json").write_bytes((CORPUS / "tokenizer" / name).read_bytes())
    code = "from kvrun.text.folder_tokenizer import from_folder\nfrom pathlib import Path\nt = from_folder(Path(sys.argv[1]))\nt.encoder.encode('a' * 4000)"
    said = limited(code, tmp_path, memory=2 * MEMORY)
    assert said == "taken" or said.startswith("ModelError")
    assert said != "taken" or name not in ("bomb-doubling", "bomb-regex", "bomb-vocab-id", "bomb-prepend")


def test_a_tokenizer_that_was_found_good_is_not_tried_again(tmp_path, monkeypatch):
    from kvrun.text import tokenizer_guard as guard

    monkeypatch.setenv("KVRUN_CACHE", str(tmp_path))
    data = (CORPUS / "tokenizer" / "byte-level").read_bytes()
    assert guard.why_not(data) is None and len(list((tmp_path / "checked").iterdir())) == 1
    monkeypatch.setattr(guard, "_try", lambda data: "tried")
    assert guard.why_not(data) is None and guard.why_not(data + b" ") == "tried"


# ---- sessions ----


def _session(tmp_path: Path, **parts) -> str:
    from kvrun.cache.session import write_document

    from ..cache.documents import document

    write_document(tmp_path, document(**parts))
    return limited("from kvrun.cache.session import read_document\nfrom pathlib import Path\nread_document(Path(sys.argv[1]))", tmp_path)


@pytest.mark.parametrize("parts", [
    {"tokens": [1], "positions": [[0, 10**12]]}, {"tokens": [1], "positions": [[0, 1], [5, 1]]}, {"tokens": [1] * 9, "positions": [[0, 9]], "drawn": [[0, 10**12]]},
    {"tokens": [1], "positions": [[0, 1]], "marks": [[1, 1, [[[0, 10**12]]], [], [], None]]},
    {"turns": [{"user": "", "assistant": "", "same": 0, "read": [1] * 3000, "said": []}] + [{"user": "", "assistant": "", "same": 3000, "read": [], "said": []}] * 50_000},
    {"pages": [[0, 0, 1, "../../../victim.safetensors"]]}, {"pages": [[0, 0, 1, "/etc/passwd"]]},
    {"tokens": [1], "positions": [[0, 1]], "marks": [[1, 1, [[[0, 1]]], [], [], "../victim"]]}, {"settings": {"sampler": {"temperature": "hot"}}},
], ids=lambda parts: "-".join(parts))
def test_sessions(tmp_path, parts):
    assert _session(tmp_path, **parts).startswith("DamagedSessionError")


def test_a_sound_session(tmp_path):
    assert _session(tmp_path, tokens=[1, 2], positions=[[0, 2]]) == "taken"
