"""One answer of `kvrun run`: from a prompt's ids to what is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrun.cli import options as opt
from kvrun.errors import ContextFullError, KvrunError, UsageError

if TYPE_CHECKING:
    from kvrun.cache.prompt_cache import PromptCache
    from kvrun.cli.run import RunOptions
    from kvrun.cli.run_output import Output
    from kvrun.engine import Engine
    from kvrun.engine.events import Stop
    from kvrun.hub.files import ModelFiles
    from kvrun.terminal import Console
    from kvrun.text.grammar import Constraint, Grammar


class Runner:
    """A model that answers prompts in one way. continues: an answer goes on the prompt's own text, with no chat template between."""

    def __init__(self, options: RunOptions, console: Console, files: ModelFiles, engine: Engine, schema: str | None) -> None:
        self.options = options
        self.console = console
        self.files = files
        self.engine = engine
        self.continues = options.raw or not engine.text.has_template
        self.sampler = opt.build_sampler(options.sampling, files.generation_config, files.sampling)
        opt.set_overflow(options.overflow, engine, files, options.system, chat=not self.continues)
        self._grammar: Grammar | None = None
        self._constraint: Constraint | None = None
        if schema is not None:
            from kvrun.text.grammar import from_schema

            self._grammar = from_schema(engine.text, schema, str(options.schema))
        elif options.regex is not None:
            from kvrun.text.grammar import from_regex

            self._grammar = from_regex(engine.text, options.regex)

    def encode(self, prompt: str) -> list[int]:
        """The ids that the model reads for `prompt`."""
        options, text = self.options, self.engine.text
        if self.continues:
            if options.system:
                raise UsageError(f"{options.model.model} has no chat template, so --system has no place; put it into the prompt")
            return text.encode(prompt, bos=True)
        messages = [{"role": "system", "content": options.system}] if options.system else []
        return text.encode_chat([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)

    def answer(self, ids: list[int]) -> int:
        """Prints the answer to the prompt `ids` as the options want it. Returns the exit code."""
        from kvrun.cli.report import stats_line
        from kvrun.cli.run_output import CodeOutput, JsonLines, JsonOutput, TextOutput

        options = self.options
        kind = JsonOutput if options.json else JsonLines if options.jsonl else CodeOutput if options.extract else TextOutput
        output = kind(self, ids)
        cache = self._prompt_cache(ids)
        if cache is not None:
            cache.load(ids)
        end = self.generate(ids, output, cache)
        output.end(end)
        if cache is not None:
            cache.save()
        if options.stats:
            self.console.report(stats_line(self.engine, self.sampler, end))
        if end.reason == "interrupt":
            return 130
        output.check(end)
        if end.reason in ("length", "stop") and self._constraint is not None and not self._constraint.whole:
            raise KvrunError(f"the answer was cut before {'--schema' if options.schema else '--regex'} was fulfilled; use a larger --max-tokens"
                             + (", or no --stop" if end.reason == "stop" else ""))
        if end.reason == "context":
            n_ctx, trained = self.engine.n_ctx, self.engine.spec.n_positions
            larger = f"use a larger --n-ctx (at most {trained}) or" if n_ctx < trained else "use"
            raise ContextFullError(f"the answer was cut: prompt and answer fill all {n_ctx} tokens of context; {larger} --overflow evict to go on, "
                                   "or --max-tokens to end it before")
        return 0

    def _prompt_cache(self, ids: list[int]) -> PromptCache | None:
        from kvrun.cache.formats import SHORTEST_KEPT

        if not self.options.prompt_cache or self.options.echo or len(ids) < SHORTEST_KEPT:
            return None
        from kvrun.cache.prompt_cache import PromptCache
        from kvrun.engine.saved import pages_identity

        return PromptCache(pages_identity(self.files, self.engine, self.options.model.weights), self.engine)

    def constraint(self, ids: list[int]) -> Constraint | None:
        """What an answer to the prompt `ids` may say."""
        if self._grammar is None:
            return None
        from kvrun.text.reasoning import opened_by

        self._constraint = self._grammar.begin(None if self.continues else opened_by(prompt_end(self.engine, ids)))
        return self._constraint

    def generate(self, ids: list[int], output: Output, cache: PromptCache | None = None) -> Stop:
        """Runs one answer through `output`. Ctrl-C, SIGTERM and SIGHUP end it."""
        from kvrun.cli.interrupts import interrupts
        from kvrun.engine.events import Prefill, Stop, Token

        options = self.options
        events = self.engine.generate(ids, sampler=self.sampler, max_tokens=options.sampling.max_tokens, stop=options.sampling.stop,
                                      logprobs=options.logprobs or 0, echo=options.echo, continued=self.continues,
                                      constraint=self.constraint(ids))
        first = True
        with interrupts(self.engine):
            for event in events:
                output.event(event)
                if isinstance(event, Stop):
                    return event
                if isinstance(event, Prefill):
                    self.console.progress("reading the prompt", event.done, event.total, unit="tokens")
                if first and isinstance(event, Token) and cache is not None:
                    cache.keep()
                    first = False
        raise AssertionError("a generation ends with Stop")


def prompt_end(engine: Engine, ids: list[int]) -> str:
    """The text of a prompt's last ids, special tokens included: enough to spell the beginning of a reasoning block."""
    decode = engine.text.detokenizer(special=True, continued=True)
    return "".join(decode.push(i) for i in ids[-16:]) + decode.flush()
