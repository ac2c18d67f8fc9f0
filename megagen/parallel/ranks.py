"""Ranks forked on this machine, each in a session of its own, watched by their parent.

Forking after the imports costs 0.1 s a rank, a fresh interpreter 10. The parent must not have
touched CUDA. A rank ends by ``os._exit``: it must not run the exit handlers it inherited.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import multiprocessing
import multiprocessing.process
import multiprocessing.util
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagen.core import process
from megagen.core.errors import MegagenError

DEFAULT_TIMEOUT = timedelta(minutes=30)
GRACE_S = 2.0
"""How long the other ranks may go on after one has failed."""
POLL_S = 0.02


class RankError(RuntimeError):
    """A rank of ``run_ranks`` failed; the message holds the traceback of the first that did."""


@dataclasses.dataclass(frozen=True)
class _Report:
    """What a rank leaves behind in the run's folder."""

    failed_at: float | None
    text: str
    result: Any = None


def run_ranks(
    num_ranks: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    threads: int = 1,
) -> list[Any]:
    """Run ``fn(*args)`` in ``num_ranks`` forked ranks that form one process group.

    Args:
        num_ranks: ranks.
        fn: called in each rank, after ``init_distributed``; its result must pickle.
        args: its arguments, inherited by the fork.
        timeout: seconds until all ranks are killed.
        threads: torch threads of each rank.

    Returns:
        The results by rank.

    Raises:
        RankError: a rank raised, died or did not end in time. No process is left behind.
    """
    folder = Path(tempfile.mkdtemp(prefix="megagen_ranks_"))
    ranks = _fork(num_ranks, _tested_rank, folder, threads, fn, args)
    try:
        is_late, dead = _watch(ranks, timeout)
        stacks = _stacks(ranks, folder) if is_late else ""
    finally:
        _kill(ranks)
    try:
        reports = [_read_report(folder / f"{rank}.pickle") for rank in range(num_ranks)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    codes = {number: ranks[number].exitcode or 0 for number in dead}
    _raise_first(reports, codes, f"no end after {timeout:g} s; {stacks}" if is_late else "")
    return [report.result for report in reports if report is not None]


def spawn(
    num_ranks: int,
    fn: Callable[..., int | None],
    *args: Any,
    threads: int | None = None,
    collective_timeout: timedelta = DEFAULT_TIMEOUT,
) -> int:
    """Run ``fn(*args)`` in ``num_ranks`` forked ranks, their output passing through.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 are forwarded to the ranks; a second SIGINT kills
    them. One rank's failure ends all of them.

    Args:
        num_ranks: ranks.
        fn: called in each rank, after ``init_distributed``; returns an exit code (None: 0).
        args: its arguments, inherited by the fork.
        threads: torch threads of each rank; None: the cores shared out, at most OMP_NUM_THREADS.
        collective_timeout: how long a collective waits for its peers.

    Returns:
        An exit code: that of the first rank that failed (128 + signal where it was killed), else 0.
    """
    threads = threads or _threads_per_rank(num_ranks)
    folder = Path(tempfile.mkdtemp(prefix="megagen_ranks_"))
    ranks = _fork(num_ranks, _started_rank, folder, threads, fn, args, collective_timeout)
    try:
        with _forwarded_signals(ranks):
            _, dead = _watch(ranks, None)
            codes = [rank.exitcode for rank in ranks]
    finally:
        _kill(ranks)
        shutil.rmtree(folder, ignore_errors=True)
    first = dead[0] if dead else 0
    code = codes[first] or 0
    return 128 - code if code < 0 else code


def _threads_per_rank(num_ranks: int) -> int:
    share = len(os.sched_getaffinity(0)) // num_ranks
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(share, int(limit) if limit.isdigit() else share))


def _fork(
    num_ranks: int, body: Callable[..., int], folder: Path, threads: int, *args: Any
) -> list[multiprocessing.process.BaseProcess]:
    context = multiprocessing.get_context("fork")
    _preload()
    sys.stdout.flush()
    sys.stderr.flush()
    ranks: list[multiprocessing.process.BaseProcess] = []
    for rank in range(num_ranks):
        target = (body, rank, num_ranks, folder, threads, os.getpid(), *args)
        ranks.append(context.Process(target=_rank_main, args=target))
        ranks[-1].start()
    return ranks


def _preload() -> None:
    """Import once what every rank would import; not where importing could touch CUDA."""
    if torch.version.cuda is None:
        for module in ("optimizer", "distributed", "dist_checkpointing", "pipeline_parallel"):
            importlib.import_module(f"megatron.core.{module}")


