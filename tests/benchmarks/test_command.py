"""The command: its exit codes, its tasks, and what it makes of workers that break."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer import BadParameter
from typer.testing import CliRunner

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import fused, gather, table, worker
from benchmarks.kernels.rows import CPU_ROWS, SUITES, Row
from benchmarks.measure import machine

COMMON = {"device": "cpu", "threads": 1, "seconds": 0.0}


def run_worker(args: Sequence[str], timeout: float) -> SimpleNamespace:
    """A worker in which the arm "breaks" kills its process and "hangs" never ends."""
    task, result, now = json.loads(args[-3]), Path(args[-2]), Path(args[-1])
    arms = {}
    for arm in ("one", "breaks", "hangs", "two"):
        arms[arm] = task["skip"].get(arm, "measured")
        if arm in task["skip"]:
            continue
        now.write_text(f"{arm}|backward")
        if arm == "breaks":
            return SimpleNamespace(returncode=-11)
        if arm == "hangs":
            raise subprocess.TimeoutExpired(args, timeout)
    result.write_text(json.dumps(arms))
    return SimpleNamespace(returncode=0)


def test_an_arm_that_breaks_its_process_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker.subprocess, "run", run_worker)
    found = worker.measured({}, 60)
    assert found.pop("whole_s") >= 0
    assert found == {
        "one": "measured",
        "breaks": "not measured: ended its process with -11",
        "hangs": "not measured: ran longer than 60 s",
        "two": "measured",
    }


def test_a_worker_that_cannot_start_is_not_tried_again() -> None:
    def nothing(task: worker.Task, result: Path, now: Path) -> Sequence[str]:
        return [sys.executable, "-c", "raise SystemExit(3)"]

    found = worker.measured({}, 120, nothing)
    assert found == {"status": "not measured: start ended its process with 3"}


def test_a_task_reaches_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("tiny", (5, 6, 10), 2, 3, masks=("random", "local"))
    seen: list[Any] = []
    monkeypatch.setattr("benchmarks.kernels.suite.measure", lambda *args: seen.append(args))
    task = {**COMMON, "threads": torch.get_num_threads(), "kind": "vsa"}
    task |= {"row": asdict(row), "mask": "local", "skip": {"a": "b"}}
    worker.work(json.loads(json.dumps(task)), lambda name: None)
    ((given, mask, device, options),) = seen
    assert (given, mask, device, options.skip) == (row, "local", torch.device("cpu"), {"a": "b"})


@pytest.mark.parametrize("name", SUITES)
def test_every_row_has_its_tasks(name: str) -> None:
    tasks = command.tasks(COMMON, name, set(), "", 4)
    assert len(tasks) == sum(len(row.masks) for row in SUITES[name])
    assert all(task["kind"] == "vsa" and task["row"]["heads"] <= 4 for task in tasks)


def test_rows_that_are_not_wanted_stay() -> None:
    tasks = command.tasks(COMMON, "cpu", {"S4096"}, "local", 0)
    assert ["kind" in task for task in tasks] == [row.name == "S4096" for row in CPU_ROWS]
    assert {task["mask"] for task in tasks} == {"local"}
    with pytest.raises(BadParameter, match="S4095"):
        command.tasks(COMMON, "cpu", {"S4095"}, "", 0)


def run(*args: str) -> Any:
    app = command.typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    found = run("--device", "gpu")
    assert found.exit_code == 1
    assert found.output == f"{command.NO_GPU}\n"


def test_results_are_written_as_far_as_they_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "measured", lambda task, limit: {"status": "not measured: why"})
    assert run("--rows", "S8192", "--out", str(tmp_path)).exit_code == 0
    home = tmp_path / machine()
    told = json.loads((home / "vsa_cpu_1.json").read_text())
    assert [row["status"] for row in told["rows"]] == [
        "not measured: why" if row.name == "S8192" else "not measured" for row in CPU_ROWS
    ]
    assert told["machine"] == machine()
    assert "not measured: why" in (home / "vsa_cpu_1.md").read_text()
    assert "not measured: why" in (home / "fused_cpu_1.md").read_text()


def test_numbers_that_are_wrong_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = {"arms": {"megagen": {"ours": True, "status": "wrong, so not measured: 1.0"}}}
    monkeypatch.setattr(command, "measured", lambda task, limit: {"name": "it", **bad})
    found = run("--part", "fused", "--out", str(tmp_path))
    assert found.exit_code == 1
    assert "it: megagen: wrong, so not measured" in found.output


def test_a_gpu_gets_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[worker.Task] = []

    def note(task: worker.Task, limit: float) -> dict[str, Any]:
        seen.append(task)
        return {"status": "not measured: it is not there"}

    monkeypatch.setattr(command, "measured", note)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(table, "machine", lambda: "some-gpu")
    monkeypatch.setattr(table, "facts", dict)
    assert run("--device", "gpu", "--out", str(tmp_path)).exit_code == 0
    kinds = [task["kind"] for task in seen]
    assert kinds.count("gather") == len(gather.BLOCKS) * len(gather.MASKS)
    assert kinds.count("vsa") == sum(len(row.masks) for row in SUITES["gpu"])
    names = {task["operation"] for task in seen if task["kind"] == "fused"}
    assert names == set(fused.BACKWARD)
    assert all(task["device"] == "cuda" for task in seen)
    written = {path.name for path in (tmp_path / "some-gpu").iterdir()}
    assert {"vsa_gpu.md", "fused_gpu.md", "gather_gpu.md", "vsa_gpu.json"} <= written
