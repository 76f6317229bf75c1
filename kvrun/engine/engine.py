"""The engine: prefill, decode, stopping, and what the cache holds."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence as Items
from typing import TYPE_CHECKING

from kvrun.backends.batch import Batch, Sampler
from kvrun.engine.events import Event, Notice, Prefill, Stats, Stop, Token, TokenLogprob
from kvrun.errors import ContextFullError, UsageError

if TYPE_CHECKING:
    from kvrun.backends.executor import Executor
    from kvrun.cache.pages import Sequence
    from kvrun.models.spec import ModelSpec
    from kvrun.text import Text


class Engine:
    """One model, one sequence in its cache.

    tokens: the ids whose K and V are in the cache. They agree with the cache whenever no step is running, also after
    an interrupt, an error, or a generation that was not read to its end.
    """

    def __init__(self, spec: ModelSpec, executor: Executor, sequence: Sequence, text: Text, n_ctx: int,
                 chunk: int) -> None:
        """sequence: an empty one of a pool for n_ctx tokens. chunk: the most prompt rows of a step."""
        self.spec = spec
        self.executor = executor
        self.sequence = sequence
        self.text = text
        self.n_ctx = n_ctx
        self.chunk = chunk
        self.tokens: list[int] = []
        self._interrupted = False
        self._running: Generator[Event, None, None] | None = None

    def generate(self, ids: Items[int], *, sampler: Sampler | None = None, max_tokens: int | None = None,
                 stop: Items[str] = (), logprobs: int = 0, echo: bool = False, continued: bool = False) -> Iterator[Event]:
        """Continues the prompt `ids`; the last event is a Stop.

        What the prompt shares with the front of the cache is not computed again, except the last prompt token, whose
        logits are needed. sampler: None is greedy. max_tokens: None is until the model stops or n_ctx is full.
        stop: strings that end the answer and are not part of it. logprobs: how many alternatives come with each
        token's log-probability (0: neither). echo: prompt_logprobs in the Stop, for which the whole prompt is
        computed. continued: the answer goes on the prompt's text, so a leading space belongs to it (SentencePiece).
        Ends a generation that is still open. Raises ContextFullError and UsageError at once, NumericError
        while generating.
        """
        ids = list(ids)
        if not ids:
            raise UsageError("the prompt is empty; give at least one token")
        if len(ids) > self.n_ctx:
            raise ContextFullError(f"the prompt has {len(ids)} tokens and the context holds {self.n_ctx}; "
                                   "shorten the prompt or use a larger --n-ctx")
        if max_tokens is not None and max_tokens < 0:
            raise UsageError(f"--max-tokens {max_tokens}: must not be negative")
        if not 0 <= logprobs <= self.spec.vocab_size:
            raise UsageError(f"--logprobs {logprobs}: must be from 0 to the vocabulary size, {self.spec.vocab_size}")
        if self._running is not None:
            self._running.close()
        self._interrupted = False
        self._running = self._generate(_Job(ids, sampler or Sampler(), max_tokens, list(stop), logprobs, echo, continued))
        return self._running

    def interrupt(self) -> None:
        """Ends the running generation with Stop("interrupt") after the step in progress. Safe in a signal handler."""
        self._interrupted = True

    def close(self) -> None:
        """Gives the executor's threads and all memory back. Idempotent."""
        if self._running is not None:
            self._running.close()
            self._running = None
        self.executor.close()
        self.tokens = []

    def _generate(self, job: _Job) -> Generator[Event, None, None]:
        started = time.perf_counter()
        notice = self._keep_common_prefix([] if job.echo else job.ids)
        job.stats.cached_tokens = len(self.tokens)
        if notice:
            yield Notice(notice)
        drawn = yield from self._prefill(job)
        decoding = time.perf_counter()
        job.stats.prefill_seconds = decoding - started
        reason, text = yield from self._decode(job, drawn)
        job.stats.decode_seconds = time.perf_counter() - decoding
        yield Stop(reason, text, job.stats, tuple(job.prompt_logprobs))

    def _keep_common_prefix(self, ids: list[int]) -> str | None:
        """Rewinds the cache to what `ids` begins with, but for its last token. Returns what the user must be told."""
        shared = 0
        for mine, wanted in zip(self.tokens, ids[:-1], strict=False):
            if mine != wanted:
                break
            shared += 1
        if self.sequence.truncate(shared):
            del self.tokens[self.sequence.length:]
            return None
        self._clear()
        return (f"reading the whole prompt again: the sliding window has moved past token {shared}, "
                "where it begins to differ from what the cache holds")

    def _prefill(self, job: _Job) -> Generator[Event, None, int | None]:
        """Runs the prompt. Returns the first drawn token; None when interrupted or when none is wanted."""
        rows = min(self.chunk, self.executor.plan.max_out) if job.echo else self.chunk
        drawn: list[int] = []
        while len(self.tokens) < len(job.ids) and not self._interrupted:
            start = len(self.tokens)
            part = job.ids[start : start + self.sequence.most_rows(rows)]
            draws = start + len(part) == len(job.ids) and job.max_tokens != 0
            out_rows = list(range(len(part))) if job.echo else [len(part) - 1] if draws else []
            drawn = self._step(part, job, prefill=True, out_rows=out_rows, draw=draws)
            job.stats.prefilled_tokens += len(part)
            if job.echo:
                self._read_prompt_logprobs(job, start, len(part))
            yield Prefill(len(self.tokens), len(job.ids), job.stats.cached_tokens)
        return drawn[-1] if drawn and not self._interrupted else None

    def _decode(self, job: _Job, drawn: int | None) -> Generator[Event, None, tuple[str, str]]:
        """Emits tokens until there is a reason to stop. Returns it and the text that was still held back."""
        if drawn is None:
            return ("interrupt" if self._interrupted else "length"), ""
        from kvrun.text.stops import StopStrings

        detokenizer, stops = self.text.detokenizer(continued=job.continued), StopStrings(job.stop)
        while drawn not in self.text.eos_ids:
            record = None
            if job.logprobs:
                record = self._logprob(-1, job.stats.generated_tokens, drawn, job.logprobs)
            job.stats.generated_tokens += 1
            job.note(drawn)
            text, stopped = stops.push(detokenizer.push(drawn))
            yield Token(drawn, text, record)
            if stopped:
                return "stop", ""
            if job.stats.generated_tokens == job.max_tokens:
                reason = "length"
                break
            if self._interrupted:
                reason = "interrupt"
                break
            if len(self.tokens) == self.n_ctx:
                reason = "context"
                break
            drawn = self._step([drawn], job, prefill=False, out_rows=[0], draw=True)[0]
            job.stats.decode_steps += 1
        else:
            reason = "eos"
        text, stopped = stops.push(detokenizer.flush())
        return ("stop", text) if stopped else (reason, text + stops.flush())

    def _step(self, part: list[int], job: _Job, *, prefill: bool, out_rows: list[int], draw: bool) -> list[int]:
        """Runs rows at the end of the cache. Whatever interrupts it, `tokens` and the cache agree afterwards."""
        first = len(self.tokens)
        self.sequence.extend(len(part))
        try:
            drawn = self.executor.step(Batch(
                tokens=part, positions=list(range(first, first + len(part))),
                tables=[[table] for table in self.sequence.tables()], prefill=prefill, out_rows=out_rows,
                sampler=job.sampler if draw else None, recent=list(job.seen)))
            self.tokens += part
        except BaseException:
            if self.sequence.truncate(len(self.tokens)):
                del self.tokens[self.sequence.length:]
            else:
                self._clear()
            raise
        return drawn

    def _clear(self) -> None:
        self.sequence.truncate(0)
        self.tokens.clear()

    def _logprob(self, row: int, index: int, token: int, k: int) -> TokenLogprob:
        from kvrun.engine.logprobs import token_logprob

        return token_logprob(self.executor.logits()[row], index, token, k)

    def _read_prompt_logprobs(self, job: _Job, start: int, n: int) -> None:
        """The row of prompt token i predicts token i+1; nothing predicts the first."""
        if start == 0:
            job.prompt_logprobs.append(TokenLogprob(0, job.ids[0], None))
        for row in range(n):
            index = start + row + 1
            if index < len(job.ids):
                job.prompt_logprobs.append(self._logprob(row, index, job.ids[index], job.logprobs))


class _Job:
    """One generation's wishes, and what it has counted."""

    def __init__(self, ids: list[int], sampler: Sampler, max_tokens: int | None, stop: list[str], logprobs: int,
                 echo: bool, continued: bool) -> None:
        self.ids = ids
        self.sampler = sampler
        self.max_tokens = max_tokens
        self.stop = stop
        self.logprobs = logprobs
        self.echo = echo
        self.continued = continued
        self.stats = Stats(prompt_tokens=len(ids))
        self.prompt_logprobs: list[TokenLogprob] = []
        # The penalty counts an id once, so a set in order of appearance does; it stays empty where nothing reads it.
        self.seen: dict[int, None] = dict.fromkeys(ids) if sampler.repeat_penalty != 1.0 else {}

    def note(self, token: int) -> None:
        """A token was drawn."""
        if self.sampler.repeat_penalty != 1.0:
            self.seen[token] = None
