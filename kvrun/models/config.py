"""Typed, bounded reading of a config.json: every value that leaves here has the type and range that was asked for."""

from __future__ import annotations

import math

from kvrun.errors import ModelError, show

REQUIRED = object()
"""As a default: the key must be there and not null."""


class Config:
    """A JSON object with the name of its file, for messages. `prefix` is put before keys of nested objects.

    The getters raise ModelError for a value of the wrong type or range, and for an absent or null key unless a
    default is given.
    """

    def __init__(self, values: object, where: str, prefix: str = ""):
        if not isinstance(values, dict):
            raise ModelError(f"{where}: {prefix.rstrip('.') or 'the config'} is {show(values)}, not a JSON object")
        self.values, self.where, self.prefix = values, where, prefix

    def error(self, key: str, text: str) -> ModelError:
        """A ModelError that says which key of which file."""
        return ModelError(f"{self.where}: {self.prefix}{key} {text}")

    def has(self, key: str) -> bool:
        """Is there a value other than null?"""
        return self.values.get(key) is not None

    def get(self, key: str, default: object = REQUIRED) -> object:
        """The value as it is; null counts as absent."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise self.error(key, "is null, but must be given" if key in self.values else "is missing")
        return default

    def integer(self, key: str, low: int, high: int, default: object = REQUIRED):
        """An int in [low, high]. Neither true nor 4096.0 is one."""
        value = self.get(key, default)
        if value is default:
            return value
        if type(value) is not int:
            raise self.error(key, f"is {show(value)}, not an integer")
        if not low <= value <= high:
            raise self.error(key, f"is {show(value)}, not within {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float, default: object = REQUIRED):
        """A finite float in [low, high]."""
        value = self.get(key, default)
        return value if value is default else self._number(key, value, low, high)

    def _number(self, key: str, value: object, low: float, high: float) -> float:
        if type(value) not in (int, float):
            raise self.error(key, f"is {show(value)}, not a number")
        if not (math.isfinite(value) if type(value) is float else True) or not low <= value <= high:
            raise self.error(key, f"is {show(value)}, not within {low:g}..{high:g}")
        return float(value)

    def flag(self, key: str, default: object = REQUIRED):
        """true or false."""
        value = self.get(key, default)
        if value is not default and type(value) is not bool:
            raise self.error(key, f"is {show(value)}, not true or false")
        return value

    def text(self, key: str, default: object = REQUIRED):
        """A string."""
        value = self.get(key, default)
        if value is not default and type(value) is not str:
            raise self.error(key, f"is {show(value)}, not a string")
        return value

    def items(self, key: str, default: object = REQUIRED):
        """A list, its elements unchecked."""
        value = self.get(key, default)
        if value is not default and not isinstance(value, (list, tuple)):
            raise self.error(key, f"is {show(value)}, not a list")
        return value

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of exactly `count` numbers in [low, high]."""
        values = self.items(key)
        if len(values) != count:
            raise self.error(key, f"has {len(values)} values, not {count}")
        return tuple(self._number(f"{key}[{i}]", v, low, high) for i, v in enumerate(values))

    def child(self, key: str) -> Config:
        """A nested object."""
        return Config(self.get(key), self.where, f"{self.prefix}{key}.")
