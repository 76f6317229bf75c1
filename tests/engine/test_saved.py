"""A chat taken back or resumed says what the unbroken one would have said, and reads nothing again."""

import pytest

from kvrun.backends.batch import Sampler
from kvrun.cache.session import SessionStore
from kvrun.engine.conversation import Conversation
from kvrun.engine.saved import SavedChat
from kvrun.hub import resolve

from .conftest import _devices
from .running import collect
from .tiny_model import random_model

WARM, GREEDY = Sampler(seed=5, temperature=1.0, top_k=50), Sampler()
FORMATS = ["f32", "f16", "q8", "q4", "q8/q4"]


@pytest.fixture(scope="module")
def device():
    """Pages lie in the same way for every executor: one will do."""
    return _devices()[-1]


class Chat:
    """An engine with a conversation in a session."""

    def __init__(self, engine, folder, store, name="s", system="be brief"):
        self.engine, self.store = engine, store
        self.session = store.open(name)
        self.session.read()
        self.conversation = Conversation(engine.text, system)
        self.saved = SavedChat(store, self.session, resolve(str(folder)), engine, self.conversation)
        self.told = self.saved.resume() if self.session.document else None

    def turn(self, message, n=40, save=True, sampler=WARM):
        return self.answer(self.conversation.ask(message), n, save, sampler)

    def answer(self, ids, n=40, save=True, sampler=WARM):
        answer = collect(self.engine.generate(ids, sampler=sampler, max_tokens=n))
        self.conversation.answered(answer.text, answer.ids)
        if save:
            self.saved.save()
        return answer

    def close(self):
        self.session.close()


@pytest.fixture
def chats(open_tiny, tmp_path):
    """chats(folder, name="s", **settings) -> Chat in a store of this test."""
    store, opened = SessionStore(tmp_path / "sessions"), []

    def open_(folder, name="s", **settings):
        opened.append(Chat(open_tiny(folder, **settings), folder, store, name))
        return opened[-1]

    yield open_
    for chat in opened:
        chat.close()


MESSAGES = ["first " * 30, "second " * 40, "third"]
FOLDERS = ["model", "sliding_model"]


