"""Ranks that fail in every way: the cause is named, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagen.core.errors import ConfigError, SetupError
from megagen.parallel.launch import RankError, rank_environment, run_ranks, spawn


def identify(folder: Path) -> int:
    """Leave a trace of this process and of a child of its own; the rank."""
    child = subprocess.Popen(["sleep", "600"])
    (folder / f"{dist.get_rank()}").write_text(f"{os.getpid()} {child.pid}")
    return dist.get_rank()


def assert_all_gone(folder: Path, num_ranks: int) -> None:
    """No rank and no child of one is alive."""
    pids = [int(p) for r in range(num_ranks) for p in (folder / f"{r}").read_text().split()]
    assert len(pids) == 2 * num_ranks
    deadline = time.monotonic() + 3
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {[p for p in pids if is_running(p)]}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def ordinary(folder: Path, factor: int) -> tuple[int, float, int]:
    rank = identify(folder)
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total)
    return rank, float(total) * factor, torch.get_num_threads()


def raising(folder: Path) -> None:
    identify(folder)
    dist.barrier()
    if dist.get_rank() == 1:
        raise ZeroDivisionError("the reason")
    dist.barrier()  # fails, or waits for ever, because of rank 1


def dying(folder: Path) -> None:
    identify(folder)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hanging(folder: Path) -> None:
    identify(folder)
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


def test_results_come_by_rank(tmp_path: Path) -> None:
    assert run_ranks(3, ordinary, tmp_path, 10) == [(r, 60.0, 1) for r in range(3)]
    assert_all_gone(tmp_path, 3)


def test_the_first_traceback_is_the_one_shown(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed first.*in raising.*the reason"):
        run_ranks(3, raising, tmp_path)
    assert_all_gone(tmp_path, 3)


def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1 died.*SIGKILL"):
        run_ranks(3, dying, tmp_path)
    assert_all_gone(tmp_path, 3)


def test_ranks_that_hang_show_where(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)no end after 2 s.*rank 1 hangs in.*in hanging"):
        run_ranks(2, hanging, tmp_path, timeout=2)
    assert time.monotonic() - start < 6
    assert_all_gone(tmp_path, 2)


# -- spawn, from a process of its own -----------------------------------------------------------
def started(folder: Path, mode: str) -> int:
    """A rank that forks a child and then does what ``mode`` says."""
    rank = dist.get_rank()
    print("hello from", rank, flush=True)
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)

    def stop(number: int, frame: Any) -> None:
        (folder / f"stopped{rank}").touch()
        os._exit(7)

    if mode == "wait":
        signal.signal(signal.SIGTERM, stop)
    (folder / str(rank)).write_text(f"{os.getpid()} {child}")
    dist.barrier()
    (folder / "ready").touch()
    if mode == "fine":
        return 0
    if mode == "config":
        raise ConfigError("the key is wrong.", where="some.key")
    if rank == 1 and mode == "error":
        raise RuntimeError("the reason")
    if rank == 1 and mode == "code":
        return 5
    if rank == 1 and mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    return 0


def start(folder: Path, mode: str) -> int:
    """A process that spawns two ranks, its output in files; its pid, once the ranks are there."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for number, name in ((1, "out"), (2, "err")):
                file = os.open(folder / name, os.O_CREAT | os.O_WRONLY)
                os.dup2(file, number)
            sys.stdout = os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w")
            code = spawn(2, started, folder, mode)
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return pid


def end(pid: int) -> int:
    """Exit code of a process, which must come within 5 s."""
    deadline = time.monotonic() + 5
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("mode", "code", "said"),
    [
        ("fine", 0, ""),
        ("error", 1, "[rank 1] Traceback"),
        ("code", 5, ""),
        ("killed", 137, ""),
        ("config", 2, "some.key: the key is wrong."),
    ],
)
def test_spawn_ends_with_the_first_failure(tmp_path: Path, mode: str, code: int, said: str) -> None:
    assert end(start(tmp_path, mode)) == code
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert sorted(out.split()) == sorted(["hello", "from", "0", "hello", "from", "1"])
    assert said in err
    if mode == "config":
        assert err.count("the key is wrong") == 1 and "Traceback" not in err
    assert_all_gone(tmp_path, 2)


def test_spawn_forwards_signals(tmp_path: Path) -> None:
    pid = start(tmp_path, "wait")
    os.kill(pid, signal.SIGTERM)
    assert end(pid) == 7
    assert (tmp_path / "stopped0").exists() and (tmp_path / "stopped1").exists()
    assert_all_gone(tmp_path, 2)


def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    pid = start(tmp_path, "wait")
    os.kill(pid, signal.SIGKILL)
    assert end(pid) == -signal.SIGKILL
    found = [(tmp_path / f"{rank}").read_text().split() for rank in range(2)]
    time.sleep(0.5)
    alive = [int(rank) for rank, _ in found if is_running(int(rank))]
    for _, child in found:  # children of ranks are the ranks' own
        os.kill(int(child), signal.SIGKILL)
    assert not alive


# -- joining ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_JOB_ID": "20007",
                "SLURM_JOB_NODELIST": "localhost",
            },
            {
                "RANK": "5",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "1",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "20007",
            },
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "1"},
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        ),
    ],
    ids=["alone", "torchrun", "slurm", "slurm_one_task"],
)
def test_rank_environment(environ: dict[str, str], expected: dict[str, Any]) -> None:
    assert rank_environment(environ) == expected


def test_half_a_rank_environment_is_an_error() -> None:
    with pytest.raises(SetupError, match=r"WORLD_SIZE.*missing"):
        rank_environment({"RANK": "0"})
