"""A Hub on loopback that the real huggingface_hub client talks to, and kvrun run in processes of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest


@dataclass
class Repo:
    """A repository. revisions: branch, tag or commit -> commit; trees: commit -> file name -> content."""

    revisions: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None

    def commit(self, files: dict[str, bytes], *names: str) -> str:
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.trees[sha] = files
        for name in (sha, *names):
            self.revisions[name] = sha
        return sha


class Hub:
    """The part of the Hub's HTTP interface that downloads use.

    requests: (method, path, Range) of each. cut: file name -> how often its body ends early, after `cut_at` bytes.
    swapped: file name -> what is sent in place of its content. broken: answer everything with this status. failing: file name ->
    the status that asking for it gets. stalled: names of files whose body stops after `cut_at` bytes, with the connection open until
    `moving` is set. moved: file name -> where its content is said to be.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}
        self.cut_at = 0
        self.swapped: dict[str, bytes] = {}
        self.broken: int | None = None
        self.failing: dict[str, int] = {}
        self.stalled: set[str] = set()
        self.moving = threading.Event()
        self.moved: dict[str, str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.handle_error = lambda *request: None  # a client that leaves in the middle is what some tests are about
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.moving.set()
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """File names whose content was asked for."""
        return [p.rsplit("/", 1)[1] for m, p, _ in self.requests if m == "GET" and "/resolve/" in p]


def _is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf", "tokenizer.json"))


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def do_HEAD(self) -> None:
            self.serve()

        def do_GET(self) -> None:
            self.serve()

        def serve(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if hub.broken:
                return self.fail(hub.broken, None)
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            parts = parts[2:] if api else parts
            repo = hub.repos.get("/".join(parts[:2]))
            if repo is None or len(parts) < 4:
                return self.fail(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
            kind, revision = parts[2], parts[3]
            if revision not in repo.revisions:
                return self.fail(404, "RevisionNotFound")
            commit = repo.revisions[revision]
            tree = repo.trees[commit]
            if api:
                return self.json(self.info("/".join(parts[:2]), commit, tree) if kind == "revision" else self.tree(tree))
            if repo.gated and self.headers.get("Authorization") != f"Bearer {repo.token}":
                return self.fail(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            name = "/".join(parts[4:])
            if name not in tree:
                return self.fail(404, "EntryNotFound")
            if name in hub.failing:
                return self.fail(hub.failing[name], None)
            if name in hub.moved:
                self.send_response(302)
                self.send_header("Location", hub.moved[name])
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.file(name, commit, tree[name])

        def info(self, repo: str, commit: str, tree: dict[str, bytes]) -> dict:
            siblings = [{"rfilename": n, "size": len(c), "blobId": _oid(c)} | (
                {"lfs": {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c), "pointerSize": 134}} if _is_lfs(n) else {})
                for n, c in tree.items()]
            return {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "private": False, "disabled": False,
                    "gated": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}

        def tree(self, tree: dict[str, bytes]) -> list:
            return [{"type": "file", "path": n, "size": len(c), "oid": _oid(c)} | (
                {"lfs": {"oid": hashlib.sha256(c).hexdigest(), "size": len(c), "pointerSize": 134}} if _is_lfs(n) else {})
                for n, c in tree.items()]

        def json(self, value) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def fail(self, status: int, code: str | None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def file(self, name: str, commit: str, content: bytes) -> None:
            start = 0
            if ask := self.headers.get("Range"):
                start = int(ask.removeprefix("bytes=").split("-")[0])
            self.send_response(206 if ask else 200)
            self.send_header("X-Repo-Commit", commit)
            etag = hashlib.sha256(content).hexdigest() if _is_lfs(name) else _oid(content)
            self.send_header("ETag", f'"{etag}"')
            if _is_lfs(name):
                self.send_header("X-Linked-Etag", f'"{etag}"')
                self.send_header("X-Linked-Size", str(len(content)))
            body = hub.swapped.get(name, content)[start:]
            if ask:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cut.get(name):
                hub.cut[name] -= 1
                self.wfile.write(body[:hub.cut_at])
                self.close_connection = True
                return
            if name in hub.stalled:
                self.wfile.write(body[:hub.cut_at])
                hub.moving.wait(60)
                body = body[hub.cut_at:]
            try:
                self.wfile.write(body)
            except ConnectionError:
                pass  # the client has given up

    return Handler


@pytest.fixture
def hub():
    """A Hub without repositories."""
    server = Hub()
    yield server
    server.close()


def tiny_config() -> dict:
    """config.json of a Llama of 2 layers, 2 heads of 32, hidden 64, vocabulary 96."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 96,
            "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "torch_dtype": "float32",
            "bos_token_id": 1, "eos_token_id": 2}


def tiny_tensors() -> dict[str, np.ndarray]:
    """Random weights for tiny_config."""
    draw = np.random.default_rng()
    shapes = {"model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,)}
    for i in range(2):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (64,), p + "post_attention_layernorm.weight": (64,),
                   p + "self_attn.q_proj.weight": (64, 64), p + "self_attn.k_proj.weight": (32, 64),
                   p + "self_attn.v_proj.weight": (32, 64), p + "self_attn.o_proj.weight": (64, 64),
                   p + "mlp.gate_proj.weight": (96, 64), p + "mlp.up_proj.weight": (96, 64),
                   p + "mlp.down_proj.weight": (64, 96)}
    return {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def tiny_files(shards: int = 1) -> dict[str, bytes]:
    """The files of a repository: a model in `shards` shards, and things that a download has no use for."""
    from safetensors.numpy import save

    files = {"config.json": json.dumps(tiny_config()).encode(), "tokenizer.json": b"{}", "README.md": b"hello",
             "generation_config.json": b'{"eos_token_id": [2, 3], "temperature": 0.5}',
             "chat_template.jinja": b"{{ messages }}", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"other",
             "onnx/model.onnx": b"onnx", "flax_model.msgpack": b"flax"}
    tensors = tiny_tensors()
    if shards == 1:
        return files | {"model.safetensors": save(tensors)}
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        files[shard] = save(part)
        weight_map |= dict.fromkeys(part, shard)
    return files | {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


def add(hub: Hub, name: str = "org/tiny", shards: int = 1, **extra) -> Repo:
    """Puts a new repository with tiny_files on the Hub."""
    repo = hub.repos[name] = Repo(**extra)
    repo.commit(tiny_files(shards), "main")
    return repo


@dataclass
class Machine:
    """A machine of its own: empty caches, no configuration. env: what its processes see."""

    home: Path
    env: dict[str, str]

    def start(self, code: str, *args: str, **env: str) -> subprocess.Popen:
        """Runs `code` in a new Python; `args` become sys.argv[1:]."""
        return subprocess.Popen([sys.executable, "-c", code, *args], env=self.env | env, cwd=self.home, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def python(self, code: str, *args: str, **env: str) -> subprocess.CompletedProcess:
        child = self.start(code, *args, **env)
        out, err = child.communicate(timeout=120)
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    def kvrun(self, *args: str, **env: str) -> subprocess.CompletedProcess:
        """Runs one of the store's commands as the command line would."""
        return self.python(COMMAND, *args, **env)


COMMAND = """
import sys, typer
from kvrun.cli import ls, pull, rm, show, verify
from kvrun.errors import KvrunError
app = typer.Typer(pretty_exceptions_enable=False)
for module, name in ((ls, "ls"), (pull, "pull"), (rm, "rm"), (show, "show"), (verify, "verify")):
    app.command(name)(getattr(module, name))
try:
    app(sys.argv[1:])
except KvrunError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""

RESOLVE = """
import dataclasses, json, sys
from kvrun.errors import KvrunError
from kvrun.hub import resolve
try:
    files = resolve(*sys.argv[1:2], **(json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}))
except KvrunError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
print(json.dumps({k: str(v) if k == "path" else v for k, v in vars(files).items() if k != "gguf"}))
"""


@pytest.fixture
def machine(tmp_path, hub):
    """A machine whose Hub is `hub` and whose package index is the empty folder `wheels`."""
    home = tmp_path / "home"
    (home / "wheels").mkdir(parents=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "PIP_", "XDG_", "KVRUN_", "TRANSFORMERS"))}
    env = kept | {
        "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": hub.url, "KVRUN_CACHE": str(home / "kvrun"),
        "XDG_CONFIG_HOME": str(home / "config"), "PYTHONPATH": str(Path(__file__).parents[2]), "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(home / "wheels"), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }
    return Machine(home, env)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> bytes:
    """A GGUF file of the tiny Llama, f32."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(96)])
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers.": "blk."}
    for name, tensor in tiny_tensors().items():
        for hf, short in names.items():
            name = name.replace(hf, short)
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def keep_packed(machine: Machine, source: Path | str) -> Path:
    """A file as quantized weights of `source` are kept in."""
    code = """
import sys
from pathlib import Path
from kvrun.hub.store import packed_path
path = packed_path(Path(sys.argv[1]), b"some layout")
path.parent.mkdir(parents=True, exist_ok=True)
path.write_bytes(b"weights")
print(path)
"""
    return Path(machine.python(code, str(source)).stdout.strip())
