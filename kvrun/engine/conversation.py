"""A conversation: its messages, and the very token ids that the model read and wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrun.text import Text

Message = dict[str, str]


class Conversation:
    """Messages in the form that chat templates take, and the ids that stand for them in the cache.

    An answer encoded again need not give the ids that the model drew. The prompt of the next turn therefore takes the
    earlier turns' ids as they were and only what is new from the template, so that a turn is prefilled once.
    """

    def __init__(self, text: Text, system: str | None = None) -> None:
        self._text = text
        self.system = system
        self.messages: list[Message] = []
        self.clear()

    def clear(self) -> None:
        """Forgets every turn; the system prompt stays."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._ids: list[int] = []
        self._answer_at = 0

    def prompt(self, user: str) -> list[int]:
        """Token ids that end where the answer to `user` begins. Changes nothing: `add` records the turn."""
        ids = self._text.encode_chat([*self.messages, {"role": "user", "content": user}], add_generation_prompt=True)
        at = self._answer_at
        if not self._ids or ids[:at] != self._ids[:at]:
            return ids
        # The old answer ends at the first special token: nothing in a message's content is encoded as one.
        end = next((i for i in range(at, len(ids)) if ids[i] in self._text.special_ids), None)
        if end is None or self._decode(ids[at:end]).strip() != self._decode(self._ids[at:]).strip():
            return ids  # the template changed the answer (say, it drops reasoning): the cache keeps what still agrees
        return self._ids + ids[end:]

    def add(self, user: str, prompt: list[int], answer: str, answer_ids: list[int]) -> None:
        """Records a turn: what `prompt` gave for `user`, and the answer, also a partial one."""
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        self._ids = prompt + answer_ids
        self._answer_at = len(prompt)

    def _decode(self, ids: Iterable[int]) -> str:
        detokenizer = self._text.detokenizer()
        return "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()
