"""PTX instructions as C++ over ptx.h, one at a time."""

from __future__ import annotations

from ptx_operands import SPACES, C, Operands, Unknown, identifier, split, width

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
INFIX = {"and": "&", "or": "|", "xor": "^"}
CALLS = ("min", "max", "div", "rem", "abs", "neg", "copysign", "sqrt", "rcp", "ex2", "popc", "clz", "fma")
# Modifiers between an instruction's name and its type, where there may be some.
HOW = {"add": [[], ["rn"]], "fma": [["rn"], ["rm"]], "div": [[], ["rn"]], "sqrt": [["rn"]], "rcp": [["rn"], ["approx", "ftz"]], "ex2": [["approx", "ftz"]]}


class Instructions(Operands):
    """Those of one function. do_NAME(code, x): code is the instruction's name and modifiers, x its operands."""

    def instruction(self, code: list[str], x: list[str]) -> str:
        """C++ of one instruction; code: its name and modifiers, x: operands."""
        op, kind = code[0], code[-1]
        if op in ("ld", "st"):
            return self.memory(code, x)
        handler = getattr(self, f"do_{op}", None)
        if handler:
            return handler(code, x)
        if kind not in C:
            raise Unknown("type")
        v = [self.value(operand, kind) for operand in x[1:]]
        how = code[1:-1]
        if how not in HOW.get(op, [[]]):
            raise Unknown("modifier")
        if op in INFIX:
            return self.assign(x[0], kind, f"({C[kind]})({v[0]} {INFIX[op]} {v[1]})")
        if op == "not":
            return self.assign(x[0], kind, f"!{v[0]}" if kind == "pred" else f"({C[kind]})~{v[0]}")
        if op == "add":
            return self.assign(x[0], kind, f"{v[0]} + {v[1]}" if kind[0] == "f" else f"ptx::add<{C[kind]}>({v[0]}, {v[1]})")
        if op in CALLS:
            name = "_".join([op, *(part for part in how if part in ("rm", "approx"))])
            return self.assign(x[0], "u32" if op in ("popc", "clz") else kind, f"ptx::{name}({', '.join(v)})")
        raise Unknown("instruction")

    def memory(self, code: list[str], x: list[str]) -> str:
        """Loads and stores, of one number or a vector."""
        op, kind = code[0], code[-1]
        space = next((part for part in code if part in SPACES), "generic")
        if set(code[1:-1]) - {*SPACES, "v2", "v4", "nc", "volatile"}:
            raise Unknown("modifier")
        count = next((int(part[1]) for part in code if part in ("v2", "v4")), 1)
        place, data = (x[1], x[0]) if op == "ld" else (x[0], x[1])
        at = self.address(place, space)
        names = split(data.strip("{}")) if count > 1 else [data]
        call = f"ptx::{space}::{op}<{C[kind]}, {count}>({at}"
        if op == "ld" and count == 1:
            return self.assign(names[0], kind, f"{call})[0]")
        if op == "ld":
            return f"{{ auto got = {call}); " + " ".join(self.assign(name, kind, f"got[{i}]") for i, name in enumerate(names)) + " }"
        return f"{call}, {{{', '.join(self.value(name, kind) for name in names)}}});"

    def do_mov(self, code: list[str], x: list[str]) -> str:
        kind = code[-1]
        if x[0].startswith("{") or x[1].startswith("{"):
            parts = split((x[0] if x[0].startswith("{") else x[1]).strip("{}"))
            half = f"b{width(kind) // len(parts)}"
            if x[1].startswith("{"):
                whole = " | ".join(f"({C[kind]}){self.value(part, half)} << {i * width(half)}" for i, part in enumerate(parts))
                return self.assign(x[0], kind, f"({C[kind]})({whole})")
            value = self.value(x[1], kind)
            return "{ auto got = " + value + "; " + " ".join(
                self.assign(part, half, f"({C[half]})(got >> {i * width(half)})") for i, part in enumerate(parts)) + " }"
        return self.assign(x[0], kind, self.value(x[1], kind))

    def do_cvta(self, code: list[str], x: list[str]) -> str:
        space = next(part for part in code if part in SPACES)
        value = self.value(x[1], "b64")
        if space == "shared":
            return self.assign(x[0], "b64", f"ptx::{'to_shared' if 'to' in code else 'from_shared'}({value})")
        return self.assign(x[0], "b64", value)

    def do_cvt(self, code: list[str], x: list[str]) -> str:
        to, of = code[-2], code[-1]
        how = set(code[1:-2])
        if to in ("f16x2", "bf16x2"):
            return self.assign(x[0], "b32", f"ptx::pack_{to}({self.value(x[1], 'f32')}, {self.value(x[2], 'f32')})")
        value = self.value(x[1], "b16" if of == "f16" else of)
        if to == "f16" and of == "f32" and how == {"rn"}:
            return self.assign(x[0], "b16", f"ptx::to_half({value})")
        if to == "f32" and of == "f16" and not how:
            return self.assign(x[0], "f32", f"ptx::from_half({value})")
        if of[0] == "f" and to[0] != "f" and len(how) == 1:
            return self.assign(x[0], to, f"ptx::to_integer<{C[to]}>(ptx::round_{how.pop()}({value}))")
        if of == to == "f32" and how == {"sat"}:
            return self.assign(x[0], to, f"ptx::saturate({value})")
        if of == to and how <= {"rni", "rpi", "rzi", "rmi"} and how:
            return self.assign(x[0], to, f"ptx::round_{how.pop()}({value})")
        if (of[0] == "f" or to[0] == "f") and how <= {"rn"}:
            return self.assign(x[0], to, f"({C[to]}){value}")
        if of[0] != "f" and to[0] != "f" and not how:
            return self.assign(x[0], to, f"({C[to]}){value}")
        raise Unknown("conversion")

    def do_setp(self, code: list[str], x: list[str]) -> str:
        compare, kind = code[1], code[-1]
        a, b = self.value(x[1], kind), self.value(x[2], kind)
        if len(code) != 3:
            raise Unknown("modifier")
        if kind[0] == "f" and len(compare) == 3:         # true where one is NaN, too
            inverse = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}[compare]
            ordered = f"!({a} {inverse} {b})"
            return self.assign(x[0], "pred", ordered if compare not in ("equ", "neu") else f"(ptx::unordered({a}, {b}) || {ordered})")
        if kind[0] == "f" and compare == "ne":
            return self.assign(x[0], "pred", f"({a} < {b} || {a} > {b})")
        if kind[0] == "b" and compare not in ("eq", "ne"):
            raise Unknown("comparison")
        return self.assign(x[0], "pred", f"({a} {COMPARE[compare]} {b})")

    def do_selp(self, code: list[str], x: list[str]) -> str:
        kind = code[-1]
        return self.assign(x[0], kind, f"{self.value(x[3], 'pred')} ? {self.value(x[1], kind)} : {self.value(x[2], kind)}")

    def do_shl(self, code: list[str], x: list[str]) -> str:
        kind = code[-1]
        return self.assign(x[0], kind, f"ptx::{code[0]}<{C[kind]}>({self.value(x[1], kind)}, {self.value(x[2], 'b32')})")

    do_shr = do_shl

    def do_mul(self, code: list[str], x: list[str]) -> str:
        kind = code[-1]
        if code[1:-1] not in ([], ["rn"], ["lo"], ["hi"], ["wide"]):
            raise Unknown("modifier")
        a, b = self.value(x[1], kind), self.value(x[2], kind)
        if "wide" in code:
            wide = f"{kind[0]}{2 * width(kind)}"
            return self.assign(x[0], wide, f"({C[wide]})(({C[wide]}){a} * ({C[wide]}){b})")
        if "hi" in code:
            return self.assign(x[0], kind, f"ptx::mul_hi({a}, {b})")
        if kind[0] == "f":
            return self.assign(x[0], kind, f"{a} * {b}")
        return self.assign(x[0], kind, f"ptx::mul<{C[kind]}>({a}, {b})")

    def do_mad(self, code: list[str], x: list[str]) -> str:
        kind = code[-1]
        a, b = self.value(x[1], kind), self.value(x[2], kind)
        if "wide" in code:
            wide = f"{kind[0]}{2 * width(kind)}"
            return self.assign(x[0], wide, f"ptx::add<{C[wide]}>(({C[wide]}){a} * ({C[wide]}){b}, {self.value(x[3], wide)})")
        if "lo" not in code:
            raise Unknown("modifier")
        return self.assign(x[0], kind, f"ptx::add<{C[kind]}>(ptx::mul<{C[kind]}>({a}, {b}), {self.value(x[3], kind)})")

    def do_sub(self, code: list[str], x: list[str]) -> str:
        kind = code[-1]
        if code[1:-1] not in ([], ["rn"]):
            raise Unknown("modifier")
        if kind == "f16x2":
            return self.assign(x[0], "b32", f"ptx::sub_f16x2({self.value(x[1], 'b32')}, {self.value(x[2], 'b32')})")
        a, b = self.value(x[1], kind), self.value(x[2], kind)
        return self.assign(x[0], kind, f"{a} - {b}" if kind[0] == "f" else f"ptx::sub<{C[kind]}>({a}, {b})")

    def do_prmt(self, code: list[str], x: list[str]) -> str:
        if code[1:] != ["b32"]:
            raise Unknown("mode")
        return self.assign(x[0], "b32", f"ptx::prmt({', '.join(self.value(v, 'b32') for v in x[1:])})")

    def do_bfi(self, code: list[str], x: list[str]) -> str:
        kind = code[-1]
        a, b = self.value(x[1], kind), self.value(x[2], kind)
        return self.assign(x[0], kind, f"ptx::bfi({a}, {b}, {self.value(x[3], 'b32')}, {self.value(x[4], 'b32')})")

    def do_shf(self, code: list[str], x: list[str]) -> str:
        if code[1:] != ["l", "wrap", "b32"]:
            raise Unknown("funnel shift")
        return self.assign(x[0], "b32", f"ptx::shf_l({', '.join(self.value(v, 'b32') for v in x[1:])})")

    def do_bra(self, code: list[str], x: list[str]) -> str:
        return f"goto {identifier(x[0])};"

    def do_ret(self, code: list[str], x: list[str]) -> str:
        return "return;"

    def do_call(self, code: list[str], x: list[str]) -> str:
        name, given = x[-2:] if x[-1].startswith("(") else (x[0], "()")
        if len(x) > 2:
            raise Unknown("a call with a result")
        args = ", ".join(split(given.strip("()"))) or "nullptr"
        return f"{{ void *args[] = {{{args}}}; {self.module.function(name)}(args); }}"

    def do_bar(self, code: list[str], x: list[str]) -> str:
        if code[1:] == ["sync"] and x == ["0"]:
            return "ptx::block_barrier();"
        if code[1:] == ["warp", "sync"]:
            return f"ptx::warp_barrier({self.value(x[0], 'b32')});"
        raise Unknown("barrier")

    def do_shfl(self, code: list[str], x: list[str]) -> str:
        target, _, inside = x[0].partition("|")
        values = ", ".join(self.value(v, "b32") for v in x[1:])
        return f"{{ auto got = ptx::shuffle_{code[2]}({values}); {self.assign(target, 'b32', 'got.value')} " + (
            self.assign(inside, "pred", "got.inside") if inside else "") + " }"

    def do_vote(self, code: list[str], x: list[str]) -> str:
        votes = f"simt::ballot({self.value(x[2], 'b32')}, {self.value(x[1], 'pred')})"
        if code[2] == "ballot":
            return self.assign(x[0], "b32", votes)
        if code[2] == "all":
            return self.assign(x[0], "pred", f"{votes} == {self.value(x[2], 'b32')}")
        if code[2] == "any":
            return self.assign(x[0], "pred", f"{votes} != 0")
        raise Unknown("vote")

    def do_redux(self, code: list[str], x: list[str]) -> str:
        kind = code[-1]
        return self.assign(x[0], kind, f"ptx::redux_{code[2]}<{C[kind]}>({self.value(x[1], kind)}, {self.value(x[2], 'b32')})")

    def do_atom(self, code: list[str], x: list[str]) -> str:
        space = next((part for part in code if part in SPACES), "generic")
        op, kind = code[-2], code[-1]
        return self.assign(x[0], kind, f"ptx::{space}::atom_{op}<{C[kind]}>({self.address(x[1], space)}, {self.value(x[2], kind)})")

    def do_red(self, code: list[str], x: list[str]) -> str:
        return self.do_atom(code, ["_", *x])

    def do_membar(self, code: list[str], x: list[str]) -> str:
        if code[-1] not in ("gl", "sys", "gpu"):
            raise Unknown("a fence for less than the device")
        return "ptx::fence();"

    do_fence = do_membar

    def do_mma(self, code: list[str], x: list[str]) -> str:
        if code[1:6] != ["sync", "aligned", "m16n8k16", "row", "col"] or code[6] != "f32" or code[9] != "f32" or code[7] != code[8]:
            raise Unknown("shape")
        d, a, b, c = (split(part.strip("{}")) for part in x)
        sums, left, right = (", ".join(self.value(v, kind) for v in part) for part, kind in ((c, "f32"), (a, "b32"), (b, "b32")))
        return (f"{{ float d[] = {{{sums}}}; const uint32_t a[] = {{{left}}}, b[] = {{{right}}}; simt::mma_m16n8k16(d, a, b, ptx::from_{code[7]}); "
                + " ".join(self.assign(name, "f32", f"d[{i}]") for i, name in enumerate(d)) + " }")

    def do_cp(self, code: list[str], x: list[str]) -> str:
        if code[1:] == ["async", "commit_group"]:
            return "ptx::commit_copies();"
        if code[1:] == ["async", "wait_group"]:
            return f"ptx::wait_copies({int(x[0])});"
        if code[1:] == ["async", "cg", "shared", "global"] and x[2] == "16":
            return f"ptx::copy_async({self.address(x[0], 'shared')}, {self.address(x[1], 'global')});"
        raise Unknown("copy")

    def do_prefetch(self, code: list[str], x: list[str]) -> str:
        return f"ptx::prefetch({self.address(x[0], 'global')});"

    def do_griddepcontrol(self, code: list[str], x: list[str]) -> str:
        return "ptx::wait_for_the_kernel_before();" if code[1] == "wait" else "ptx::let_the_next_begin();"
