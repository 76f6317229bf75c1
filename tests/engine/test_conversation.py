"""A conversation is prefilled turn by turn, never again from the start."""

from kvrun.backends.batch import Sampler
from kvrun.engine.conversation import Conversation

from .running import collect
from .tiny_model import random_model, scripted_model

SAMPLER = Sampler(seed=11, temperature=1.0, top_k=50)


def take_turn(engine, conversation, message, max_tokens=20):
    prompt = conversation.ask(message)
    answer = collect(engine.generate(prompt, sampler=SAMPLER, max_tokens=max_tokens))
    conversation.answered(answer.text, answer.ids)
    return prompt, answer


def test_each_turn_is_prefilled_once(open_tiny, model):
    """A random model draws bytes that are no text, so its answer encoded again gives other ids; the chat keeps those
    that were drawn."""
    engine = open_tiny(model)
    conversation = Conversation(engine.text, "be brief")
    said = 0
    for turn in range(4):
        prompt, answer = take_turn(engine, conversation, f"message {turn}")
        assert answer.stop.stats.cached_tokens == (said - 1 if turn else 0)  # the last drawn token had not been run
        assert engine.tokens == prompt + answer.ids[:-1]
        said = len(prompt) + len(answer.ids)
    assert engine.executor.appended == len(engine.spec.layers) * (said - 1)



def test_what_the_model_reads_is_what_the_template_says(open_tiny, tmp_path):
    """Where the answer's own ids are what encoding gives, the spliced prompt is the template's, id by id."""
    folder = scripted_model(tmp_path / "bytes", [b"o", b"k", b"!"])
    engine = open_tiny(folder)
    conversation = Conversation(engine.text)
    for message in ("one", "two <turn> </s>", "three"):
        rendered = engine.text.encode_chat([*conversation.messages, {"role": "user", "content": message}])
        prompt, answer = take_turn(engine, conversation, message)
        assert prompt == rendered
        assert answer.text == "ok!" and answer.reason == "eos"


def test_a_partial_answer_stays_part_of_the_conversation(open_tiny, model):
    engine = open_tiny(model)
    conversation = Conversation(engine.text)
    prompt, answer = take_turn(engine, conversation, "go", max_tokens=5)
    following = conversation.ask("on")
    assert following[: len(prompt) + 5] == prompt + answer.ids
    assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}


def test_an_answer_that_the_template_rewrites_is_read_as_the_template_has_it(open_tiny, tmp_path, seed):
    template = ("{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n"
                "{{ 'gone' if m['role'] == 'assistant' else m['content'] }}</s>{% endfor %}"
                "{% if add_generation_prompt %}<turn>assistant\n{% endif %}")
    engine = open_tiny(random_model(tmp_path / "m", seed, template=template))
    conversation = Conversation(engine.text)
    prompt, _ = take_turn(engine, conversation, "a")
    following = conversation.ask("b")
    assert following == engine.text.encode_chat([*conversation.messages, {"role": "user", "content": "b"}])
    assert collect(engine.generate(following, max_tokens=1)).stop.stats.cached_tokens >= len(prompt)


def test_clear_keeps_the_system_prompt(open_tiny, model):
    engine = open_tiny(model)
    conversation = Conversation(engine.text, "be brief")
    fresh = conversation.ask("x")
    take_turn(engine, conversation, "y")
    conversation.clear()
    assert conversation.ask("x") == fresh
