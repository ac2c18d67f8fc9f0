"""Timing two things against each other, and where results go."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: of the process on all its threads, and on the wall."""

    process: float
    wall: float


def time_once(run: Callable[[], Any]) -> Timing:
    """Call once."""
    process, wall = time.process_time(), time.perf_counter()
    run()
    return Timing(time.process_time() - process, time.perf_counter() - wall)


def compare(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, pairs: int, warmup: int = 2
) -> dict[str, float]:
    """Medians over interleaved calls, and of the ratios of neighbours (ours / theirs)."""
    for _ in range(warmup):
        ours(), theirs()
    timings = [(time_once(ours), time_once(theirs)) for _ in range(pairs)]
    median = statistics.median
    return {
        "ours_process_s": median(a.process for a, _ in timings),
        "theirs_process_s": median(b.process for _, b in timings),
        "ours_wall_s": median(a.wall for a, _ in timings),
        "theirs_wall_s": median(b.wall for _, b in timings),
        "process_ratio": median(a.process / b.process for a, b in timings),
        "wall_ratio": median(a.wall / b.wall for a, b in timings),
    }


def reset_peak() -> None:
    """Start the kernel's peak counter anew."""
    Path("/proc/self/clear_refs").write_text("5")


def resident_mb(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def machine() -> str:
    """A folder name for this machine: its processor and number of cores, or its GPU."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        found = (
            re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        )
        name = f"{found[1] if found else platform.processor() or 'cpu'} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write ``result`` with the machine and the versions beside it; returns the file."""
    path = RESULTS / machine() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "machine": machine(),
        "load_average": os.getloadavg()[0],  # beyond the cores in use: others were at work
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    path.write_text(json.dumps({**facts, **result}, indent=2) + "\n")
    return path
