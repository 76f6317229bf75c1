"""Chat templates: a conversation as the string a model was trained on.

Rendered as transformers' apply_chat_template does, in a process of its own (render_worker.py) with limits that hold: a
time limit inside one process cannot stop a template in the middle of one long call, and nothing inside it can take
memory back. That process starts in the background while the weights load; measured, it costs the main thread about 3
ms.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvrun.errors import ModelError
from kvrun.text.limits import environment

_SECONDS = 1.5              # of computing for one rendering; the slowest of 70 real templates takes 0.06
_PATIENCE = 15.0 if hasattr(signal, "setitimer") else 1.5       # seconds to wait for it, should the machine be busy
_START_SECONDS = 30.0       # for the process to answer its first request, on a machine that is busy
_MEMORY = 256 << 20         # address space on top of what the process has at its start
_MAX_TEXT = 64 << 20        # bytes of a rendered conversation
_MAX_SOURCE = 1 << 17       # characters of a template; the longest known one has 20,000
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateError(ModelError):
    """The template refused this conversation (it raised): the model is usable, and a chat goes on."""


def choose(templates: Mapping[str, str], tools, where: str) -> str:
    """The template to use of those a model has: with tools the one named tool_use, else default, else the only one."""
    if tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if len(templates) == 1:
        return next(iter(templates.values()))
    names = ", ".join(name[:40] for name in sorted(templates)[:10])
    raise ModelError(f"{where}: the model has the chat templates {names} and none named default; choose one with --template-file")


class ChatTemplate:
    """source: the template's text. where: the model's file or folder, for errors."""

    def __init__(self, source: str, where: str):
        if len(source) > _MAX_SOURCE:
            raise ModelError(f"{where}: the chat template has {len(source)} characters, more than any real one")
        self.source, self.where = source, where

    def render(self, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, tools=None, documents=None,
               **variables) -> str:
        """The conversation as text. variables: further names for the template; bos_token and its like among them.

        TemplateError: it raised. ModelError: it is no template, or went over its limits (1.5 s, 256 MiB, 64 MiB of text).
        """
        # A key that says nothing is the same as none: many templates would print "None" (transformers drops them too).
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables |= {"messages": [_with_reasoning(message) for message in _plain(said)],
                      "tools": _plain(tools), "documents": _plain(documents),
                      "add_generation_prompt": add_generation_prompt}
        answer = _worker.ask({"source": self.source, "variables": _plain(variables)})
        if (text := answer.get("text")) is not None:
            return text
        kind, message = answer["error"], _one_line(answer["message"])
        if kind == "refused":
            raise TemplateError(f"{self.where}: the chat template refuses this conversation: {message}")
        what = "is broken" if kind == "broken" else "cannot be used"
        raise ModelError(f"{self.where}: the chat template {what}: {message}; give another with --template-file")


def prepare() -> None:
    """Starts the rendering process in the background."""
    _worker.start()


class _Worker:
    """The rendering process, started when first needed and again after it had to be killed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._answered = False
        self._owner = 0

    def start(self) -> None:
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        setup = {"path": [p for p in sys.path if p], "memory": _MEMORY, "seconds": _SECONDS}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("render_worker.py")), json.dumps(setup)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                env=environment(),      # what a template must not see is not there
                # Ctrl-C is for kvrun alone
                **({"process_group": 0} if os.name == "posix" else {}))
        except OSError as e:
            raise ModelError(f"the process that renders chat templates cannot be started: {e}") from None
        self._owner, self._answered = os.getpid(), False

    def ask(self, request: dict) -> dict:
        data = json.dumps(request).encode()
        with self._lock:
            self._start()
            deadline = time.monotonic() + _START_SECONDS
            try:
                if not self._answered:
                    # An empty template first: starting up is not the template's time.
                    self._exchange(json.dumps({"source": "", "variables": {}}).encode(), deadline)
                    self._answered = True
                return json.loads(self._exchange(data, time.monotonic() + _PATIENCE))
            except (TimeoutError, OSError) as e:
                return {"error": "failed", "message": self._why(e)}
            except BaseException:
                self.kill()         # an answer left in the pipe would be taken for the next one
                raise

    def _exchange(self, data: bytes, deadline: float) -> bytes:
        """Sends a frame and returns the answer. TimeoutError at the deadline; OSError if the process ended."""
        process = self._process
        out = memoryview(len(data).to_bytes(8, "little") + data)
        got, want = bytearray(), 8
        source, sink = process.stdout.fileno(), process.stdin.fileno()
        os.set_blocking(sink, False)
        with selectors.DefaultSelector() as ready:
            ready.register(source, selectors.EVENT_READ)
            ready.register(sink, selectors.EVENT_WRITE)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                for key, _ in ready.select(left):
                    if key.fd == sink:
                        out = out[os.write(sink, out[:1 << 16]):]
                        if not out:
                            ready.unregister(sink)
                        continue
                    part = os.read(source, 1 << 20)
                    if not part:
                        raise BrokenPipeError
                    got += part
                    if want == 8 and len(got) >= 8:
                        want = 8 + int.from_bytes(got[:8], "little")
                        if want > _MAX_TEXT:
                            raise OSError(f"it makes more than {_MAX_TEXT >> 20} MiB of text")
                    if want > 8 and len(got) >= want:
                        return bytes(got[8:want])

    def _why(self, error: OSError) -> str:
        """What became of a request that got no answer; the process is gone after it."""
        process = self._process
        ended = isinstance(error, BrokenPipeError)
        code = process.wait() if ended else None
        self.kill()
        if isinstance(error, TimeoutError) or (ended and code == -getattr(signal, "SIGPROF", 0)):
            return f"it runs longer than {_SECONDS} s"
        if ended:
            return "the process that renders it ended; it wants too much memory, or was stopped"
        return str(error)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.wait()


_worker = _Worker()
atexit.register(_worker.kill)


def _with_reasoning(message):
    """A message's reasoning under the names that templates read (transformers does the same)."""
    if isinstance(message, dict):
        reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
        if reasoning is not None:
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _plain(value):
    """Plain data for the template: what is not JSON becomes the name of its type."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _one_line(message: str) -> str:
    return " ".join(message.split())[:500]
