"""Which kernel backends this process has, and which of them serves given tensors."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

TRITON_COMMAND = "pip install 'triton>=3.6,<3.8'"
BUILD_COMMAND = "MEGAGEN_BUILD_CPU=1 pip install --no-build-isolation --no-deps -e ."
CUDA_COMMAND = "MEGAGEN_BUILD_CUDA=1 pip install --no-build-isolation --no-deps -e ."
MAX_LINE = 16_384
"""Numbers of a token that a Triton program can hold."""

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


@lru_cache(maxsize=1)
def load_cuda() -> tuple[ModuleType | None, str]:
    """The extension ``megagen._cuda`` and, where it is missing, why: the build's own words."""
    try:
        return importlib.import_module("megagen._cuda"), ""
    except ImportError as error:
        note = Path(__file__).parents[1] / "_cuda_build.txt"
        said = note.read_text().strip() if note.exists() else "built"
        if said != "built":
            return None, f"the extension was not built ({said})"
        return None, f"the extension cannot be loaded ({error})"


# Facts of the process that torch.compile takes for constants; it cannot trace an import.
_HAS_CPU = load_cpu()[0] is not None
_HAS_TRITON = find_spec("triton") is not None
_IS_INTERPRETING = _HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run on the CPU, slowly."""


def status() -> dict[str, Backend]:
    """The backends by name, best first for the tensors they serve."""
    module, reason = load_cpu()
    if module is None:
        cpu = Backend(False, f"the extension cannot be loaded ({reason})", BUILD_COMMAND)
    else:
        cpu = Backend(True, f"fp32 on the CPU, {module.isa()} on {platform.machine()}")
    triton = Backend(False, "triton is not installed", TRITON_COMMAND)
    if _HAS_TRITON:
        triton = Backend(True, "fp32, bf16 and fp16 on CUDA devices")
    return {
        "cuda": _cuda_status(),
        "triton": triton,
        "cpu": cpu,
        "reference": Backend(True, "plain torch, any device and type; used where no other serves"),
    }


def _cuda_status() -> Backend:
    module, reason = load_cuda()
    if module is None:
        return Backend(False, reason, CUDA_COMMAND)
    count, reason = module.devices()
    found = f"none can be used here ({reason})" if count < 0 else f"{count} here"
    return Backend(True, f"video sparse attention in bf16 on Hopper GPUs, {found}")


def serves_cpu(*tensors: Tensor | None) -> bool:
    """True where the CPU extension is there and every tensor is fp32 on the CPU."""
    return _HAS_CPU and all(
        t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors
    )


def serves_triton(*tensors: Tensor | None, line: int = 1) -> bool:
    """True where triton is there and every tensor is fp32, bf16 or fp16 on one CUDA device.

    Args:
        tensors: None is no hindrance.
        line: numbers that a program must hold at once.
    """
    given = [t for t in tensors if t is not None]
    if line > MAX_LINE or any(t.dtype not in _TRITON_DTYPES for t in given):
        return False
    device = given[0].device
    if any(t.device != device for t in given):
        return False
    if given[0].is_cuda:
        return _HAS_TRITON
    return _IS_INTERPRETING and device.type == "cpu"


def triton_kernels(name: str) -> ModuleType:
    """The launchers in ``megagen.kernels.triton.<name>``; call only where ``serves_triton``."""
    return importlib.import_module(f"megagen.kernels.triton.{name}")


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
