"""Triton kernels compiled to machine code without a GPU, and what that code needs.

Write ``tests/kernels/triton/compiled_<name>.py``, a pytest file whose tests compile kernels (as
their launchers launch them, see ``launches``) and assert on the counts; ``test_compiled.py`` finds
it and runs it in a process without TRITON_INTERPRET, on the installed triton and on the oldest
supported one. The disassemblers lie in triton's own wheel. A kernel takes 0.3 to 1 s.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program can have, by architecture."""

ARCHITECTURES = tuple(MAX_SHARED)
IS_OLDEST = "triton-oldest" in os.environ.get("PYTHONPATH", "")
"""Whether this process compiles with the oldest triton, as ``test_compiled`` makes it."""

ONE_SIZE = "the oldest triton compiles every kernel in one size for each architecture"


@dataclass(frozen=True)
class Counts:
    """What a compiled kernel needs.

    Attributes:
        target: 80, 90 or 100.
        registers: of a thread.
        stack: bytes of a thread; > 0 where registers were spilled.
        shared: bytes of shared memory of a program.
        ldl, stl: local loads and stores, which are spills too.
        hgmma, utmaldg, ldgsts: wgmma, bulk tensor loads and asynchronous copies in the code.
        hmma: matrix instructions of sm_80.
        wide_loads, loads: global loads of 16 bytes, and all.
        wide_stores, stores: the same for stores.
    """

    target: int
    registers: int
    stack: int
    shared: int
    ldl: int
    stl: int
    hgmma: int
    utmaldg: int
    ldgsts: int
    hmma: int
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int

    def check(self) -> Counts:
        """Itself; raises ``AssertionError`` where it spills or does not fit a program."""
        assert (self.stack, self.ldl, self.stl) == (0, 0, 0), f"spills: {self}"
        assert self.shared <= MAX_SHARED[self.target], f"shared memory: {self}"
        return self


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    target: int = 90,
    options: Mapping[str, Any] | None = None,
    divisibility: Iterable[str] = (),
) -> Counts:
    """Compile a ``triton.jit`` function and count.

    Args:
        fn: the function.
        signature: argument name to type, as ``"*bf16"``, ``"i32"``, ``"fp32"`` or
            ``"tensordesc<bf16[64,128]>"``.
        constexprs: values of the ``tl.constexpr`` arguments; None for an argument that is None.
        target: 80, 90 or 100.
        options: ``num_warps``, ``num_stages`` and so on.
        divisibility: integers that divide by 16, as the launcher would find out; pointers do.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = dict(constexprs or {})
    types = {**dict(signature), **dict.fromkeys(constexprs, "constexpr")}
    unknown = types.keys() ^ set(fn.arg_names)
    assert not unknown, f"arguments without a type or of another kernel: {sorted(unknown)}"
    ordered = {name: types[name] for name in fn.arg_names}
    aligned = set(divisibility)
    attrs = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(ordered.items())
        if kind.startswith("*") or name in aligned
    }
    source = ASTSource(fn, signature=ordered, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options=dict(options or {})
    )
    return count(compiled.asm["cubin"], compiled.metadata.shared, target)


def count(cubin: bytes, shared: int, target: int) -> Counts:
    """The counts of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-ndf", "-c", file.name)  # data flow takes as long again
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage

    def number(pattern: str) -> int:
        return len(re.findall(rf"\s{pattern}", code))

    return Counts(
        target=target,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=shared,
        ldl=number(r"LDL\b"),
        stl=number(r"STL\b"),
        hgmma=number(r"HGMMA\b"),
        utmaldg=number(r"UTMALDG\b"),
        ldgsts=number(r"LDGSTS\b"),
        hmma=number(r"HMMA\b"),
        wide_loads=number(r"LDG\S*\.128\b"),
        loads=number(r"LDG\b"),
        wide_stores=number(r"STG\S*\.128\b"),
        stores=number(r"STG\b"),
    )


def _tool(name: str, *words: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *words], capture_output=True, text=True, check=True).stdout
