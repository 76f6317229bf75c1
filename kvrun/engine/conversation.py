"""A conversation: its messages, and the very token ids that the model read and wrote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence as Items
from dataclasses import dataclass
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


@dataclass
class Turn:
    """A message and its answer. read: the ids up to the answer, as the model read them. said: the answer's ids. plain: the prompt as the
    template encodes it, None where that must be asked for again."""

    user: str
    assistant: str
    read: list[int]
    said: list[int]
    plain: list[int] | None = None


class Conversation:
    """Messages in the form that chat templates take, and the ids that stand for them in the cache.

    An answer encoded again need not give the ids that the model drew. The prompt of the next turn therefore takes the
    earlier turns' ids as they were and only what is new from the template, so that a turn is prefilled once.
    """

    def __init__(self, text: Text, system: str | None = None) -> None:
        self._text = text
        self.system = system
        self.turns: list[Turn] = []
        self._asked: tuple[str, list[int], list[int]] = ("", [], [])

    @property
    def messages(self) -> list[Message]:
        """Every turn, after the system prompt."""
        return self._messages(self.turns)

    def _messages(self, turns: Items[Turn]) -> list[Message]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [{"role": role, "content": content} for turn in turns
                       for role, content in (("user", turn.user), ("assistant", turn.assistant))]

    @property
    def n_tokens(self) -> int | None:
        """How many ids the turns have read and said; None where another encoding of them is to be read first."""
        if not self.turns:
            return 0
        last = self.turns[-1]
        return len(last.read) + len(last.said) if last.read else None

    def clear(self) -> None:
        """Forgets every turn; the system prompt stays."""
        self.turns = []

    def undo(self, n: int = 1) -> list[Turn]:
        """Takes the last n turns back, or as many as there are. Returns them."""
        taken = self.turns[max(0, len(self.turns) - n) :]
        del self.turns[len(self.turns) - len(taken) :]
        return taken

    def change_system(self, system: str | None) -> None:
        """Another system prompt. What the model has read begins with the old one, so all of it is read again."""
        self.system = system
        for turn in self.turns:
            turn.read, turn.plain = [], None

    def ask(self, user: str) -> list[int]:
        """Token ids that end where the answer to `user` begins. The turn counts once `answered` is called."""
        plain = self._encode(self.turns, user)
        ids = self._spliced(plain)
        self._asked = (user, plain, ids)
        return ids

    def ask_again(self, turn: Turn) -> list[int]:
        """As `ask`, of a turn just taken back: the very ids that were read for it, where they are known."""
        if not turn.read:
            return self.ask(turn.user)
        self._asked = (turn.user, self._plain_of(turn, self.turns), turn.read)
        return turn.read

    def _encode(self, turns: Items[Turn], user: str) -> list[int]:
        return self._text.encode_chat([*self._messages(turns), {"role": "user", "content": user}], add_generation_prompt=True)

    def _plain_of(self, turn: Turn, before: Items[Turn]) -> list[int]:
        if turn.plain is None:
            turn.plain = self._encode(before, turn.user)
        return turn.plain

    def _spliced(self, plain: list[int]) -> list[int]:
        """`plain` with the earlier turns' ids as they were, where the template left those turns alone."""
        last = self.turns[-1] if self.turns else None
        if last is None or not last.read:
            return plain
        before = self._plain_of(last, self.turns[:-1])
        at = len(before)
        if not at or plain[:at] != before:
            return plain
        # The old answer ends at the first special token: nothing in a message's content is encoded as one.
        end = next((i for i in range(at, len(plain)) if plain[i] in self._text.special_ids), None)
        if end is None or self._decode(plain[at:end]).strip() != self._decode(last.said).strip():
            return plain  # the template changed the answer (say, it drops reasoning): the cache keeps what still agrees
        return last.read + last.said + plain[end:]

    def answered(self, text: str, ids: list[int]) -> None:
        """Records the turn last asked for, with its answer, also a partial one."""
        user, plain, read = self._asked
        self.turns.append(Turn(user, text, read, ids, plain))

    def _decode(self, ids: Iterable[int]) -> str:
        detokenizer = self._text.detokenizer()
        return "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()
