"""Text to try tokenizers on, and the loaded text side of the two real models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

_ALICE = Path(__file__).parents[1] / "data" / "alice.txt"
_POOLS = (
    "abcdefghij \n", "  \t\n\r", "0123456789.,- ", "é à ü ñ ç ß ", "日本語中文한국어 テスト", "مرحبا שלום हिन्दी ไทย ",
    "🎉👩‍👩‍👧‍👦🇩🇪😀🏽", "\u200b\u200d\ufeff\u00a0\u3000\u2028", "aA'sS 'll 're 'T",
    "<|im_start|><|im_end|></s><s>[INST]<eos>",
    "\x00\x01\x7f\x1b\x9b", "ﷺǅⅧ²½٣", "▁▁ ▁", "=-_*#~/\\", "e\u0301o\u0308 a\u0323\u0302", "    ",
    "\ud7ff\ue000\uffff\U0010ffff",
    "<table></h1><b>", "def f(x):\n    return x\n", "{\"k\": [1, 2]}",
)


def varied_texts(seed: int, n: int) -> list[str]:
    """n odd texts, drawn from `seed`, after some prose and runs of one character."""
    draw = random.Random(seed)
    prose = _ALICE.read_text(encoding="utf-8")
    texts = ["", " ", "\n"]
    for size in (1, 20, 300, 3000):
        start = draw.randrange(len(prose) - size)
        texts.append(prose[start:start + size])
    for size in (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 100):
        for char in " \n\t=a0":
            texts += [char * size, f"x{char * size}y"]
    for _ in range(n):
        pools = draw.sample(_POOLS, draw.choice((1, 2, 3, 5)))
        texts.append("".join(draw.choice(draw.choice(pools)) if draw.random() < 0.8 else draw.choice(pools)
                             for _ in range(draw.randrange(1, 60))))
    for _ in range(n // 3):
        texts.append("".join(chr(draw.choice((draw.randrange(0x20, 0x7F), draw.randrange(0x80, 0x3000),
                                              draw.randrange(0x3000, 0xD800), draw.randrange(0xE000, 0x20000))))
                             for _ in range(draw.randrange(1, 40))))
    return texts


@pytest.fixture
def texts():
    """Texts drawn anew; the seed shows when a test fails."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"texts of seed {seed}")
    return varied_texts(seed, 300)


@pytest.fixture(scope="session")
def smollm2_text(smollm2):
    from kvrun.text import load_text
    return load_text(smollm2)


@pytest.fixture(scope="session")
def gemma3_text(gemma3):
    from kvrun.text import load_text
    return load_text(gemma3)