def _rank_main(
    body: Callable[..., int],
    rank: int,
    num_ranks: int,
    folder: Path,
    threads: int,
    parent: int,
    *args: Any,
) -> None:
    code = 1
    try:
        os.setsid()
        _die_with(parent)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(threads)
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            LOCAL_RANK=str(rank),
            OMP_NUM_THREADS=str(threads),
        )
        code = body(rank, folder, *args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(Exception):
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # ends mp.Managers
        os._exit(code)


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent is gone (Linux)."""
    process.die_with_parent()
    if os.getppid() != parent:
        os._exit(1)


def _tested_rank(rank: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> int:
    from megagen.parallel.launch import init_distributed

    with (folder / f"{rank}.stack").open("w") as stacks:
        faulthandler.register(signal.SIGUSR2, stacks, all_threads=False)
        try:
            init_distributed(init_method=f"file://{folder}/store")
            report = _Report(None, "", fn(*args))
            # a rank that leaves early breaks peers that are still connecting to it
            dist.barrier()
            payload = pickle.dumps(report)
        except BaseException:
            report = _Report(time.monotonic(), traceback.format_exc())
            payload = pickle.dumps(report)
        written = folder / f"{rank}.part"
        written.write_bytes(payload)
        written.rename(folder / f"{rank}.pickle")
    return 0 if report.failed_at is None else 1


def _started_rank(
    rank: int,
    folder: Path,
    fn: Callable[..., int | None],
    args: tuple[Any, ...],
    collective_timeout: timedelta,
) -> int:
    from megagen.parallel.launch import init_distributed, shutdown

    try:
        init_distributed(init_method=f"file://{folder}/store", timeout=collective_timeout)
        code = fn(*args) or 0
        if code == 0:
            shutdown()
        return code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except MegagenError as error:
        _say(rank, folder, str(error), str(error))
        return error.exit_code
    except Exception as error:
        _say(rank, folder, traceback.format_exc(), f"{type(error).__name__}: {error}")
        return 1


def _say(rank: int, folder: Path, text: str, short: str) -> None:
    """The first rank that fails says why at length; the others follow from it, or say the same."""
    own = folder / f"failure{rank}"
    own.write_text(short)
    try:
        (folder / "failure").hardlink_to(own)
    except FileExistsError:
        if (folder / "failure").read_text() != short:
            print(f"[rank {rank}] {short.splitlines()[0]}", file=sys.stderr)
        return
    print(text if text == short else f"[rank {rank}] {text}", file=sys.stderr)


def _watch(
    ranks: list[multiprocessing.process.BaseProcess], timeout: float | None
) -> tuple[bool, list[int]]:
    """Wait until all ranks ended, one failed (and ``GRACE_S`` passed) or time is up.

    Returns:
        Whether time was up, and the ranks that failed by themselves, the first first.
    """
    deadline = time.monotonic() + timeout if timeout is not None else None
    dead: list[int] = []
    alive = dict(enumerate(ranks))
    is_late = False
    while alive:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            is_late = not dead
            break
        # a rank's sentinel stays open in the processes that it forked, so it would not tell
        time.sleep(POLL_S)
        for number in [n for n, rank in alive.items() if rank.exitcode is not None]:
            if alive.pop(number).exitcode != 0:
                dead.append(number)
                grace = time.monotonic() + GRACE_S
                deadline = grace if deadline is None else min(deadline, grace)
    return is_late, dead


@contextlib.contextmanager
def _forwarded_signals(ranks: list[multiprocessing.process.BaseProcess]) -> Iterator[None]:
    seen: list[int] = []

    def forward(number: int, frame: Any) -> None:
        is_second = number == signal.SIGINT and number in seen
        seen.append(number)
        for rank in ranks:
            if rank.pid is not None and rank.is_alive():
                os.kill(rank.pid, signal.SIGKILL if is_second else number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stacks(ranks: list[multiprocessing.process.BaseProcess], folder: Path) -> str:
    """Where each rank that still runs is at the moment."""
    running = [(n, rank) for n, rank in enumerate(ranks) if rank.is_alive()]
    for _, rank in running:
        assert rank.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGUSR2)
    time.sleep(0.2)
    texts = []
    for number, _ in running:
        path = folder / f"{number}.stack"
        texts.append(f"rank {number} hangs in\n{path.read_text() if path.exists() else '?'}")
    return "\n".join(texts)


def _kill(ranks: list[multiprocessing.process.BaseProcess]) -> None:
    """End every rank and what it started (its session is its process group)."""
    for rank in ranks:
        if rank.pid is not None:
            for send in (os.killpg, os.kill):  # a rank that has no session of its own yet: kill
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    send(rank.pid, signal.SIGKILL)
                    break
        rank.join()


def _read_report(path: Path) -> _Report | None:
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _raise_first(reports: list[_Report | None], dead: dict[int, int], late: str) -> None:
    failed = [(r.failed_at, n, r) for n, r in enumerate(reports) if r and r.failed_at is not None]
    silent = [n for n in dead if reports[n] is None]
    if silent:  # what the others report then is the consequence
        code = dead[silent[0]]
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise RankError(f"rank {silent[0]} died without a word ({cause})")
    if failed:
        _, number, report = min(failed, key=lambda item: item[:2])
        raise RankError(f"rank {number} failed first:\n{report.text}")
    if late:
        raise RankError(late)
    missing = [n for n, report in enumerate(reports) if report is None]
    if missing:
        raise RankError(f"ranks {missing} left no result")
