"""Operands of PTX instructions as C++ expressions: registers by their class, numbers, addresses."""

from __future__ import annotations

import re
from typing import Protocol

CLASSES = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64", "f": "f32", "fd": "f64", "SP": "b64", "SPL": "b64"}
C = {"pred": "bool", "f32": "float", "f64": "double", "f16": "uint16_t"}
for _bits in (8, 16, 32, 64):
    C |= {f"s{_bits}": f"int{_bits}_t", f"u{_bits}": f"uint{_bits}_t", f"b{_bits}": f"uint{_bits}_t"}

SPACES = ("global", "shared", "local", "param")
SPECIAL = re.compile(r"%(tid|ctaid|ntid|nctaid)\.([xyz])$")
REGISTER = re.compile(r"%([A-Za-z]+?)(\d*)$")


class Unknown(Exception):
    """A statement that the translator has no C++ for."""


def width(kind: str) -> int:
    """Bits of a PTX type."""
    return 1 if kind == "pred" else int(kind[1:])


def split(text: str) -> list[str]:
    """Operands, at the commas that are in no brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", text)] if text.strip() else []


def identifier(name: str) -> str:
    """A name, in C++."""
    return name.replace("$", "_S")


class Names(Protocol):
    """What an operand may name outside its function."""

    def address(self, name: str) -> str:
        """C++ of a variable's address."""

    def function(self, name: str) -> str:
        """A function's C++ name."""


class Operands:
    """Those of one function."""

    def __init__(self, module: Names, params: list[str]) -> None:
        self.module = module
        self.params = {param: i for i, param in enumerate(params)}
        self.local: set[str] = set()                     # names of memory of a thread's own
        self.registers: dict[str, str] = {}              # C++ name -> PTX class
        self.declared: list[dict[str, str]] = [{}]       # registers and parameters of a call, by scope

    def class_of(self, operand: str) -> str | None:
        """The PTX class of a register, None for what is none."""
        for scope in reversed(self.declared):
            if operand in scope:
                return scope[operand]
        match = REGISTER.match(operand)
        return CLASSES.get(match[1]) if match and not SPECIAL.match(operand) else None

    def register(self, operand: str) -> str:
        """Its C++ name."""
        name = operand.replace("%", "_")
        if not any(operand in scope for scope in self.declared):
            self.registers[name] = self.class_of(operand)
        return name

    def value(self, operand: str, kind: str) -> str:
        """An operand as a C++ expression of the type `kind`."""
        negated = operand.startswith("!")
        operand = operand.lstrip("!")
        if (of := self.class_of(operand)) is not None:
            name = self.register(operand)
            floats = (of[0] == "f", kind[0] == "f")
            if floats[0] == floats[1] and of == kind:
                return ("!" if negated else "") + name
            return f"cast<{C[kind]}>({name})" if not any(floats) else f"bits<{C[kind]}>({name})"
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return f"bits<float>(0x{match[1]}u)"
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return f"bits<double>(0x{match[1]}ull)"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", operand):
            # The smallest number has no literal of its own.
            return f"({C[kind]}){int(operand.rstrip('U'), 0) & (2 ** 64 - 1):#x}ull" if kind != "pred" else str(int(operand) != 0).lower()
        if match := SPECIAL.match(operand):
            return f"({C[kind]})ptx::{match[1]}().{match[2]}"
        return f"({C[kind]})({self.symbol(operand)})"

    def symbol(self, name: str) -> str:
        """The address of a variable: an offset in shared memory, a pointer otherwise."""
        if name in self.params:
            return f"(uint64_t)P[{self.params[name]}]"
        if name in self.local:
            return f"(uint64_t){name}"
        return self.module.address(name)

    def address(self, operand: str, space: str) -> str:
        """Of [base+offset], as a uint64_t."""
        base, _, offset = operand.strip("[]").partition("+")
        at = self.value(base, "b64") if self.class_of(base) != "b32" else f"(uint64_t){self.register(base)}"
        if space == "param" and base in self.declared[-1]:
            at = f"(uint64_t){base}"
        return f"{at} + ({int(offset)})" if offset else at

    def assign(self, operand: str, kind: str, value: str) -> str:
        """C++ that gives a register a value of the type `kind`; _: nobody wants it."""
        if operand == "_":
            return f"(void)({value});"
        of, name = self.class_of(operand), self.register(operand)
        if (of[0] == "f") == (kind[0] == "f"):
            return f"{name} = {value};"
        return f"{name} = bits<{C[of]}>({value});"
