"""kvrun run --each: one prompt a line of standard input, one JSON object a line of standard output."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kvrun.cli.report import as_json
from kvrun.cli.run_output import JsonOutput
from kvrun.errors import ContextFullError, UsageError

if TYPE_CHECKING:
    from kvrun.cli.run_answer import Runner


def answer_each(runner: Runner) -> int:
    """Answers every line that is not empty, each as if alone. What all prompts share, the system prompt, files and PROMPT, is read once.
    A line that cannot be answered gets an object with `error`, and the others go on. Returns the exit code: that of the last error."""
    from kvrun.cache.session_pages import PageArchive
    from kvrun.terminal import termination
    from kvrun.terminal.lines import PipedLines

    before = _before(runner)
    reader, code, done = PipedLines(), 0, 0
    with termination.raising(), tempfile.TemporaryDirectory(prefix="kvrun-") as folder:
        # Where a sliding window or a page that is quantized whole cannot be taken back to what the prompts share.
        runner.engine.archive = PageArchive(Path(folder), runner.engine.pool, runner.engine.sequence)
        shared = 0
        while True:
            try:
                line = reader.read()
            except EOFError:
                break
            except UsageError as error:
                code = error.exit_code
                runner.console.out(as_json({"error": str(error)}))
                continue
            if not line.strip():
                continue
            ids = runner.encode("\n\n".join([*before, line]))
            if not done:
                shared = _read_shared(runner, before, ids)
            done += 1
            try:
                end = runner.generate(ids, output := JsonOutput(runner, ids))
            except ContextFullError as error:
                code = error.exit_code
                runner.console.out(as_json({"input": line, "error": str(error)}))
                continue
            if end.reason == "interrupt":
                return 130
            if end.reason == "context":
                code = ContextFullError.exit_code
            output.end(end, input=line)
            runner.engine.archive.collect()
    if not done and not code:
        raise UsageError("--each: no line on standard input")
    if runner.options.stats:
        runner.console.report(f"{done} answers, {shared} prompt tokens shared")
    return code


def _before(runner: Runner) -> list[str]:
    """What stands before each line: files, then PROMPT."""
    from kvrun.cli.prompt import read_file
    from kvrun.terminal import streams

    options = runner.options
    if streams.is_terminal(streams.STDIN):
        raise UsageError("--each reads its prompts from standard input, and that is a terminal; pipe text into it")
    parts = [read_file(path).rstrip("\n") for path in options.files]
    return [part for part in (*parts, options.prompt if options.prompt != "-" else None) if part]


def _read_shared(runner: Runner, before: list[str], ids: list[int]) -> int:
    """Reads what every prompt begins with and marks it. Returns how many tokens that is."""
    others = [runner.encode("\n\n".join([*before, line])) for line in ("A", "7")]
    shared = 0
    while all(shared < len(other) - 1 and other[shared] == ids[shared] for other in others) and shared < len(ids) - 1:
        shared += 1
    if shared:
        for _ in runner.engine.generate(ids[:shared], max_tokens=0):
            pass
        runner.engine.mark()
    return shared
