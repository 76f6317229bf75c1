"""Prefill and decode as a generator of typed events; it knows no terminal."""

from kvrun.engine.engine import Engine

__all__ = ["Engine"]
