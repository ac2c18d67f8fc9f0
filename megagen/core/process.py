"""Facts about this process: its rank, its device. The only place that asks torch for them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

import torch
import torch.distributed as dist


def rank() -> int:
    """Global rank, 0 where no process group exists (and torchrun's ``RANK`` before it does)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks, 1 where no process group exists."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank within this node (torchrun's ``LOCAL_RANK``, SLURM's ``SLURM_LOCALID``)."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def device() -> torch.device:
    """The device this rank computes on: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def is_main() -> bool:
    """True on global rank 0."""
    return rank() == 0


def die_with_parent() -> None:
    """Have the kernel end this process when the one that forked it is gone (Linux)."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
