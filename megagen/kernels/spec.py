"""What a test or a benchmark must know of an operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Case = Mapping[str, int]


@dataclass(frozen=True)
class Spec:
    """One operation.

    Args:
        name: its name in ``megagen.kernels``.
        function: the public function; some give several tensors.
        reference: the same in plain torch, any device and type, differentiable by autograd.
        make: ``make(case, generator, dtype) -> keyword arguments`` of both.
        differentiable: names of the arguments that take a gradient.
        cases: sizes to test, odd ones among them.
        bench_case: the sizes that are timed.
        bytes: bytes that one forward must move at least, for a case and an element size.
    """

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[Case, torch.Generator, torch.dtype], dict[str, Any]]
    differentiable: tuple[str, ...]
    cases: tuple[Case, ...]
    bench_case: Case
    bytes: Callable[[Case, int], int]
