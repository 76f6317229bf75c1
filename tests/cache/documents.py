"""A session's document with nothing in it."""

from __future__ import annotations


def document(**parts) -> dict:
    """One that is sound; `parts` take the place of its own or stand beside them."""
    return {"format": 1, "created": 1.0, "saved": 2.0, "system": None, "turns": [], "tokens": [], "positions": [], "marks": [], "pages": [], "settings": {},
            "model": {"name": "m", "call": "m", "path": "/m", "revision": None, "kv": "f16", "n_ctx": 512, "weights": "auto"},
            "identity": dict.fromkeys(("weights", "tokenizer", "cache", "template", "ropes"), "0")} | parts
