"""Translates PTX, as nvcc makes it of kernels/cuda, to C++ over ptx.h: what the compiler made of the kernels runs on the host, the
instructions written by hand among it. Only what nvcc emits for these sources is known; anything else is an error. With sites, every access to
memory is known by its line of the source, for count.h.

Source: PTX ISA 9.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptx_instructions import Instructions
from ptx_operands import C, Unknown, identifier, split, width

GAP = 64
"""Bytes behind each variable in shared memory that belong to none."""


class Function(Instructions):
    """One .entry or .func: its statements as C++."""

    def __init__(self, module: Module, name: str, head: str, body: str) -> None:
        """head: what stands before the body."""
        self.line = "?"                                  # of the source, FILE:LINE
        super().__init__(module, re.findall(r"\.param [^,()]*?([\w$]+_param_\d+)", head))
        self.name, self.entry = name, ".entry" in head
        limit = re.search(r"\.maxntid (\d+), (\d+), (\d+)", head)
        self.max_threads = int(limit[1]) * int(limit[2]) * int(limit[3]) if limit else 1024
        self.shared: list[str] = []                      # names of its own variables
        self.lines: list[str] = []
        for statement in statements(body):
            try:
                self.lines.append(self.statement(statement))
            except (Unknown, KeyError, ValueError, IndexError) as e:
                raise Unknown(f"{name}: {statement!r}: {e!r}") from e

    def text(self) -> str:
        """The function in C++."""
        registers = "".join(f"    {C[kind]} {name};\n" for name, kind in self.registers.items())
        return f"static void {self.module.function(self.name)}(void **P) {{\n{registers}" + "\n".join(self.lines) + "\n}\n"

    def statement(self, text: str) -> str:
        """One statement, brace or label."""
        if text == "{":
            self.declared.append({})
            return "{"
        if text == "}":
            self.declared.pop()
            return "}"
        if text.endswith(":"):
            return f"{identifier(text[:-1])}:;"
        if text.startswith("."):
            return self.directive(text)
        guard = ""
        if text.startswith("@"):
            predicate, text = text[1:].split(None, 1)
            guard = f"if ({self.value(predicate, 'pred')}) "
        opcode, _, operands = text.partition(" ")
        done = self.instruction(opcode.split("."), split(operands.strip()))
        if self.module.sites is not None and re.match(r"(ld|st|atom|red|cp\.async\.cg)\.(?!param|local)", opcode):
            self.module.sites.append(f"{self.line} {opcode}")
            done = f"{{ ptx::site = first_site + {len(self.module.sites) - 1}; {done} }}"
        return f"    {guard}{{ {done} }}" if guard and done.count(";") > 1 else f"    {guard}{done}"

    def directive(self, text: str) -> str:
        """A declaration; all but registers of their own scope are the module's business."""
        kind = text.split(None, 1)[0]
        if kind == ".reg":
            declared, name = text.split(None, 2)[1:]
            if "<" in name or len(self.declared) == 1:
                return ""
            self.declared[-1][name] = declared[1:]
            return f"    {C[declared[1:]]} {name.replace('%', '_')};"
        if kind == ".param":                             # of a call
            match = re.fullmatch(r"\.param (?:\.align \d+ )?\.b(\d+) (\w+)(?:\[(\d+)\])?", text)
            self.declared[-1][match[2]] = "param"
            return f"    alignas(16) char {match[2]}[{int(match[1]) // 8 * int(match[3] or 1)}];"
        if kind == ".local":
            match = re.fullmatch(r"\.local \.align \d+ \.b8 (\w+)\[(\d+)\]", text)
            self.local.add(match[1])
            return f"    alignas(16) char {match[1]}[{match[2]}];"
        if kind == ".shared":
            self.shared.append(self.module.declare_shared(text))
            return ""
        if kind == ".pragma":
            return ""
        if kind == ".loc":                               # what is inlined has its caller behind a comma
            number, line = text.split(",")[0].split()[1:3]
            self.line = f"{self.module.files.get(number, number)}:{line}"
            return ""
        raise Unknown("directive")


