"""Hub repositories, through the real client and a Hub on loopback."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import RESOLVE, Repo, add, keep_packed, tiny_files

NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}


def test_fetches_what_a_model_needs_and_nothing_else(hub, machine):
    repo = add(hub)
    got = machine.python(RESOLVE, "org/tiny")
    assert got.returncode == 0, got.stderr
    files = json.loads(got.stdout)
    assert set(hub.fetched()) == NEEDED and len(hub.fetched()) == len(NEEDED)
    assert {p.name for p in Path(files["path"]).iterdir()} == NEEDED
    assert files["revision"] == repo.revisions["main"] and files["kind"] == "folder" and files["source"] == "hub"
    assert files["generation_config"]["eos_token_id"] == [2, 3]
    assert files["path"].startswith(str(machine.home / "hf" / "hub" / "models--org--tiny"))


def test_a_model_that_is_here_asks_nobody(hub, machine):
    add(hub, shards=3)
    assert machine.python(RESOLVE, "org/tiny").returncode == 0
    hub.requests.clear()
    again = machine.python(RESOLVE, "org/tiny")
    assert again.returncode == 0 and hub.requests == []


def test_shards_of_the_index(hub, machine):
    add(hub, shards=3)
    got = machine.python(RESOLVE, "org/tiny")
    assert got.returncode == 0, got.stderr
    shards = [n for n in hub.fetched() if n.endswith(".safetensors")]
    assert sorted(shards) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_revisions(hub, machine):
    repo = add(hub)
    other = repo.commit(tiny_files(), "v1")
    for model, options in (("org/tiny@v1", {}), ("org/tiny", {"revision": "v1"}), (f"org/tiny@{other}", {})):
        got = machine.python(RESOLVE, model, json.dumps(options))
        assert json.loads(got.stdout)["revision"] == other, got.stderr
    lost = machine.python(RESOLVE, "org/tiny@v2")
    assert lost.returncode == 3 and "v2" in lost.stderr and lost.stderr.count("\n") == 1
    both = machine.python(RESOLVE, "org/tiny@v1", '{"revision": "main"}')
    assert both.returncode == 2


def test_no_such_repository(hub, machine):
    lost = machine.python(RESOLVE, "org/nothing")
    assert lost.returncode == 3 and "org/nothing" in lost.stderr and lost.stderr.count("\n") == 1


def test_pull_follows_a_branch_and_run_does_not(hub, machine):
    repo = add(hub)
    old = repo.revisions["main"]
    assert machine.kvrun("pull", "org/tiny").returncode == 0
    new = repo.commit(tiny_files(), "main")
    assert json.loads(machine.python(RESOLVE, "org/tiny").stdout)["revision"] == old
    assert machine.kvrun("pull", "org/tiny").returncode == 0
    assert json.loads(machine.python(RESOLVE, "org/tiny").stdout)["revision"] == new


def test_weights_of_another_name(hub, machine):
    repo = hub.repos["org/named"] = Repo()
    files = tiny_files()
    files["weights.safetensors"] = files.pop("model.safetensors")
    repo.commit(files, "two")
    repo.commit({k: v for k, v in files.items() if k != "consolidated.safetensors"}, "main")
    assert machine.python(RESOLVE, "org/named").returncode == 0
    hub.requests.clear()
    assert machine.python(RESOLVE, "org/named").returncode == 0 and hub.requests == []
    unclear = machine.python(RESOLVE, "org/named@two")
    assert unclear.returncode == 5 and "which of its files" in unclear.stderr


def test_names_that_would_leave_the_cache(hub, machine):
    """A listing is foreign text: nothing outside the cache is read, checked or removed for it."""
    victim = machine.home / "victim.safetensors"
    victim.write_text("mine")
    files = tiny_files(2)
    index = json.loads(files["model.safetensors.index.json"])
    away = "../../../../../victim.safetensors"
    index["weight_map"] = dict.fromkeys(index["weight_map"], away)
    hub.repos["org/evil"] = Repo()
    hub.repos["org/evil"].commit(files | {"model.safetensors.index.json": json.dumps(index).encode(), away: b"theirs"}, "main")
    got = machine.kvrun("pull", "org/evil")
    assert got.returncode != 0 and victim.read_text() == "mine" and got.stderr.count("\n") == 1, got.stderr


def test_a_repository_of_gguf_files(hub, machine, tiny_gguf):
    repo = hub.repos["org/ggufs"] = Repo()
    repo.commit({"README.md": b"", "tiny-q8.gguf": tiny_gguf, "tiny-f16.gguf": b"other"}, "main")
    unnamed = machine.python(RESOLVE, "org/ggufs")
    assert unnamed.returncode == 5 and "org/ggufs/tiny" in unnamed.stderr
    got = machine.python(RESOLVE, "org/ggufs/tiny-q8.gguf")
    assert got.returncode == 0, got.stderr
    files = json.loads(got.stdout)
    assert files["kind"] == "gguf" and files["revision"] == repo.revisions["main"]
    assert hub.fetched() == ["tiny-q8.gguf"]
    (row,) = json.loads(machine.kvrun("ls", "--json").stdout)
    assert (row["name"], row["format"], row["n_bytes"]) == ("org/ggufs/tiny-q8.gguf", "gguf", len(tiny_gguf))
    assert machine.kvrun("rm", "org/ggufs/tiny-q8.gguf", "--yes").returncode == 0
    assert json.loads(machine.kvrun("ls", "--json").stdout) == [] and not Path(files["path"]).exists()


def test_a_cache_that_cannot_be_written(hub, machine):
    add(hub)
    file = machine.home / "file"
    file.write_text("")
    got = machine.python(RESOLVE, "org/tiny", HF_HOME=str(file))
    assert got.returncode == 9 and got.stderr.count("\n") == 1, got.stderr


def test_ls_show_and_rm(hub, machine):
    add(hub, shards=2)
    assert machine.kvrun("pull", "org/tiny").returncode == 0
    (row,) = json.loads(machine.kvrun("ls", "--json").stdout)
    assert row["name"] == "org/tiny" and row["format"] == "safetensors" and row["source"] == "hub"
    shown = json.loads(machine.kvrun("show", "org/tiny", "--json").stdout)
    assert shown["layers"] == 2 and shown["kv_bytes_per_token"] == 2 * 2 * 1 * 32 * 2
    assert shown["parameters"] == 96 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert shown["chat_template"] is True
    asked = machine.kvrun("rm", "org/tiny")
    assert asked.returncode == 2 and json.loads(machine.kvrun("ls", "--json").stdout)
    packed = keep_packed(machine, row["path"])
    assert machine.kvrun("rm", "org/tiny", "--yes").returncode == 0 and not packed.exists()
    assert json.loads(machine.kvrun("ls", "--json").stdout) == []
    assert not list((machine.home / "hf/hub").glob("models--org--tiny/blobs/*"))
    assert machine.kvrun("rm", "org/tiny", "--yes").returncode == 3


def test_the_shape_alone_is_config_json_alone(hub, machine):
    add(hub)
    shape = machine.python(RESOLVE, "org/tiny", '{"weights": false}')
    assert shape.returncode == 0, shape.stderr
    files = json.loads(shape.stdout)
    assert hub.fetched() == ["config.json"] and files["kind"] == "config" and files["source"] == "hub"
    hub.requests.clear()
    again = machine.python(RESOLVE, "org/tiny", '{"weights": false, "offline": true}')
    assert again.returncode == 0 and hub.requests == []
    refused = machine.python(RESOLVE, "org/tiny", '{"offline": true}')  # a shape is no model
    assert refused.returncode == 3 and "kvrun pull org/tiny" in refused.stderr
    whole = machine.python(RESOLVE, "org/tiny")
    assert whole.returncode == 0 and set(hub.fetched()) == NEEDED - {"config.json"}
    assert json.loads(machine.python(RESOLVE, "org/tiny", '{"weights": false}').stdout)["kind"] == "folder"
