"""What going on with a saved chat costs beside reading it again, and whether the chat goes on as the unbroken one would have.

A chat reads TOKENS of a text, answers and is saved; another engine resumes it and answers the same next message.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from kvrun.backends.batch import Sampler
from kvrun.cache.session import SessionStore
from kvrun.engine.conversation import Conversation
from kvrun.engine.events import Stop, Token
from kvrun.engine.saved import SavedChat
from kvrun.hub import resolve
from kvrun.runtime import open_engine

TEXT = Path(__file__).parents[1] / "data" / "alice.txt"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""For base models, which have no template."""


class Chat:
    """An engine, its conversation and its session."""

    def __init__(self, files, kv: str, store: SessionStore) -> None:
        self.engine = open_engine(files, n_ctx=8192, kv=kv)
        if not self.engine.text.has_template:
            self.engine.text.use_template(PLAIN, __file__)
        self.conversation = Conversation(self.engine.text)
        self.session = store.open("bench")
        self.session.read()
        self.saved = SavedChat(store, self.session, files, self.engine, self.conversation)

    def turn(self, message: str) -> tuple[list[int], Stop]:
        """One answer: its ids and its end."""
        events = list(self.engine.generate(self.conversation.ask(message), sampler=Sampler(seed=1, temperature=1.0, top_k=40), max_tokens=16))
        ids = [event.id for event in events if isinstance(event, Token)]
        self.conversation.answered("".join(event.text for event in events if isinstance(event, Token)), ids)
        return ids, events[-1]

    def close(self) -> None:
        self.session.close()
        self.engine.close()


def measure(files, kv: str, tokens: int, folder: Path) -> None:
    """Prints one row."""
    store = SessionStore(folder)
    chat = Chat(files, kv, store)
    ids = (chat.engine.text.encode(TEXT.read_text(encoding="utf-8")) * 4)[:tokens]
    _, end = chat.turn("".join(chat.engine.text.token_text(i) for i in ids))
    started = time.perf_counter()
    chat.saved.save()
    saved, held = time.perf_counter() - started, len(chat.engine.tokens)
    wanted, _ = chat.turn("And then?")
    chat.close()
    again = Chat(files, kv, store)
    started = time.perf_counter()
    told = again.saved.resume()
    resumed = time.perf_counter() - started
    same = again.turn("And then?")[0] == wanted and not told
    again.close()
    store.remove("bench")
    print(f"{files.name:<14} {kv:<6} {held:>6} tokens  prefill {end.stats.prefill_seconds:6.3f} s  save {saved:6.3f} s  resume {resumed:6.3f} s  "
          f"ratio {resumed / end.stats.prefill_seconds:.3f}  {'the same answer' if same else 'ANOTHER ANSWER'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--kv", default="f16,q8,q4")
    parser.add_argument("--tokens", type=int, default=4040)
    options = parser.parse_args()
    for model in options.models:
        files = resolve(model)
        for kv in options.kv.split(","):
            with tempfile.TemporaryDirectory() as folder:
                measure(files, kv, options.tokens, Path(folder))


if __name__ == "__main__":
    main()
