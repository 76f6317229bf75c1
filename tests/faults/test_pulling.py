"""Rows 25 to 27: downloads that are cut, stalled, killed, refused or not wanted, by the real client from a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save

from ..hub.conftest import RESOLVE, Repo, add, tiny_files
from .conftest import check, publish, start

WEIGHTS = "model.safetensors"
MIB = 1 << 20
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"


@pytest.fixture
def big(hub):
    """A repository whose weights have 24 MiB; the client writes 10 at a time."""
    repo = hub.repos["org/big"] = Repo()
    repo.commit(tiny_files() | {WEIGHTS: save({"a": np.random.default_rng().standard_normal(6 * MIB, np.float32)})}, "main")
    return repo


def ranges(hub, name: str = WEIGHTS) -> list[str | None]:
    return [r for m, p, r in hub.requests if m == "GET" and p.endswith(name)]


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_row_25_a_dropped_connection_goes_on_where_it_stopped(hub, online, big):
    hub.cut, hub.cut_at = {WEIGHTS: 2}, 11 * MIB
    assert online("pull", "org/big", "-q").returncode == 0
    assert ranges(hub)[0] is None and [int(r[6:-1]) >= 10 * MIB for r in ranges(hub)[1:]] == [True, True]
    assert online("verify", "org/big").returncode == 0


def test_row_25_a_connection_that_stalls_is_given_up_and_taken_up_again(hub, online, big):
    hub.stalled, hub.cut_at = {WEIGHTS}, 11 * MIB
    pulling = threading.Thread(target=lambda: (wait_until(lambda: len(ranges(hub)) > 1), hub.moving.set()))
    pulling.start()
    result = online("pull", "org/big", "-q", HF_HUB_DOWNLOAD_TIMEOUT="1")
    pulling.join()
    assert result.returncode == 0, result.stderr
    assert int(ranges(hub)[1][6:-1]) >= 10 * MIB


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_row_25_an_interrupted_pull_resumes_in_the_next_process(hub, machine, online, big, signum):
    hub.stalled, hub.cut_at = {WEIGHTS}, 15 * MIB
    process = start(machine, "pull", "org/big", "-q")
    blobs = machine.home / "hf/hub/models--org--big/blobs"
    wait_until(lambda: blobs.exists() and any(p.stat().st_size >= 10 * MIB for p in blobs.iterdir()))
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)       # at once: nothing waits for the rest of the file
    assert process.returncode in {signal.SIGKILL: (-9,), signal.SIGTERM: (143,), signal.SIGINT: (130,)}[signum] and (out, err) == ("", "")
    assert not list((blobs.parent / "snapshots").glob(f"*/{WEIGHTS}"))
    check(online("run", "org/big", "x", "--offline"), 3, "kvrun pull org/big")
    hub.stalled.clear()
    hub.moving.set()
    hub.requests.clear()
    assert online("pull", "org/big", "-q").returncode == 0
    assert ranges(hub) == [f"bytes={10 * MIB}-"]
    assert online("verify", "org/big").returncode == 0 and not list(blobs.glob("*incomplete*"))


def test_row_25_what_an_earlier_try_left_damaged_is_fetched_again(hub, machine, online, big):
    sha = hashlib.sha256(big.trees[big.revisions["main"]][WEIGHTS]).hexdigest()
    blobs = machine.home / "hf/hub/models--org--big/blobs"
    for left in (bytes(10 * MIB), bytes(30 * MIB)):
        blobs.mkdir(parents=True, exist_ok=True)
        (blobs / sha).unlink(missing_ok=True)
        (blobs / f"{sha}.kvrun.incomplete").write_bytes(left)
        assert online("pull", "org/big", "-q").returncode == 0
        assert online("verify", "org/big").returncode == 0


def test_row_25_whole_files_are_not_fetched_twice(hub, online):
    add(hub, shards=2)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    hub.swapped[second] = b"too short"
    check(online("pull", "org/tiny", "-q"), 5, second, "kvrun pull org/tiny")
    check(online("run", "org/tiny", "x", "--offline"), 3)
    hub.swapped.clear()
    hub.requests.clear()
    assert online("pull", "org/tiny").returncode == 0
    assert second in hub.fetched() and first not in hub.fetched()
    assert online("verify", "org/tiny").returncode == 0


def test_row_25_two_pulls_at_once_are_both_right(hub, machine, online, big):
    both = [start(machine, "pull", "org/big", "-q") for _ in range(2)]
    outs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert online("verify", "org/big").returncode == 0 and len(ranges(hub)) == 1


@pytest.mark.parametrize(("what", "code", "words"), [
    (lambda hub: setattr(hub, "broken", 401), 4, "check the token"),
    (lambda hub: setattr(hub, "broken", 403), 4, "licence"),
    (lambda hub: setattr(hub, "broken", 429), 3, "429 for"),
    (lambda hub: setattr(hub, "broken", 500), 3, "try again later"),
    (lambda hub: hub.failing.update({WEIGHTS: 403}), 4, "403"),
    (lambda hub: hub.failing.update({WEIGHTS: 404}), 3, "404"),
    (lambda hub: hub.moved.update({WEIGHTS: f"{hub.url}/org/tiny/resolve/main/{WEIGHTS}"}), 3, "broke off"),
    (lambda hub: hub.moved.update({WEIGHTS: "file:///etc/passwd"}), 3, "broke off"),
    (lambda hub: hub.swapped.update({WEIGHTS: b"x" * 100_000_000}), 5, "another size"),
    (lambda hub: hub.swapped.update({WEIGHTS: b"short"}), 5, "another size"),
    (lambda hub: hub.swapped.update({"config.json": b"<html>log in</html>"}), 5, "config.json arrived damaged"),
    (lambda hub: hub.close(), 3, "(Connection refused)"),
], ids=["401", "403", "429", "500", "403 file", "404 file", "redirects in a circle", "redirects to a file", "too long", "too short", "a page", "gone"])
def test_row_27_what_the_hub_may_answer_is_one_line_without_the_token(hub, machine, online, what, code, words):
    """Each of them, as every user would see it and with the trace, and nothing of the token in either."""
    add(hub)
    what(hub)
    line = check(online("pull", "org/tiny", "-q", HF_TOKEN=TOKEN), code, "org/tiny", words)
    verbose = online("run", "org/tiny", "x", "-v", HF_TOKEN=TOKEN)
    assert verbose.returncode == code and "Traceback" in verbose.stderr
    for secret in (TOKEN, TOKEN[3:], TOKEN[8:24]):
        assert secret not in line + verbose.stderr + verbose.stdout
    if hub.broken is None and "gone" not in words:
        assert sum(p.stat().st_size for p in (machine.home / "hf").rglob("*") if p.is_file()) < MIB


def test_row_27_gated_says_where_to_accept_and_never_the_token(hub, machine, online):
    repo = add(hub, gated=True, token="hf_right0123456789")
    for env in ({}, {"HF_TOKEN": TOKEN}):
        line = check(online("pull", "org/tiny", "-q", **env), 4, f"{hub.url}/org/tiny", "licence", "HF_TOKEN")
        assert TOKEN[3:] not in line
    (machine.home / "hf/token").write_text(TOKEN)          # as `hf auth login` leaves it
    assert TOKEN[3:] not in check(online("pull", "org/tiny", "-q"), 4, "licence")
    assert online("pull", "org/tiny", HF_TOKEN=repo.token).returncode == 0


def test_row_27_no_command_tells_the_token(hub, machine, online):
    add(hub)
    (machine.home / "hf").mkdir()
    (machine.home / "hf/token").write_text(TOKEN)
    for args in (("doctor",), ("doctor", "--json"), ("pull", "org/tiny", "--json", "-v"), ("ls", "--json"), ("show", "org/tiny", "--json"),
                 ("plan", "org/tiny", "--json"), ("verify", "org/tiny", "--json"), ("run", "org/absent", "x", "-v")):
        result = online(*args, HF_TOKEN=TOKEN, HF_DEBUG="1")
        assert TOKEN[3:] not in result.stdout + result.stderr, args
    password = online("pull", "org/tiny", "-q", HF_ENDPOINT="http://me:secret@127.0.0.1:9")
    assert password.returncode == 3 and "secret" not in password.stderr
    kept = [p for p in machine.home.rglob("*") if p.is_file() and p.name != "token"]
    assert kept and not any(TOKEN.encode() in p.read_bytes() for p in kept)


def test_row_26_offline_opens_no_socket(hub, machine, online, scripted):
    publish(hub, scripted, "org/tiny")
    assert online("pull", "org/tiny", "-q").returncode == 0
    hub.requests.clear()
    watched = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        print("SOCKET", event, args, file=sys.stderr)
sys.addaudithook(watch)
""" + RESOLVE
    for model, options, env, code in (
            ("org/tiny", {"offline": True}, {}, 0), ("org/tiny", {}, {"HF_HUB_OFFLINE": "1"}, 0),
            ("org/other", {"offline": True}, {}, 3), ("org/other", {}, {"HF_HUB_OFFLINE": "1"}, 3),
            ("smollm2-135m", {"offline": True}, {}, 3), ("smollm2-135m", {}, {"HF_HUB_OFFLINE": "1"}, 3)):
        got = machine.python(watched, model, json.dumps(options), **env)
        assert got.returncode == code and "SOCKET" not in got.stderr, (model, options, env, got.stderr)
    assert online("run", "org/tiny", "x", "--offline").stdout == "Größe,\nWelt\n"
    assert online("run", "org/tiny", "x").stdout == "Größe,\nWelt\n"       # what is here asks nobody
    assert hub.requests == []
