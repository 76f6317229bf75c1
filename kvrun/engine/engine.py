"""The engine: prefill, decode, stopping, and what the cache holds."""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Generator, Iterator, Sequence as Items
from typing import TYPE_CHECKING

from kvrun.backends.batch import Batch, Sampler
from kvrun.cache.evict import POLICIES, pinned_tokens, spans
from kvrun.cache.formats import PAGE
from kvrun.engine.events import Event, Eviction, Notice, Prefill, Stop, Token, TokenLogprob
from kvrun.engine.held import GONE, Held
from kvrun.engine.history import stretch
from kvrun.engine.job import Job
from kvrun.errors import ContextFullError, ModelError, UsageError

if TYPE_CHECKING:
    from kvrun.backends.executor import Executor
    from kvrun.cache.pages import Sequence
    from kvrun.cache.pool import Pool
    from kvrun.models.spec import ModelSpec
    from kvrun.text import Text
    from kvrun.text.grammar import Constraint


class Engine(Held):
    """One model, one sequence in its cache. `tokens` and the cache agree whenever no step is running, also after an interrupt, an error, or
    a generation that was not read to its end."""

    def __init__(self, spec: ModelSpec, executor: Executor, sequence: Sequence, text: Text, n_ctx: int,
                 chunk: int, pool: Pool | None = None) -> None:
        """sequence: an empty one of `pool`, for n_ctx tokens. chunk: the most prompt rows of a step."""
        super().__init__(sequence, n_ctx)
        self.spec = spec
        self.executor = executor
        self.text = text
        self.chunk = chunk
        self.pool = pool
        self._limit = n_ctx
        self._news: list[Eviction] = []
        self._interrupted = False
        self._running: Generator[Event, None, None] | None = None

    def evict(self, policy: str, keep: int = 0, *, limit: int | None = None) -> None:
        """From now on a full context drops pages instead of ending. policy: a name of cache.evict.POLICIES. keep: how
        many of the first tokens stay, rounded up to pages, of which one always stays. limit: positions that can be used
        before what is held is read again from position 0; None is the trained length. UsageError when too little of
        n_ctx is left to move."""
        self.sequence.evict_with(POLICIES[policy], pinned_tokens(keep, self.n_ctx))
        self._limit = max(limit or self.spec.n_positions, self.n_ctx)

    def generate(self, ids: Items[int], *, sampler: Sampler | None = None, max_tokens: int | None = None,
                 stop: Items[str] = (), logprobs: int = 0, echo: bool = False, continued: bool = False,
                 constraint: Constraint | None = None) -> Iterator[Event]:
        """Continues the prompt `ids`; the last event is a Stop.

        What the prompt shares with the front of the cache is not computed again, except the last prompt token, whose
        logits are needed. sampler: None is greedy. max_tokens: None is until the model stops or, unless it drops pages, the
        context is full.
        stop: strings that end the answer and are not part of it. logprobs: how many alternatives come with each
        token's log-probability (0: neither). echo: prompt_logprobs in the Stop, for which the whole prompt is
        computed. constraint: what the answer may say. continued: the answer goes on the prompt's text, so a leading space
        belongs to it (SentencePiece).
        Ends a generation that is still open. Raises ContextFullError, ModelError and UsageError at once, NumericError
        while generating.
        """
        ids = list(ids)
        if not ids:
            raise UsageError("the prompt is empty; give at least one token")
        if max(ids) >= self.spec.vocab_size:
            raise ModelError(f"the tokenizer makes token {max(ids)} of this text, and the model has {self.spec.vocab_size}: "
                             "they do not belong together; fetch the model again")
        if len(ids) > self.n_ctx and not self.sequence.evicts:
            larger = f", use a larger --n-ctx (at most {self.spec.n_positions})," if self.n_ctx < self.spec.n_positions else ""
            raise ContextFullError(f"the prompt has {len(ids)} tokens and the context holds {self.n_ctx}"
                                   + ("" if larger else ", all that the model was trained for"), f"shorten the prompt{larger} or use --overflow evict")
        if max_tokens is not None and max_tokens < 0:
            raise UsageError(f"--max-tokens {max_tokens}: must not be negative")
        if not 0 <= logprobs <= self.spec.vocab_size:
            raise UsageError(f"--logprobs {logprobs}: must be from 0 to the vocabulary size, {self.spec.vocab_size}")
        if self._running is not None:
            self._running.close()
        self._interrupted = False
        self._running = self._generate(Job(ids, sampler or Sampler(), max_tokens, list(stop), logprobs, echo, continued, constraint))
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
        self.tokens, self._at = [], array("i")

    def _generate(self, job: Job) -> Generator[Event, None, None]:
        started = time.perf_counter()
        kinds = b"" if job.echo else self.history.kinds(job.ids)
        notice = self._keep_common_prefix([] if job.echo else job.ids)
        self.sequence.begin_turn()
        job.stats.cached_tokens = self.held
        if notice:
            yield Notice(notice)
        drawn = yield from self._prefill(job, kinds)
        decoding = time.perf_counter()
        job.stats.prefill_seconds = decoding - started
        reason, text = yield from self._decode(job, drawn)
        job.stats.decode_seconds = time.perf_counter() - decoding
        yield Stop(reason, text, job.stats, tuple(job.prompt_logprobs))

    def _prefill(self, job: Job, kinds: bytes) -> Generator[Event, None, int | None]:
        """Runs the prompt. kinds: as History has them. Returns the first drawn token; None when interrupted or when none is wanted."""
        most = min(self.chunk, self.executor.plan.max_out) if job.echo else self.chunk
        drawn: list[int] = []
        while len(self.tokens) < len(job.ids) and not self._interrupted:
            start = len(self.tokens)
            alike, as_drawn = stretch(kinds, start, len(job.ids))
            rows = self.sequence.most_rows(min(most, alike))
            if self._last_row_apart and rows > 1 and start + rows == len(job.ids):
                rows -= 1
            yield from self._stay_in_range(rows, job)
            if self._interrupted:
                break
            if self._last_row_apart and start + rows == len(job.ids):
                self._mark_prompt(job)
            part = job.ids[start : start + rows]
            draws = start + len(part) == len(job.ids) and job.max_tokens != 0
            out_rows = list(range(len(part))) if job.echo else [len(part) - 1] if draws else []
            drawn = self._step(part, job, prefill=not as_drawn, out_rows=out_rows, draw=draws)
            job.stats.prefilled_tokens += len(part)
            if job.echo:
                self._read_prompt_logprobs(job, start, len(part))
            yield from self._announce(job)
            yield Prefill(len(self.tokens), len(job.ids), job.stats.cached_tokens)
        return drawn[-1] if drawn and not self._interrupted else None

    def _decode(self, job: Job, drawn: int | None) -> Generator[Event, None, tuple[str, str]]:
        """Emits tokens until there is a reason to stop. Returns it and the text that was still held back."""
        if drawn is None:
            return ("interrupt" if self._interrupted else "length"), ""
        from kvrun.text.stops import StopStrings

        detokenizer, stops = self.text.detokenizer(continued=job.continued), StopStrings(job.stop)
        while (drawn := self._allowed(job, drawn)) not in self.text.eos_ids:
            record = None
            if job.logprobs:
                record = self._logprob(-1, job.stats.generated_tokens, drawn, job.logprobs)
            job.stats.generated_tokens += 1
            job.note(drawn)
            text, stopped = stops.push(detokenizer.push(drawn))
            yield Token(drawn, text, record)
            if job.stats.generated_tokens == 1:
                self._mark_prompt(job)
            if stopped:
                return "stop", ""
            if job.constraint is not None and job.constraint.finished:
                reason = "eos"
                break
            if job.stats.generated_tokens == job.max_tokens:
                reason = "length"
                break
            if self._interrupted:
                reason = "interrupt"
                break
            if self.sequence.length == self.n_ctx and not self.sequence.evicts:
                reason = "context"
                break
            yield from self._stay_in_range(1, job)
            if self._interrupted:
                reason = "interrupt"
                break
            drawn = self._step([drawn], job, prefill=False, out_rows=[0], draw=True)[0]
            job.stats.decode_steps += 1
            yield from self._announce(job)
        else:
            reason = "eos"
        text, stopped = stops.push(detokenizer.flush())
        return ("stop", text) if stopped else (reason, text + stops.flush())

    def _allowed(self, job: Job, drawn: int) -> int:
        """`drawn`, or what is said in its place."""
        if job.constraint is None:
            return drawn
        token = job.constraint.choose(drawn, lambda: self.executor.logits()[-1], job.sampler, list(job.seen), self.sequence.length)
        if token not in self.text.eos_ids:
            job.constraint.accept(token)
        return token

    @property
    def _last_row_apart(self) -> bool:
        """Whether the last prompt row is a step of its own: its logits are wanted again when the answer is, and a page that is quantized
        as a whole cannot be taken back by one row."""
        return self.archive is not None and self.sequence.whole_pages

    def _mark_prompt(self, job: Job) -> None:
        """The prompt but for its last token is a place to come back to, for another answer."""
        count = len(job.ids) - 1
        if self.archive is not None and count > 0 and len(self.tokens) >= count and self._at[count - 1] != GONE:
            if not self.sequence.whole_pages or len(self.tokens) == count:
                self.archive.mark(count, self._at[count - 1] + 1)

    def _step(self, part: list[int], job: Job, *, prefill: bool, out_rows: list[int], draw: bool,
              again: list[int] | None = None) -> list[int]:
        """Runs rows at the end of the cache. again: which of `tokens` they are, when they are computed anew; None: they
        follow the last. Whatever interrupts it, `tokens` and the cache agree afterwards."""
        first, said = self.sequence.length, len(self.tokens)
        positions = range(first, first + len(part))
        evicted = self.sequence.extend(len(part))
        if evicted:
            self._news.append(Eviction(spans(evicted, PAGE), PAGE * len(evicted), "n_ctx"))
        try:
            drawn = self.executor.step(Batch(
                tokens=part, positions=list(positions), tables=[[table] for table in self.sequence.tables()],
                prefill=prefill, out_rows=out_rows, sampler=job.sampler if draw else None, recent=list(job.seen)))
            if again is None:
                self.history.note(said, part, not prefill)
                self.tokens += part
                self._at.extend(positions)
            else:
                self._move(again, positions)
        except BaseException:
            del self.tokens[said:], self._at[said:]
            self._move(again or (), itertools.repeat(GONE))
            if self._truncate(first):
                self._drop_from(self.sequence.length)
            else:
                self._clear()
            raise
        return drawn

    def _announce(self, job: Job) -> Generator[Event, None, None]:
        """Tells and counts what was dropped since the last time."""
        news, self._news = self._news, []
        job.stats.evictions += news
        yield from news

    def _stay_in_range(self, rows: int, job: Job) -> Generator[Event, None, None]:
        """Where `rows` more would pass the last position that the model was trained for, what is held (at most what
        leaves half of the range free) is read again as a text of its own: its keys cannot be used at other positions."""
        if not self.sequence.evicts or self.sequence.length + rows <= self._limit:
            return
        keep = self.sequence.keep
        held = [index for index, position in enumerate(self._at) if self.sequence.holds(position)]
        n_head = sum(self._at[index] < keep for index in held)
        from_ = max(n_head, len(held) - (self._limit - keep) // 2)
        dropped, kept = held[n_head:from_], held[:n_head] + held[from_:]
        if dropped:
            where = spans(self._at[index] for index in dropped)
            self._news.append(Eviction(where, len(dropped), "n_positions"))
        self._truncate(0)
        self._move(range(len(self._at)), itertools.repeat(GONE))
        yield Notice(f"position {self._limit} is the last that the model was trained for: reading the {len(kept)} tokens "
                     "that are held again, from position 0")
        yield from self._announce(job)
        done = 0
        while done < len(kept):
            if self._interrupted:
                return
            part = kept[done : done + self.sequence.most_rows(self.chunk)]
            self._step([self.tokens[index] for index in part], job, prefill=True, out_rows=[], draw=False, again=part)
            done += len(part)
            job.stats.reread_tokens += len(part)
            yield Prefill(done, len(kept), 0)

    def _logprob(self, row: int, index: int, token: int, k: int) -> TokenLogprob:
        from kvrun.engine.logprobs import token_logprob

        return token_logprob(self.executor.logits()[row], index, token, k)

    def _read_prompt_logprobs(self, job: Job, start: int, n: int) -> None:
        """The row of prompt token i predicts token i+1; nothing predicts the first."""
        if start == 0:
            job.prompt_logprobs.append(TokenLogprob(0, job.ids[0], None))
        for row in range(n):
            index = start + row + 1
            if index < len(job.ids):
                job.prompt_logprobs.append(self._logprob(row, index, job.ids[index], job.logprobs))
