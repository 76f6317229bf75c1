"""A conversation: its messages, and the very token ids that the model read and wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrun.text import Text

Message = dict[str, str]


def head_tokens(text: Text, system: str | None) -> int:
    """How many ids every conversation with this system prompt begins with, the template's own ones included."""
    messages = [{"role": "system", "content": system}] if system else []
    one, other = (text.encode_chat([*messages, {"role": "user", "content": content}], add_generation_prompt=True)
                  for content in ("A", "7"))
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Conversation:
    """Messages in the form that chat templates take, and the ids that stand for them in the cache.

    An answer encoded again need not give the ids that the model drew. The prompt of the next turn therefore takes the
    earlier turns' ids as they were and only what is new from the template, so that a turn is prefilled once.
    """

    def __init__(self, text: Text, system: str | None = None) -> None:
        self._text = text
        self.system = system
        self.clear()

    def clear(self) -> None:
        """Forgets every turn; the system prompt stays."""
        self.messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self._asked: tuple[str, list[int], list[int]] = ("", [], [])
        # The last turn that was answered: its prompt as the template encodes it, the ids up to its answer as the model
        # read them, and the answer's.
        self._plain: list[int] = []
        self._read: list[int] = []
        self._said: list[int] = []

    def ask(self, user: str) -> list[int]:
        """Token ids that end where the answer to `user` begins. The turn counts once `answered` is called."""
        plain = self._text.encode_chat([*self.messages, {"role": "user", "content": user}], add_generation_prompt=True)
        ids = self._spliced(plain)
        self._asked = (user, plain, ids)
        return ids

    def _spliced(self, plain: list[int]) -> list[int]:
        """`plain` with the earlier turns' ids as they were, where the template left those turns alone."""
        at = len(self._plain)
        if not at or plain[:at] != self._plain:
            return plain
        # The old answer ends at the first special token: nothing in a message's content is encoded as one.
        end = next((i for i in range(at, len(plain)) if plain[i] in self._text.special_ids), None)
        if end is None or self._decode(plain[at:end]).strip() != self._decode(self._said).strip():
            return plain  # the template changed the answer (say, it drops reasoning): the cache keeps what still agrees
        return self._read + self._said + plain[end:]

    def answered(self, text: str, ids: list[int]) -> None:
        """Records the turn last asked for, with its answer, also a partial one."""
        user, self._plain, self._read = self._asked
        self._said = ids
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": text}]

    def _decode(self, ids: Iterable[int]) -> str:
        detokenizer = self._text.detokenizer()
        return "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()
