"""Rows 19 to 23: memory, contexts and formats that are not there."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import time

import pytest

from ..cli.conftest import KVRUN, LINES, dropped_on_stderr, last_document
from ..engine.tiny_model import random_model
from .conftest import check

PAGE = 128


@pytest.fixture
def vast(copy):
    """A model that was trained for a billion positions."""
    folder = copy("vast")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 30}))
    return folder


def test_row_19_a_plan_that_exceeds_memory_is_refused_before_loading(kvrun, vast):
    """The weights are cut short, which whoever loads them would say."""
    path = vast / "model.safetensors"
    for command in (["run", vast, "x"], ["chat", vast]):
        line = check(kvrun(*command, "-n", 1 << 30, input=b"x\n"), 6, "MiB needed for n_ctx 1073741824", "use --n-ctx ")
        fits = int(re.search(r"use --n-ctx (\d+)", line)[1])
        assert 8192 < fits < 1 << 30 and fits % PAGE == 0
    # the largest that fits is largest: a half more is refused again, with much the same advice
    line = check(kvrun("run", vast, "x", "-n", fits * 3 // 2), 6, "use --n-ctx ")
    assert 0.5 < int(re.search(r"use --n-ctx (\d+)", line)[1]) / fits < 1.5
    assert path.exists() and kvrun("run", vast, "x", "-n", "8192").returncode == 0


def test_row_20_out_of_memory_in_the_middle_of_a_chat(environment, state, endless):
    """The process may have no more memory from the second turn on, whose message is long."""
    chat = subprocess.Popen([*KVRUN, "chat", str(endless), "--max-tokens", "3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment | state)
    chat.stdin.write(b"one\n")
    chat.stdin.flush()
    while not chat.stdout.readline().startswith(b"line 102"):
        assert chat.poll() is None
    while not (chats := list(os.scandir(state["XDG_STATE_HOME"] + "/kvrun/sessions"))) or not os.path.exists(chats[0].path + "/session.json"):
        time.sleep(0.01)
    with open(f"/proc/{chat.pid}/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + (40 << 20)
    resource.prlimit(chat.pid, resource.RLIMIT_AS, (limit, limit))
    _, err = chat.communicate(b"two " * 300_000 + b"\n", timeout=100)
    assert chat.returncode == 6 and err.count(b"\n") == 1 and b"memory" in err, (chat.returncode, err)
    assert [turn["user"] for turn in last_document(state)["turns"]] == ["one"]
    again = subprocess.run([*KVRUN, "chat", "-c", "--max-tokens", "3"], input=b"two\n", capture_output=True, env=environment | state, timeout=60)
    assert again.returncode == 0 and b"1 turn" in again.stderr and again.stdout == b"".join(LINES[:3])


def test_row_20_a_text_that_memory_does_not_hold(kvrun, scripted, tmp_path):
    (tmp_path / "book").write_bytes(b"word " * 1_000_000)
    check(kvrun("run", scripted, "-f", tmp_path / "book", "x", "-n", "512", memory=1 << 30), 6, "memory")


def test_row_21_a_prompt_longer_than_the_context(kvrun, scripted):
    text = "word " * 300
    line = check(kvrun("run", scripted, text, "-n", "512"), 7, " tokens ", " 512")
    assert re.search(r"the prompt has \d{4} tokens", line)
    result = kvrun("run", scripted, text, "-n", "512", "--overflow", "evict", "--json")
    said = json.loads(result.stdout)
    assert said["finish_reason"] == "eos" and said["usage"]["prompt_tokens"] > 1500
    assert said["usage"]["prompt_tokens"] + 4 - said["evicted_tokens"] <= 512
    assert dropped_on_stderr(result.stderr) == said["evicted_tokens"] > 0


def test_row_21_a_chat_that_fills_its_context_says_so_and_goes_on(terminal, kvrun, endless):
    screen = terminal("chat", endless, "-n", "64", columns=120, rows=60)
    screen.wait_prompt()
    screen.ask("go", "context full: the answer was cut at 64 tokens")
    shown = screen.ask("more", "and the context holds 64")
    assert "shorten the prompt" not in shown, "the chat's own advice is enough"
    assert re.search(r"context full: the prompt has \d+ tokens", shown)
    screen.ask("/clear", "forgotten")


def test_row_22_a_format_without_a_kernel_is_an_error(kvrun, scripted, tmp_path):
    """Heads of 40 channels fit no quantized page: another format is named, none is taken instead."""
    folder = random_model(tmp_path / "odd", 3, dim=40)
    for kv in ("q8", "q4", "q8/q4"):
        check(kvrun("run", folder, "x", "--kv", kv, "--max-tokens", "1"), 2, f"--kv {kv}", "40 channels", "--kv f16")
        check(kvrun("chat", folder, "--kv", kv, "--no-save", input=b"x\n"), 2, "40 channels")
    check(kvrun("run", scripted, "x", "--kv", "q2"), 2, "--kv q2")


def test_row_22_a_device_that_is_not_there_is_an_error(kvrun, scripted):
    from kvrun.backends.cuda import probe, why_not

    status = probe()
    if status.devices and not why_not(status):
        pytest.skip("this machine has a GPU that works")
    for kv in ("f16", "q4"):
        check(kvrun("run", scripted, "x", "--device", "cuda", "--kv", kv), 2, "--device cuda")


@pytest.mark.parametrize("policy", [[], ["--evict", "strided"]])
def test_row_23_what_is_dropped_from_a_full_context_is_said(kvrun, endless, policy):
    args = ("run", endless, "go", "-n", "768", "--overflow", "evict", *policy, "--max-tokens", "1200")
    result = kvrun(*args, "--stats")
    assert result.returncode == 0 and result.stdout == b"".join((LINES * 20)[:1200])
    *notices, stats = result.stderr.splitlines()
    dropped = dropped_on_stderr(result.stderr)
    assert dropped == PAGE * len(notices) and f" · dropped {dropped} tok · ".encode() in stats
    held = int(re.search(rb"ctx (\d+)/768", stats)[1])
    said = json.loads(kvrun(*args, "--json").stdout)
    assert said["evicted_tokens"] == dropped == sum(e["tokens"] for e in said["evictions"])
    # all but the last drawn token were read or said, and are held or were dropped
    assert held + dropped == said["usage"]["total_tokens"] - 1
    for eviction in said["evictions"]:
        assert eviction["reason"] == "n_ctx" and eviction["tokens"] == sum(b - a for a, b in eviction["positions"])
        assert all(a >= PAGE for a, _ in eviction["positions"]), "the first page stays"
    assert said["reread_tokens"] == 0 and said["finish_reason"] == "length"
    quiet = kvrun(*args, "-q")
    assert quiet.stderr == b"" and quiet.stdout == result.stdout
