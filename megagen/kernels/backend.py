"""Which kernel backends this process has, and which of them serves given tensors."""

from __future__ import annotations

import importlib
import platform
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

BUILD_COMMAND = "MEGAGEN_BUILD_CPU=1 pip install --no-build-isolation --no-deps -e ."
_SERIAL_BELOW = 1 << 15
"""Elements below which starting threads costs more than the work."""


@dataclass(frozen=True)
class Backend:
    """One backend: whether it is there, what it serves or why it is missing, and what to do."""

    available: bool
    detail: str
    remedy: str = ""


@lru_cache(maxsize=1)
def load_cpu() -> tuple[ModuleType | None, str]:
    """The extension ``megagen._cpu`` and, where it is missing, the reason."""
    try:
        return importlib.import_module("megagen._cpu"), ""
    except ImportError as error:
        return None, str(error)


def status() -> dict[str, Backend]:
    """The backends by name, best first for the tensors they serve."""
    module, reason = load_cpu()
    if module is None:
        cpu = Backend(False, f"the extension cannot be loaded ({reason})", BUILD_COMMAND)
    else:
        cpu = Backend(True, f"fp32 on the CPU, {module.isa()} on {platform.machine()}")
    return {
        "cpu": cpu,
        "reference": Backend(True, "plain torch, any device and type; used where no other serves"),
    }


def serves_cpu(*tensors: Tensor | None) -> bool:
    """True where the CPU extension is there and every tensor is fp32 on the CPU."""
    if load_cpu()[0] is None:
        return False
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors)


def cpu() -> ModuleType:
    """The extension; call only where ``serves_cpu``."""
    module, reason = load_cpu()
    assert module is not None, reason
    return module


def num_threads(elements: int) -> int:
    """Threads for an operation over so many numbers: torch's own setting, one where it is small."""
    return torch.get_num_threads() if elements >= _SERIAL_BELOW else 1


def address(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def math_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: what references compute in."""
    return torch.promote_types(tensor.dtype, torch.float32)
