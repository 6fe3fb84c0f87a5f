#!/usr/bin/env python3
"""Writes what nvcc has made of a kernel file (PTX) as C++ that runs on the host, over host/ptx.h.

    host/ptx.py KERNELS.ptx > KERNELS.ptx.h

One function per kernel, one statement per instruction, a variable per register. Instructions on values alone become
calls of a function of their name (`add.rn.f32` is `add_rn_f32`), so that one that host/ptx.h does not know is an error
of the compiler. Those that touch memory, other threads or units beside them are written out here; their operands are in
the order of the PTX manual, and forms of them that are not listed are refused.

The registers of the sums and operands of a warpgroup's product become arrays: only so can host/ptx.h see that one is
touched before the product was waited for.
"""

import re
import sys
from pathlib import Path

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
         "b64": 8, "u64": 8, "s64": 8, "f64": 8}
TYPES = {"pred": "bool", "b16": "u16", "b32": "u32", "f32": "u32", "b64": "u64", "f64": "u64"}
SPECIAL = {f"%{name}.{axis}": f"{cuda}.{axis}" for name, cuda in
           [("tid", "threadIdx"), ("ctaid", "blockIdx"), ("ntid", "blockDim"), ("nctaid", "gridDim")] for axis in "xyz"}
BULK_COPY = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16")


def refuse(line: int, text: str, why: str) -> None:
    sys.exit(f"ptx.py: line {line}: {why}: {text}")


def statements(text: str):
    """(line, statement) for every instruction, directive, label and brace of the function that `text` begins with."""
    line, begun, parts, depth = 1, 1, "", 0
    for at, char in enumerate(text):
        line += char == "\n"
        if not parts.strip():
            begun = line
        # A brace alone opens a scope; one behind an opcode or a comma is a list of registers.
        if char in "{}" and not parts.strip():
            yield begun, char
            depth += 1 if char == "{" else -1
            if depth == 0:
                return
            parts = ""
        elif char == ";":
            yield begun, " ".join(parts.split())
            parts = ""
        elif char == ":" and re.fullmatch(r"\$?\w+", parts.strip()) and text[at + 1] != ":":
            yield begun, parts.strip() + ":"
            parts = ""
        else:
            parts += char


