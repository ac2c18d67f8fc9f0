"""How the kernels of video sparse attention are launched: shapes by GPU, descriptors, device.

The table was chosen from what compiled kernels need (registers without spills, programs that fit an
SM at a time), not timed; ``vsa_tune`` times the alternatives on the GPU at hand.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 64
"""Slots of a block."""

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """How one kernel runs.

    Attributes:
        num_warps, num_stages: of a program, of its pipelined loops.
        tma: load blocks by tensor descriptors (sm_90 and later), else by pointers.
        pairs: forward only: two full key blocks a step.
    """

    num_warps: int
    num_stages: int
    tma: bool
    pairs: bool = False


KERNELS = ("fine_forward", "fine_dq", "fine_dkv")
ARCHITECTURES = (80, 90, 100)

CONFIGS: dict[tuple[str, int, int], Config] = {
    ("fine_forward", 64, 80): Config(4, 3, tma=False),
    ("fine_forward", 128, 80): Config(4, 3, tma=False),
    ("fine_forward", 64, 90): Config(4, 3, tma=True, pairs=True),
    ("fine_forward", 128, 90): Config(4, 3, tma=True),
    ("fine_forward", 64, 100): Config(4, 3, tma=True, pairs=True),
    ("fine_forward", 128, 100): Config(4, 3, tma=True),
    ("fine_dq", 64, 80): Config(4, 3, tma=False),
    ("fine_dq", 128, 80): Config(4, 2, tma=False),
    ("fine_dq", 64, 90): Config(4, 3, tma=True),
    ("fine_dq", 128, 90): Config(4, 3, tma=True),
    ("fine_dq", 64, 100): Config(4, 3, tma=True),
    ("fine_dq", 128, 100): Config(8, 3, tma=True),
    ("fine_dkv", 64, 80): Config(4, 2, tma=False),
    ("fine_dkv", 128, 80): Config(8, 2, tma=False),
    ("fine_dkv", 64, 90): Config(4, 3, tma=True),
    ("fine_dkv", 128, 90): Config(8, 3, tma=True),
    ("fine_dkv", 64, 100): Config(4, 3, tma=True),
    ("fine_dkv", 128, 100): Config(4, 2, tma=True),
}
"""By kernel, head dim and the lowest architecture it is meant for."""


def config_for(kernel: str, x: Tensor) -> Config:
    """The table's entry for a tensor's head dim and GPU (sm_90's where there is none)."""
    architecture = 90
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        architecture = max(a for a in ARCHITECTURES if a <= max(80, 10 * major + minor))
    return CONFIGS[kernel, x.shape[-1], architecture]


def source(x: Tensor, tma: bool) -> Any:
    """A contiguous ``[..., D]`` as kernels take it: a descriptor of 64-row boxes, or the tensor."""
    rows = x.view(-1, x.shape[-1])
    return TensorDescriptor.from_tensor(rows, [BLOCK, rows.shape[1]]) if tma else x


@contextlib.contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Launches go to the GPU of ``x``; nothing to do where Triton interprets on a CPU."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            yield
    else:
        yield


def num_processors(x: Tensor) -> int:
    """Multiprocessors of a tensor's GPU, 1 for a CPU."""
    if not x.is_cuda:
        return 1
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)
