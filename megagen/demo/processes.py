"""The demo's own work on every core: sampling and judging in forked ranks of one thread each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from megagen.parallel.launch import run_ranks

Item = TypeVar("Item")
Result = TypeVar("Result")

_LIMIT_S = 3600.0


def available() -> int:
    """Cores of this process."""
    return len(os.sched_getaffinity(0))


def together(processes: int, fn: Callable[..., Result], *args: object) -> Result:
    """``fn(*args)`` in ranks that form one process group; the first rank's result.

    Raises:
        RankError: a rank failed.
    """
    result: Result = run_ranks(processes, _first_rank, fn, args, timeout=_LIMIT_S)[0]
    return result


def each(processes: int, fn: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``[fn(item) for item in items]``, the items dealt out over processes.

    Raises:
        RankError: a rank failed.
    """
    processes = max(1, min(processes, len(items)))
    shares = run_ranks(processes, _share, fn, items, timeout=_LIMIT_S)
    return [shares[n % processes][n // processes] for n in range(len(items))]


def _first_rank(fn: Callable[..., Result], args: Sequence[object]) -> Result | None:
    result = fn(*args)
    return result if dist.get_rank() == 0 else None


def _share(fn: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [fn(item) for item in items[dist.get_rank() :: dist.get_world_size()]]
