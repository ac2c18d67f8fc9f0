"""The backends that serve this machine, and how exact each must be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megagen.kernels.vsa import dispatch


@dataclass(frozen=True)
class Kind:
    """A backend with a type of tensors; ``out`` and ``grad`` are relative L2 errors it may make."""

    backend: str
    device: str
    dtype: torch.dtype
    out: float
    grad: float
    lse: float

    def to(self, *tensors: Tensor) -> list[Tensor]:
        """Copies of this kind; int32 ones keep their type."""
        return [
            x.to(self.device, self.dtype if x.dtype.is_floating_point else x.dtype, copy=True)
            for x in tensors
        ]


EXACT = Kind("reference", "cpu", torch.float64, 1e-12, 1e-12, 1e-12)
ALL = [
    EXACT,
    Kind("reference", "cpu", torch.float32, 1e-5, 1e-5, 1e-5),
    Kind("reference", "cpu", torch.bfloat16, 5e-3, 1e-2, 1e-5),
    Kind("cpu", "cpu", torch.float32, 1e-5, 1e-5, 1e-5),
    Kind("cpu", "cpu", torch.bfloat16, 5e-3, 1e-2, 1e-5),
    Kind("triton", "cuda", torch.bfloat16, 5e-3, 1e-2, 1e-3),
    Kind("cuda", "cuda", torch.bfloat16, 5e-3, 1e-2, 1e-3),
]


def name(kind: Kind) -> str:
    return f"{kind.backend}-{str(kind.dtype).removeprefix('torch.')}"


KINDS = [
    pytest.param(kind, id=name(kind), marks=[pytest.mark.gpu] if kind.device == "cuda" else [])
    for kind in ALL
]


def serve(kind: Kind, head_dim: int) -> None:
    """Skip where the backend cannot serve."""
    like = torch.empty(head_dim, dtype=kind.dtype, device=kind.device)
    reason = dispatch.backend(kind.backend).serves(like)
    if reason is not None:
        pytest.skip(reason)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    difference = found.detach().double().cpu() - expected.detach()
    return float(difference.norm() / expected.detach().norm().clamp(min=1e-30))