@pytest.mark.parametrize("sampler", [WARM, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_resumed_chat_goes_on_as_the_unbroken_one(chats, request, kv, folder, sampler):
    path = request.getfixturevalue(folder)
    unbroken = chats(path, "unbroken", kv=kv)
    said = [unbroken.turn(message, n=100, sampler=sampler).ids for message in MESSAGES]
    first = chats(path, kv=kv)
    assert [first.turn(message, n=100, sampler=sampler).ids for message in MESSAGES[:2]] == said[:2]
    first.close()
    resumed = chats(path, kv=kv)
    assert resumed.told == []
    assert (resumed.engine.tokens, resumed.conversation.messages) == (first.engine.tokens, first.conversation.messages)
    answer = resumed.turn(MESSAGES[2], n=100, sampler=sampler)
    assert answer.ids == said[2] and answer.notices == []
    assert answer.stop.stats.prefilled_tokens == answer.stop.stats.prompt_tokens - len(first.engine.tokens)


@pytest.mark.parametrize("sampler", [WARM, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_chat_whose_pages_are_gone_goes_on_as_the_unbroken_one(chats, request, kv, folder, sampler):
    """All is read again: what had been drawn as it was drawn, so that the next answers are the same, and those after another loss too."""
    path = request.getfixturevalue(folder)
    unbroken = chats(path, "unbroken", kv=kv)
    said = [unbroken.turn(message, n=100, sampler=sampler).ids for message in (*MESSAGES, "fourth")]
    chat = chats(path, kv=kv)
    for message in MESSAGES[:2]:
        chat.turn(message, n=100, sampler=sampler)
    for number, message in enumerate((MESSAGES[2], "fourth"), 2):
        chat.close()
        chat.store.limit = 0
        assert chat.store.trim("unbroken") == ["s"]
        chat = chats(path, kv=kv)
        assert "no longer on disk" in chat.told[0]
        answer = chat.turn(message, n=100, sampler=sampler)
        assert answer.stop.stats.cached_tokens == 0 and answer.ids == said[number]


@pytest.mark.parametrize("sampler", [WARM, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_undo_and_regen_read_nothing_again(chats, request, kv, folder, resume, sampler):
    """The turn taken back is longer than a sliding window and fills pages."""
    path = request.getfixturevalue(folder)
    unbroken = chats(path, "unbroken", kv=kv)
    said = [unbroken.turn(message, n=100, sampler=sampler).ids for message in (MESSAGES[0], "another one")]
    chat = chats(path, kv=kv)
    chat.turn(MESSAGES[0], n=100, sampler=sampler)
    held = len(chat.engine.tokens)
    chat.turn(MESSAGES[1], n=300, sampler=sampler)
    if resume:
        chat.close()
        chat = chats(path, kv=kv)
    # another answer to the same message: the whole prompt but its last token is there
    turn = chat.conversation.undo()[0]
    again = chat.answer(chat.conversation.ask_again(turn), n=300, sampler=sampler)
    assert again.ids == turn.said and again.stop.stats.prefilled_tokens == 1 and again.notices == []
    # back to before it, and on with another message
    chat.conversation.undo()
    answer = chat.turn("another one", n=100, sampler=sampler)
    assert answer.ids == said[1] and answer.notices == []
    assert answer.stop.stats.prefilled_tokens <= answer.stop.stats.prompt_tokens - held


@pytest.mark.parametrize("kv", ["f16", "q4"])
def test_undo_after_an_eviction_brings_back_what_was_dropped(chats, model, kv):
    unbroken = chats(model, "unbroken", kv=kv, n_ctx=512)
    chat = chats(model, kv=kv, n_ctx=512)
    for each in (unbroken, chat):
        each.engine.evict("window")
        each.turn(MESSAGES[0], n=60)
    assert chat.turn(MESSAGES[1], n=300).evictions
    chat.close()
    chat = chats(model, kv=kv, n_ctx=512)
    chat.engine.evict("window")
    chat.conversation.undo()
    assert chat.turn("on", n=20).ids == unbroken.turn("on", n=20).ids


@pytest.mark.parametrize("kv", ["f16", "q4"])
def test_an_evicted_sequence_resumes(chats, model, kv):
    unbroken, chat = chats(model, "unbroken", kv=kv, n_ctx=512), chats(model, kv=kv, n_ctx=512)
    for each in (unbroken, chat):
        each.engine.evict("strided")
        assert any(each.turn(f"message {i}", n=150).evictions for i in range(6))
    held = chat.engine.held
    chat.close()
    chat = chats(model, kv=kv, n_ctx=512)
    chat.engine.evict("strided")
    assert chat.told == [] and chat.engine.held == held
    assert chat.turn("on", n=200).ids == unbroken.turn("on", n=200).ids


def test_pages_are_written_once(chats, model):
    chat = chats(model)
    chat.turn("word " * 150, n=10)
    before = {path.name: path.stat().st_mtime_ns for path in chat.session.pages.iterdir()}
    assert len(before) == len(chat.engine.tokens) // 128 + 1
    chat.turn("more", n=10)
    after = {path.name: path.stat().st_mtime_ns for path in chat.session.pages.iterdir()}
    assert sum(name not in before for name in after) <= 2 and all(after[name] == before[name] for name in after if name in before)
    # what nobody needs is gone, and everything else is there
    chat.conversation.clear()
    chat.turn("short", n=3)
    assert len(list(chat.session.pages.iterdir())) == 1


def test_another_format_or_model_reads_the_conversation_again(chats, model, tmp_path, seed):
    chat = chats(model)
    chat.turn("hello", n=10)
    messages, read = chat.conversation.messages, chat.conversation.turns[0].read
    chat.close()
    other = chats(model, kv="q8")
    assert "cache format (f32)" in other.told[0] and other.engine.tokens == []
    assert other.conversation.messages == messages
    assert other.conversation.ask("on")[: len(read)] == read
    assert other.turn("on").stop.stats.cached_tokens == 0
    other.close()
    foreign = chats(random_model(tmp_path / "other", seed + 1))
    assert "another model" in foreign.told[0] and foreign.conversation.messages[:3] == messages
    foreign.turn("on")


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_a_damaged_page_is_said_and_the_conversation_read_again(chats, model, rng, harm):
    chat = chats(model)
    chat.turn("word " * 60, n=10)
    wanted = chat.turn("on", n=5, save=False).ids
    chat.close()
    victim = rng.choice(sorted(chat.session.pages.iterdir()))
    data = bytearray(victim.read_bytes())
    if harm == "flipped":
        data[rng.randrange(200, len(data))] ^= 1
    victim.write_bytes(data if harm == "flipped" else data[: len(data) // 2])
    if harm == "gone":
        victim.unlink()
    again = chats(model)
    assert victim.name in again.told[0] and again.engine.tokens == []
    answer = again.turn("on", n=5)
    assert answer.stop.stats.cached_tokens == 0 and answer.ids == wanted
    again.close()
    assert chats(model).told == []
