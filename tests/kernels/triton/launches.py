"""What launchers launch: kernels with the very arguments, noted down instead of run.

A launcher is called with tensors on ``meta``; triton's own binder then tells which numbers are
constants and what divides by 16, and the kernel is compiled for a GPU that is not here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import megagen.kernels.triton
from tests.kernels.triton.compiled import Counts, count


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Launch:
    """A kernel with what it was launched with, options included."""

    kernel: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def bound(self, target: int) -> tuple[Any, Any, Any]:
        """Arguments by name, what each is taken for, and options, as triton finds them."""
        backend = make_backend(GPUTarget("cuda", target, 32))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        found: tuple[Any, Any, Any] = bind(*self.arguments, **self.options())
        return found

    def options(self) -> dict[str, Any]:
        return {"debug": False, **self.named}

    def is_like(self, other: Launch) -> bool:
        """Whether both come to the same machine code."""
        return self.kernel is other.kernel and self.bound(90)[1:] == other.bound(90)[1:]

    def compile(self, target: int) -> Counts:
        """The counts on sm_``target``; raises ``AssertionError`` where ``Counts.check`` does."""
        gpu = GPUTarget("cuda", target, 32)
        backend = make_backend(gpu)
        packed = self.kernel._pack_args(backend, self.options(), *self.bound(target))
        options, *source = packed
        compiled = build(ASTSource(self.kernel, *source), target=gpu, options=vars(options))
        return count(compiled.asm["cubin"], compiled.metadata.shared, target).check()


def launches(function: Callable[[], object]) -> list[Launch]:
    """What a call would launch, in order."""
    noted: list[Launch] = []

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        noted.append(Launch(kernel, arguments, named))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        function()
    assert noted, "nothing was launched"
    return noted


def table(
    calls: dict[str, Callable[[], object]], known: Iterable[Launch] = ()
) -> dict[str, Launch]:
    """Launches by the name of their call and their kernel's; none that is like another one.

    Args:
        calls: of launchers.
        known: launches to leave out.
    """
    found: dict[str, Launch] = {}
    for name, call in calls.items():
        for launch in launches(call):
            if any(map(launch.is_like, (*found.values(), *known))):
                continue
            key = f"{name}-{launch.kernel.__name__}"
            again = sum(other.startswith(key) for other in found)
            found[f"{key}-{again}" if again else key] = launch
    return found


def every_kernel() -> set[Any]:
    """Functions of ``megagen.kernels.triton`` under ``triton.jit`` that no other one calls."""
    package = megagen.kernels.triton
    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    ]
    functions = {x for m in modules for x in vars(m).values() if isinstance(x, JITFunction)}
    called = [f.fn.__globals__.get(name) for f in functions for name in f.fn.__code__.co_names]
    return functions - {x for x in called if isinstance(x, JITFunction)}
