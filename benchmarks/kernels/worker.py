"""A process for each row, so that an arm that breaks or hangs its process costs itself alone.

The worker notes what it is about to run. Where it dies or is too slow, the row is measured again
without the arm that ran last, whose cell says what became of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Task = dict[str, Any]
Command = Callable[[Task, Path, Path], Sequence[str]]
_TRIES = 6
COMMON = ("start", "inputs", "matrix product", "")
"""What no arm can be blamed for."""


def command(task: Task, result: Path, now: Path) -> Sequence[str]:
    """Of a worker: its task, where its record goes, where it notes what runs."""
    return [
        *(sys.executable, "-m", "benchmarks.kernels.worker"),
        *(json.dumps(task), str(result), str(now)),
    ]


def measured(task: Task, limit_s: float, command: Command = command) -> dict[str, Any]:
    """The record of a task; where there is none, ``{"status": "not measured: why"}``.

    Args:
        task: see ``work``.
        limit_s: of one try.
        command: of the worker.
    """
    skip: dict[str, str] = {}
    start = time.perf_counter()
    for _ in range(_TRIES):
        with tempfile.TemporaryDirectory() as folder:
            result, now = Path(folder) / "result.json", Path(folder) / "now"
            now.write_text("start")
            given = {**task, "skip": skip}
            try:
                code = subprocess.run(command(given, result, now), timeout=limit_s).returncode
                reason = f"ended its process with {code}"
            except subprocess.TimeoutExpired:
                code, reason = 1, f"ran longer than {limit_s:g} s"
            if code == 0 and result.exists():
                record: dict[str, Any] = json.loads(result.read_text())
                return {**record, "whole_s": time.perf_counter() - start}
            last = now.read_text().partition("|")[0]
        if last in COMMON or last in skip:
            return {"status": f"not measured: {last} {reason}"}
        skip[last] = f"not measured: {reason}"
    return {"status": f"not measured: {len(skip)} arms ended their process"}


def work(task: Task, announce: Callable[[str], None]) -> dict[str, Any]:
    """Measure one thing.

    Args:
        task: ``kind`` (vsa | fused | gather), ``device`` (cpu | cuda), ``threads``, ``seconds``,
            ``skip``, and what the kind takes: ``row`` and ``mask``; ``operation`` and ``size``;
            ``blocks`` and ``mask``.
        announce: told what is about to run.
    """
    import torch

    from benchmarks.kernels import fused, gather, suite
    from benchmarks.kernels.clock import Options
    from benchmarks.kernels.rows import Row

    torch.set_num_threads(task["threads"])
    device = torch.device(task["device"])
    options = Options(task["seconds"], task["skip"], announce)
    if task["kind"] == "fused":
        return fused.measure(task["operation"], task["size"], device, options)
    if task["kind"] == "gather":
        return gather.measure(task["blocks"], task["mask"], device)
    row = dict(task["row"])
    for name in ("grid", "tile", "masks"):
        row[name] = tuple(row[name])
    return suite.measure(Row(**row), task["mask"], device, options)


def main() -> None:
    """One task of the command line."""
    task, result, now = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    result.write_text(json.dumps(work(task, now.write_text)))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