class Module:
    """One file of PTX."""

    def __init__(self, text: str, *, sites: bool = False) -> None:
        """sites: of PTX with -lineinfo."""
        self.sites: list[str] | None = [] if sites else None
        self.files = dict(re.findall(r'\.file\s+(\d+) "(?:[^"]*/)?([^"/]+)"', text)) if sites else {}
        if sites:
            text = re.sub(r"\n\s*\.file[^\n]*|\n\s*\.section[^{]*\{[^}]*\}", "", text)
            text = re.sub(r"(\n\s*\.loc\s[^\n]*)", r"\1;", text)
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S)
        self.shared: dict[str, tuple[int, int]] = {}     # name -> (alignment, bytes); 0 bytes: the dynamic part
        self.constants: dict[str, str] = {}              # name -> its C++
        self.functions: dict[str, Function] = {}
        self._numbers: dict[str, int] = {}
        found = list(top_level(text))
        for head, _ in found:                            # functions may name what comes later
            if re.match(r"(\.extern )?\.shared ", head):
                self.declare_shared(head.removeprefix(".extern "))
            elif head.startswith(".global"):
                self.constant(head)
        for head, body in found:
            match = re.match(r"(?:\.visible |\.weak )?\.(?:entry|func) ([\w$]+)", head)
            if match and body is not None:
                self.functions[match[1]] = Function(self, match[1], head, body)

    def function(self, name: str) -> str:
        """Its C++ name."""
        return f"function_{self._numbers.setdefault(name, len(self._numbers))}"

    def declare_shared(self, text: str) -> str:
        """A variable in shared memory; its name."""
        match = re.fullmatch(r"\.shared \.align (\d+) \.([bsuf]\d+) ([\w$]+)(\[\d*\])?", text)
        if not match:
            raise Unknown(text)
        count = int(match[4].strip("[]") or 0) if match[4] else 1
        self.shared[match[3]] = int(match[1]), width(match[2]) // 8 * count
        return match[3]

    def constant(self, text: str) -> None:
        """Initialized global memory."""
        match = re.fullmatch(r"\.global \.align \d+ \.b8 ([\w$]+)\[(\d+)\] = \{([\d, ]+)\}", text)
        if not match:
            raise Unknown(text)
        self.constants[match[1]] = f"alignas(16) static const uint8_t {match[1]}[{match[2]}] = {{{match[3]}}};"

    def address(self, name: str) -> str:
        """C++ of a variable's address."""
        if name in self.constants:
            return f"(uint64_t){name}"
        if name in self.shared:
            return f"at_{identifier(name)}" if self.shared[name][1] else "ptx::dynamic_at"
        raise Unknown(f"symbol {name}")

    def text(self) -> str:
        """The module in C++."""
        out = ['#include "ptx.h"', *self.constants.values()]
        if self.sites is not None:
            out += ['#include "count.h"', "static const uint32_t first_site = ptx::add_sites({" + ", ".join(f'"{site}"' for site in self.sites) + "});"]
        at, places = 0, {}
        for name, (alignment, size) in self.shared.items():
            if size:
                at = -(-at // alignment) * alignment
                places[name] = at
                out.append(f"static constexpr uint64_t at_{identifier(name)} = {at};")
                at += size + GAP
        out += [f"static void {self.function(name)}(void **P);" for name in self.functions]
        out += [function.text() for function in self.functions.values()]
        variables = ", ".join(f"{{{places[name]}, {self.shared[name][1]}}}" for name in places)
        for name, function in self.functions.items():
            if function.entry:
                used = sum(self.shared[v][1] for v in places if v in self.reached(name))
                out.append(f'static const ptx::Enrolled enrolled_{self._numbers[name]}({{"{name}", {self.function(name)}, {function.max_threads}, '
                           f"{used}, {{{variables}}}}});")
        return "\n".join(out) + "\n"

    def reached(self, name: str) -> set[str]:
        """The static shared variables that a kernel has: its own, those of the file, and those of all functions."""
        own = {v for other, function in self.functions.items() if other != name and function.entry for v in function.shared}
        return set(self.shared) - own


def statements(body: str) -> Iterator[str]:
    """Statements, braces and labels of a function's body, blanks made one."""
    start = 0
    for match in re.finditer(r"[;{}]|(?<=[\w$]):(?=\s)", body):
        text = " ".join(body[start : match.start()].split())
        if match[0] in "{}" and text:                    # of an operand, or an open list
            continue
        if match[0] in "{}":
            yield match[0]
        elif match[0] == ":":
            yield text + ":"
        elif text:
            yield text
        start = match.end()


def top_level(text: str) -> Iterator[tuple[str, str | None]]:
    """(declaration, body or None) of all that stands outside functions."""
    position = 0
    while match := re.compile(r"\s*((?:\.visible |\.weak |\.extern )?\.(\w+)[^;{]*)").match(text, position):
        head, position = " ".join(match[1].split()), match.end()
        if match[2] in ("version", "target", "address_size"):
            position = text.index("\n", match.start(1))
            continue
        if match[2] == "global" and text[position] == "{":
            end = text.index("}", position) + 1
            head, position = head + " " + " ".join(text[position:end].split()), end
        if text[position] == "{":
            depth, start = 0, position
            for brace in re.compile(r"[{}]").finditer(text, position):
                depth += 1 if brace[0] == "{" else -1
                if not depth:
                    break
            position = brace.end()
            yield head, text[start + 1 : position - 1]
            continue
        position += 1                                    # the semicolon
        yield head, None
    if text[position:].strip():
        raise Unknown(text[position : position + 80])
