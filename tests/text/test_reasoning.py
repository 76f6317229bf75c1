"""Reasoning apart from the answer, however the text is cut."""

import random

import pytest

from kvrun.text.reasoning import Reasoning, opened_by

CASES = [
    ("plain answer", None, "", "plain answer"),
    ("<think>\nhm\n</think>\n\nYes", None, "hm\n", "Yes"),
    ("\n <thinking>a<b</thinking>c", None, "a<b", "c"),
    ("still thinking</thi", "<think>", "still thinking</thi", ""),
    ("\nhm</think>Yes <think>no</think>", "<think>", "hm", "Yes <think>no</think>"),
    ("<thin ice>", None, "", "<thin ice>"),
    ("<think></think>", None, "", ""),
    ("[THINK]x[/THINK]  y", None, "x", "y"),
    ("  ", None, "", "  "),
    ("<think>cut", None, "cut", ""),
]


@pytest.mark.parametrize(("text", "begun", "thought", "answer"), CASES)
def test_in_pieces_of_any_size(text, begun, thought, answer):
    for trial in range(50):
        draw, parts, at = random.Random(trial), Reasoning(begun), 0
        found = {"think": "", "answer": ""}
        while at < len(text):
            size = draw.randint(1, 5)
            for kind, part in parts.push(text[at : at + size]):
                found[kind] += part
            at += size
        for kind, part in parts.flush():
            found[kind] += part
        assert (found["think"], found["answer"]) == (thought, answer)


def test_a_prompt_that_opens_the_block():
    assert opened_by("<turn>assistant\n<think>\n") == "<think>"
    assert opened_by("<turn>assistant\n") is None and opened_by("<think> no") is None