def operands(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    found, depth, part = [], 0, ""
    for char in text:
        depth += char in "{["
        depth -= char in "}]"
        if char == "," and depth == 0:
            found.append(part.strip())
            part = ""
        else:
            part += char
    return [*found, part.strip()] if part.strip() else found


class Kernel:
    def __init__(self, name: str, header: str, constants: set[str], dynamic: set[str]):
        self.name, self.constants, self.dynamic = name, constants, dynamic
        self.parameters = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w+\s+(\w+)(?:\[\d+\])?", header)
        self.registers: dict[str, str] = {} # declared name -> type
        self.scopes: list[dict[str, str]] = []
        self.num_scopes = 0
        self.statics: dict[str, int] = {}
        self.static_bytes = 0
        self.arrays: dict[str, tuple[str, int]] = {} # register -> its array and place there
        self.lines: list[str] = []

    # What an operand is as an expression.
    def value(self, text: str) -> str:
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text in self.arrays:
            array, place = self.arrays[text]
            return f"{array}[{place}]"
        if text in SPECIAL:
            return SPECIAL[text]
        if text.startswith("%"):
            return "r_" + text[1:]
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return f"0x{text[2:]}u"
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return f"0x{text[2:]}ull"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            return f"u64({text.rstrip('U')}ll)" if abs(int(text.rstrip("U"), 0)) < 1 << 63 else f"{text.rstrip('U')}ull"
        if text in self.parameters:
            return f"u64(parameters[{self.parameters.index(text)}])"
        if text in self.statics:
            return f"u64(ptx::STATIC + {self.statics[text]}u)"
        if text in self.dynamic:
            return "u64(ptx::DYNAMIC)"
        if text in self.constants:
            return f"u64(C_{text})"
        raise KeyError(text)

    def address(self, text: str) -> str:
        match = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        base = self.value(match.group(1))
        return f"{base} + {match.group(2)}" if match.group(2) and match.group(2) != "0" else base

    def vector(self, text: str) -> list[str]:
        return operands(text[1:-1]) if text.startswith("{") else [text]

    def declare(self, line: int, text: str) -> None:
        if match := re.fullmatch(r"\.reg \.(\w+) (%\w+)<(\d+)>", text):
            kind, prefix, count = match.groups()
            self.registers |= {f"{prefix}{i}": kind for i in range(int(count))}
        elif match := re.fullmatch(r"\.reg \.(\w+) (%?\w+)", text):
            self.num_scopes += 1
            name = f"s{self.num_scopes}_{match.group(2).lstrip('%')}"
            self.scopes[-1][match.group(2)] = name
            self.registers[name] = match.group(1)
        elif match := re.fullmatch(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d+)\])?", text):
            align, kind, name, count = match.groups()
            self.static_bytes = -(-self.static_bytes // int(align)) * int(align)
            self.statics[name] = self.static_bytes
            self.static_bytes += SIZES[kind] * int(count or 1)
        elif not text.startswith((".pragma", ".loc")):
            refuse(line, text, "a directive that is not known")

    # Registers of products that are on their way, as arrays; the same list of registers is the same array.
    def gather(self, body: list[tuple[int, str]]) -> None:
        lists: dict[str, str] = {}
        for line, text in body:
            if not WGMMA.match(text):
                continue
            for vector in [part for part in operands(text.split(" ", 1)[1])[:2] if part.startswith("{")]:
                names = self.vector(vector)
                if vector in lists:
                    continue
                lists[vector] = f"a_{len(lists)}"
                self.lines.append(f"alignas(16) u32 a_{len(lists) - 1}[{len(names)}];")
                for place, name in enumerate(names):
                    if name in self.arrays:
                        refuse(line, name, "a register is in two lists of products")
                    self.arrays[name] = (lists[vector], place)

    def array(self, line: int, text: str) -> str:
        names = self.vector(text)
        found = [self.arrays.get(name) for name in names]
        if None in found or [place for _, place in found] != list(range(len(names))) or len({a for a, _ in found}) > 1:
            refuse(line, text, "registers that are no list of a product")
        return found[0][0]

    def instruction(self, line: int, text: str) -> str:
        opcode, _, rest = text.partition(" ")
        args = operands(rest)
        v, parts = self.value, opcode.split(".")
        base, kind = parts[0], parts[-1]
        match base:
            case "bra":
                return f"goto {self.label(args[0])};"
            case "ret":
                return "return;"
            case "ld" | "st":
                space = next((part for part in parts[1:] if part in ("global", "shared", "param", "const")), "generic")
                count = next((int(part[1]) for part in parts if part in ("v2", "v4")), 1)
                known = {base, space, kind, f"v{count}", "L1::no_allocate"}
                if set(parts) - known:
                    refuse(line, text, "a form of access that is not known")
                names, place = (args[0], args[1]) if base == "ld" else (args[1], args[0])
                values = [v(name) for name in self.vector(names)]
                number = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}[SIZES[kind]]
                if base == "ld":
                    number = number if kind != "s8" else "ptx::s8"
                    loaded = f"const auto x = ptx::ld_{space}<{number}, {count}>({self.address(place)}, {line});"
                    return "{ " + loaded + " " + " ".join(f"{name} = x.of[{i}];" for i, name in enumerate(values)) + " }"
                stored = ", ".join(f"{number}({value})" for value in values)
                return f"ptx::st_{space}<{number}, {count}>({self.address(place)}, {{{{{stored}}}}}, {line});"
            case "atom":
                if opcode != "atom.shared.add.u32":
                    refuse(line, text, "an atomic operation that is not known")
                return f"{v(args[0])} = ptx::atom_shared_add({self.address(args[1])}, u32({v(args[2])}), {line});"
            case "mov" if args[1].startswith("{"):
                low, high = self.vector(args[1])
                width = 8 * SIZES[kind] // 2
                return f"{v(args[0])} = u{2 * width}({v(low)}) | u{2 * width}({v(high)}) << {width};"
            case "mov" if args[0].startswith("{"):
                low, high = self.vector(args[0])
                width = 8 * SIZES[kind] // 2
                return f"{{ const u64 x = {v(args[1])}; {v(low)} = u{width}(x), {v(high)} = u{width}(x >> {width}); }}"
            case "mov":
                return f"{v(args[0])} = {v(args[1])};"
            case "cvta":
                if parts[1] == "to":
                    return f"{v(args[0])} = ptx::from_generic_{parts[2]}({v(args[1])});"
                return f"{v(args[0])} = ptx::to_generic_{parts[1]}({v(args[1])});"
            case "shfl":
                if parts[1] != "sync" or parts[2] not in ("bfly", "up", "idx", "down"):
                    refuse(line, text, "a shuffle that is not known")
                to, was_in_range = args[0].split("|")
                values = ", ".join(f"u32({v(arg)})" for arg in args[1:])
                return f"{v(to)} = ptx::shfl_{parts[2]}({values}, {v(was_in_range)}, {line});"
            case "vote":
                if opcode != "vote.sync.ballot.b32":
                    refuse(line, text, "a vote that is not known")
                return f"{v(args[0])} = ptx::ballot({v(args[1])}, u32({v(args[2])}), {line});"
            case "bar":
                if opcode == "bar.warp.sync":
                    return f"ptx::warp_barrier(u32({v(args[0])}), {line});"
                if opcode != "bar.sync" or args != ["0"]:
                    refuse(line, text, "a barrier that is not known")
                return f"ptx::block_barrier({line});"
            case "mma":
                shapes = {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "mma_bf16",
                          "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": "mma_s8"}
                if opcode not in shapes:
                    refuse(line, text, "a product that is not known")
                d, a, b, c = [[v(name) for name in self.vector(arg)] for arg in args]
                fill = f"u32 c[4] = {{{', '.join(c)}}}; const u32 a[4] = {{{', '.join(a)}}};"
                take = " ".join(f"{name} = c[{i}];" for i, name in enumerate(d))
                return f"{{ {fill} ptx::{shapes[opcode]}(c, a, {b[0]}, {b[1]}, {line}); {take} }}"
            case "ldmatrix":
                is_transposed = {"ldmatrix.sync.aligned.m8n8.x4.shared.b16": "false",
                                 "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": "true"}.get(opcode)
                if not is_transposed:
                    refuse(line, text, "a form of ldmatrix that is not known")
                take = " ".join(f"{v(name)} = x[{i}];" for i, name in enumerate(self.vector(args[0])))
                return f"{{ u32 x[4]; ptx::ldmatrix<{is_transposed}>(x, {self.address(args[1])}, {line}); {take} }}"
            case "cp":
                if opcode == "cp.async.cg.shared.global" and args[2] == "16":
                    return f"ptx::copy_async({self.address(args[0])}, {self.address(args[1])}, u32({v(args[3])}), {line});"
                if opcode == "cp.async.commit_group":
                    return "copy_commit();"
                if opcode == "cp.async.wait_group":
                    return f"ptx::copy_wait<{args[0]}>({line});"
                if opcode != BULK_COPY:
                    refuse(line, text, "an asynchronous copy that is not known")
                tensor_map, place = operands(args[1][1:-1])
                place = ", ".join(f"u32({v(name)})" for name in self.vector(place))
                return f"ptx::copy_box({self.address(args[0])}, {v(tensor_map)}, {{{place}}}, {self.address(args[2])});"
            case "mbarrier":
                match opcode:
                    case "mbarrier.init.shared::cta.b64":
                        return f"ptx::barrier_init({self.address(args[0])}, u32({v(args[1])}));"
                    case "mbarrier.arrive.shared::cta.b64" if args[0] == "_":
                        return f"ptx::barrier_arrive({self.address(args[1])});"
                    case "mbarrier.arrive.expect_tx.shared::cta.b64" if args[0] == "_":
                        return f"ptx::barrier_expect({self.address(args[1])}, u32({v(args[2])}));"
                    case "mbarrier.try_wait.parity.shared::cta.b64":
                        return f"{v(args[0])} = ptx::barrier_wait({self.address(args[1])}, u32({v(args[2])}), {line});"
                refuse(line, text, "an operation on barriers that is not known")
            case "fence":
                if opcode == "fence.proxy.async.shared::cta":
                    return "ptx::fence_async();"
                if opcode != "fence.mbarrier_init.release.cluster":
                    refuse(line, text, "a fence that is not known")
                return ""
            case "setmaxnreg":
                return ""
            case "griddepcontrol":
                return "begin_launch();" if parts[1] == "wait" else ""
            case "wgmma":
                return self.wgmma(line, opcode, args)
            case _:
                values = ", ".join(v(arg) for arg in args[1:])
                return f"{v(args[0])} = ptx::{opcode.replace('.', '_')}({values});"

    def wgmma(self, line: int, opcode: str, args: list[str]) -> str:
        match opcode:
            case "wgmma.fence.sync.aligned":
                return f"fibres::wgmma_fence({line});"
            case "wgmma.commit_group.sync.aligned":
                return f"fibres::wgmma_commit({line});"
            case "wgmma.wait_group.sync.aligned":
                return f"fibres::wgmma_wait({args[0]}, {line});"
        columns = WGMMA.fullmatch(opcode)
        is_in_registers = args[1].startswith("{")
        # d, a, b, whether it adds, signs of a and b, then whether b, and a if it is in memory, are transposed.
        scale_d, signs, transposed = args[3], args[4:6], args[6:]
        is_known = columns and signs == ["1", "1"] and len(transposed) == (1 if is_in_registers else 2)
        if not is_known or (not is_in_registers and transposed[0] != "0"):
            refuse(line, opcode, "a product of a warpgroup that is not known")
        a = (self.array(line, args[1]) + ", 0") if is_in_registers else f"nullptr, {self.value(args[1])}"
        is_transposed = "true" if transposed[-1] == "1" else "false"
        d = f"reinterpret_cast<float*>({self.array(line, args[0])})"
        return f"fibres::wgmma({d}, {columns.group(1)}, {a}, {self.value(args[2])}, {is_transposed}, {self.value(scale_d)}, {line});"

    def label(self, name: str) -> str:
        return "L_" + re.sub(r"\W", "_", name)

    def translate(self, body: list[tuple[int, str]]) -> str:
        self.gather(body)
        code = []
        for line, text in body:
            if text == "{":
                self.scopes.append({})
            elif text == "}":
                self.scopes.pop()
            elif text.startswith("."):
                self.declare(line, text)
            elif text.endswith(":"):
                code.append(f"{self.label(text[:-1])}:;")
            else:
                guard = ""
                if match := re.match(r"@(!?)(%?\w+) (.*)", text):
                    guard, text = f"if ({match.group(1)}{self.value(match.group(2))}) ", match.group(3)
                try:
                    code.append(guard + self.instruction(line, text))
                except (KeyError, ValueError, IndexError, AttributeError) as error:
                    refuse(line, text, f"an instruction that is not understood ({error!r})")
        used = set(re.findall(r"\b(?:r_\w+|s\d+_\w+)\b", " ".join(code)))
        names = {(name if re.match(r"s\d+_", name) else "r_" + name[1:]): kind for name, kind in self.registers.items()}
        declared = [f"{TYPES[kind]} {name} = {TYPES[kind]}(0xfffffffffffffff0ull);" for name, kind in names.items()
                    if name in used]
        begin = f'ptx::begin("{self.name}", {self.static_bytes});'
        inside = "\n".join([*declared, *self.lines, begin, *code])
        return f"inline void run_{self.name}(const unsigned char* const* parameters) {{\n{inside}\n}}\n"


def main() -> None:
    text = re.sub(r"//[^\n]*", "", Path(sys.argv[1]).read_text())
    constants = dict(re.findall(r"\.const \.align 8 \.b8 (\w+)\[\d+\] = \{([^}]*)\};", text))
    dynamic = set(re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", text))
    out = ["// Made by host/ptx.py.", '#include "ptx.h"', ""]
    out += [f"alignas(8) static const unsigned char C_{name}[] = {{{values}}};" for name, values in constants.items()]
    names = []
    for match in re.finditer(r"\.visible \.entry (\w+)\((.*?)\)", text, re.DOTALL):
        name, header = match.groups()
        begin = text.index("{", match.end())
        first = text.count("\n", 0, begin)
        kernel = Kernel(name, header, set(constants), dynamic)
        out.append(kernel.translate([(line + first, statement) for line, statement in statements(text[begin:])]))
        names.append(name)
    if len(names) != text.count(".entry "):
        sys.exit(f"ptx.py: {sys.argv[1]} has {text.count('.entry ')} kernels, {len(names)} of them are understood")
    out += [f"COMPILED_KERNEL({name})" for name in names]
    print("\n".join(out))


main()
