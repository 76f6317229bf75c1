"""Streams: what goes where, byte for byte. (Behaviour on a real terminal is in tests/cli.)"""

import os

import pytest

from kvrun.errors import StorageError
from kvrun.terminal import Console, human_bytes, streams


@pytest.mark.parametrize("pieces", [
    ["a"], ["a\n"], ["a", "\n"], ["a\n\n\n"], ["a", "\n", "\n", "\n"], ["a", "\n\n", "\n"]])
def test_an_answer_ends_with_exactly_one_newline(capfdbinary, pieces):
    console = Console()
    for piece in pieces:
        console.answer(piece)
    console.end_answer()
    assert capfdbinary.readouterr().out == b"a\n"


@pytest.mark.parametrize(("pieces", "out"), [
    ([], b"\n"), (["\n\n"], b"\n"), (["\n", "a"], b"\na\n"), (["a\n", "\n", "b\n\n", "\nc"], b"a\n\nb\n\n\nc\n")])
def test_inner_newlines_stay(capfdbinary, pieces, out):
    console = Console()
    for piece in pieces:
        console.answer(piece)
    console.end_answer()
    assert capfdbinary.readouterr().out == out


def test_an_answer_is_written_as_it_comes(capfdbinary):
    console = Console()
    console.answer("one\n")
    assert capfdbinary.readouterr().out == b"one\n"
    console.answer("é")
    assert capfdbinary.readouterr().out == "é".encode()


def test_a_second_answer_begins_afresh(capfdbinary):
    console = Console()
    for text in ("a\n\n", "b"):
        console.answer(text)
        console.end_answer()
    assert capfdbinary.readouterr().out == b"a\nb\n"


def test_a_pipe_gets_the_bytes_as_they_are_and_no_escape_of_ours(capfdbinary):
    console = Console(color="auto")
    console.answer("\x1b[31mraw\x1b[0m [bold]")
    console.progress("reading", 1, 2)
    console.notice("a notice with a [tag] and \x1b[31m")
    console.error("it broke\nbadly")
    out, err = capfdbinary.readouterr()
    assert out == b"\x1b[31mraw\x1b[0m [bold]"
    assert err == b"kvrun: a notice with a [tag] and \\x1b[31m\nkvrun: error: it broke\\nbadly\n"


def test_quiet_keeps_errors_and_what_was_asked_for(capfdbinary):
    console = Console(quiet=True)
    console.notice("unwanted")
    console.report("wanted")
    console.error("an error")
    assert capfdbinary.readouterr().err == b"wanted\nkvrun: error: an error\n"


def test_color_is_decided_by_stream_choice_and_environment(monkeypatch):
    leader, follower = os.openpty()
    reader, writer = os.pipe()
    try:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert streams.color_wanted("auto", follower)
        assert not streams.color_wanted("auto", writer)
        assert streams.color_wanted("always", writer)
        assert not streams.color_wanted("never", follower)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not streams.color_wanted("auto", follower)
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        assert not streams.color_wanted("auto", follower)
    finally:
        for fd in (leader, follower, reader, writer):
            os.close(fd)


def test_a_full_nonblocking_pipe_loses_nothing():
    import threading

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data = os.urandom(1 << 20)
    got = bytearray()

    def drain() -> None:
        while len(got) < len(data):
            got.extend(os.read(reader, 1 << 16))

    thread = threading.Thread(target=drain)
    thread.start()
    streams.write_all(writer, data)
    thread.join()
    os.close(reader)
    os.close(writer)
    assert bytes(got) == data


def test_a_full_disk_is_an_error_with_a_code():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    saved = os.dup(1)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        os.dup2(full, 1)
        with pytest.raises(StorageError, match="standard output"):
            Console().out("x")
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(full)


@pytest.mark.parametrize(("n", "text"), [(0, "0 B"), (1023, "1023 B"), (4096, "4.0 KiB"), (98362432, "93.8 MiB"), (3 << 30, "3.0 GiB")])
def test_human_bytes(n, text):
    assert human_bytes(n) == text
