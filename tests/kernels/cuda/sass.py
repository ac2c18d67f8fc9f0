"""Registers of wgmma in machine code: what is under way must be left alone until it is waited for.

An accumulator may be neither read nor written between its product and the wait, an operand in
registers not written; and what a product takes must have been written before the last fence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([\w.]+)\s*(.*?)\s*;")
_REGISTER = re.compile(r"(?<!U)\bR(\d+)(\.64)?")
_NO_RESULT = "ST SYNCS BRA RED EXIT R2UR BAR ISETP FSETP PLOP RET CALL VOTEU BSSY BSYNC NOP U"
_ENDS = ("EXIT", "RET")
Groups = tuple[tuple[frozenset[int], frozenset[int]], ...]
"""Accumulators and operands of each group of products, oldest first; the last is not closed."""
_ENOUGH = 8
_OPEN: Groups = ((frozenset(), frozenset()),)


@dataclass(frozen=True)
class Instruction:
    """One line of ``cuobjdump -sass``."""

    address: int
    is_conditional: bool
    op: str
    operands: str

    @cached_property
    def target(self) -> int | None:
        """Where a branch or a call goes."""
        if not self.op.startswith(("BRA", "CALL")):
            return None
        return int(self.operands.split()[-1], 16)

    @cached_property
    def product(self) -> tuple[frozenset[int], frozenset[int]] | None:
        """Accumulators and operand registers of a wgmma."""
        if not self.op.startswith("HGMMA"):
            return None
        columns = int(self.op.split("x")[1])
        d, a = (part.strip() for part in self.operands.split(",")[:2])
        first = int(d[1:])
        operand = range(int(a[1:]), int(a[1:]) + 4) if a.startswith("R") else range(0)
        return frozenset(range(first, first + columns // 2)), frozenset(operand)

    @cached_property
    def touched(self) -> tuple[frozenset[int], frozenset[int]]:
        """Registers written and read."""
        wide = 4 if ".128" in self.op or "32x4" in self.op else 2 if ".64" in self.op else 1
        has_result = not self.op.startswith(tuple(_NO_RESULT.split()))
        written: set[int] = set()
        read: set[int] = set()
        for part in self.operands.split(","):
            for match in _REGISTER.finditer(part):
                first = int(match[1])
                if has_result and not written and "[" not in part:
                    is_pair = "WIDE" in self.op or self.op.startswith(("CS2R", "F2I.U64"))
                    written |= {*range(first, first + max(wide, 2 if is_pair else 1))}
                else:
                    is_data = self.op.startswith(("ST", "RED")) and "[" not in part
                    read |= {*range(first, first + (wide if is_data else 2 if match[2] else 1))}
        return frozenset(written), frozenset(read)


class Kernel:
    """The instructions of a kernel in the orders in which they may run."""

    def __init__(self, lines: list[str]) -> None:
        found = (_LINE.search(line) for line in lines)
        self.code = [Instruction(int(m[1], 16), bool(m[2]), m[3], m[4]) for m in found if m]
        self.place = {instruction.address: i for i, instruction in enumerate(self.code)}

    def following(self, i: int, *, into_calls: bool = False) -> Iterator[int]:
        """Places that may come next."""
        one = self.code[i]
        is_call = one.op.startswith("CALL")
        if one.target is not None and (into_calls or not is_call):
            yield self.place[one.target]
        is_certain = not one.is_conditional and not re.match(r"!?U?P\d", one.operands)
        is_jump = one.op.startswith("BRA") and not one.op.endswith("ANY")
        if not (is_certain and (is_jump or one.op.startswith(_ENDS))) and i + 1 < len(self.code):
            yield i + 1

    def conflicts(self) -> list[str]:
        """The first instructions that touch what products under way use; none is right.

        Letting go of a slot is one: no kernel does it before all its products are done.
        """
        found: set[str] = set()
        states: list[set[Groups]] = [set() for _ in self.code]
        work: list[tuple[int, Groups]] = [(0, _OPEN)]
        while work and len(found) < _ENOUGH:
            i, groups = work.pop()
            if groups in states[i]:
                continue
            states[i].add(groups)
            one = self.code[i]
            busy = frozenset[int]().union(*(d for d, _ in groups))
            operands = frozenset[int]().union(*(a for _, a in groups))
            if one.product is not None:
                if one.product[1] & busy:
                    found.add(f"{one.address:#x} {one.op} {one.operands}: an operand under way")
                d, a = (x | y for x, y in zip(groups[-1], one.product, strict=True))
                groups = (*groups[:-1], (d, a), *(_OPEN if "gsb0" in one.operands else ()))
            elif one.op == "WARPGROUP.DEPBAR.LE":
                kept = int(one.operands.split(",")[1], 16)
                groups = groups[-1 - kept :]
            else:
                written, read = one.touched
                is_letting_go = one.op.startswith("SYNCS.ARRIVE") and bool(busy)
                if (written | read) & busy or written & operands or is_letting_go:
                    found.add(f"{one.address:#x} {one.op} {one.operands}")
            work += [(j, groups) for j in self.following(i)]
        return sorted(found)

    def unfenced(self) -> list[str]:
        """The first products of registers written after the last fence; none is right."""
        found: set[str] = set()
        states: list[frozenset[int] | None] = [None] * len(self.code)
        work: list[tuple[int, frozenset[int]]] = [(0, frozenset())]
        while work and len(found) < _ENOUGH:
            i, recent = work.pop()
            before = states[i]
            if before is not None and recent <= before:
                continue
            recent = states[i] = recent | (before or frozenset())
            one = self.code[i]
            if one.product is not None:
                if recent & (one.product[0] | one.product[1]):
                    found.add(f"{one.address:#x} {one.op} {one.operands}")
            else:
                recent = frozenset() if one.op == "WARPGROUP.ARRIVE" else recent | one.touched[0]
            work += [(j, recent) for j in self.following(i)]
        return sorted(found)

    def registers_after(self, op: str) -> int:
        """How many registers the code that an instruction leads to may name, calls included."""
        work = [i for i, one in enumerate(self.code) if one.op.startswith(op)]
        seen: set[int] = set()
        while work:
            i = work.pop()
            if i not in seen:
                seen.add(i)
                work += self.following(i, into_calls=True)
        named = (m[1] for i in seen for m in _REGISTER.finditer(self.code[i].operands))
        return 1 + max(map(int, named), default=-1)
