"""How kernels over lines are launched: one program a line, the whole line in registers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor


def on_device_of(x: Tensor) -> Any:
    """Context in which launches go to the GPU of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def block_of(size: int) -> int:
    """Lanes for so many numbers: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def warps_of(block: int, per_thread: int) -> int:
    """Warps so that a thread holds about ``per_thread`` of a line's numbers, 1 to 16."""
    return min(16, max(1, block // (32 * per_thread)))
