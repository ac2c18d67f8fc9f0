"""Taking times and ceilings: interleaved rounds on a CPU's clocks or a GPU's events.

On a CPU a figure is the best of its rounds (other work only ever adds to it), and what is short
runs three times in a row in each: a layer follows others like it in a network, and does not pay for
memory that a long arm has given back to the system. On a GPU it is the median (its clock moves both
ways); every call starts with an empty L2 cache.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import Timing, time_once

Calls = Mapping[str, Callable[[], Any]]
_L2 = 256 << 20
_HEAD_START = 2_000_000
"""Cycles in which the host gets ahead, so that launching is not what is timed."""
_SHORT = 1.5
"""Seconds below which a call on a CPU is repeated."""
_IN_A_ROW = 3
_COPY = {"cpu": 128 << 20, "cuda": 1 << 30}
_PRODUCT = {"cpu": 1024, "cuda": 8192}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Options:
    """How a row is measured.

    Args:
        seconds: after which no further round begins.
        skip: arms to leave out and the words that stand for them.
        announce: told what is about to run, so that what breaks a process has a name.
    """

    seconds: float
    skip: dict[str, str]
    announce: Callable[[str], None] = print


class CpuClock:
    """Process time of all threads, and the wall's.

    With one thread the process's own time counts, which other work on the machine does not enter;
    with more the wall's.
    """

    statistic = "best"

    def __init__(self) -> None:
        self.name = "process" if torch.get_num_threads() == 1 else "wall"

    def time(self, call: Callable[[], Any]) -> Timing:
        """The best of calls in a row, or of one that is long."""
        found = [time_once(call)]
        while found[0].wall < _SHORT and len(found) < _IN_A_ROW:
            found.append(time_once(call))
        return self.of(found)

    def of(self, timings: list[Timing]) -> Timing:
        """The figure of several."""
        return Timing(min(t.process for t in timings), min(t.wall for t in timings))

    def seconds(self, timing: Timing) -> float:
        """By the clock that counts."""
        return timing.process if self.name == "process" else timing.wall


class GpuClock:
    """Events on the current stream.

    Args:
        device: the GPU.
        flushes: empty the L2 cache before every call.
    """

    statistic, name = "median", "device"

    def __init__(self, device: torch.device, *, flushes: bool = True) -> None:
        self._flush = torch.empty(_L2 if flushes else 0, dtype=torch.int8, device=device)

    def time(self, call: Callable[[], Any]) -> Timing:
        """One call; both clocks are the device's."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(_HEAD_START)
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        return Timing(seconds, seconds)

    def of(self, timings: list[Timing]) -> Timing:
        """The figure of several."""
        median = statistics.median(t.wall for t in timings)
        return Timing(median, median)

    def seconds(self, timing: Timing) -> float:
        """By the clock that counts."""
        return timing.wall


Clock = CpuClock | GpuClock


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CpuClock() if device.type == "cpu" else GpuClock(device)


def take_turns(
    calls: Calls,
    clock: Clock,
    *,
    least: int,
    most: int,
    seconds: float,
    announce: Callable[[str], None] | None = None,
) -> tuple[dict[str, Timing], int]:
    """The figure of each call over rounds in which each runs once, and the number of rounds.

    Args:
        calls: warmed up already.
        clock: takes the times.
        least: rounds, however long they take.
        most: rounds.
        seconds: after which no further round begins.
        announce: told the name of a call before it runs.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in calls}
    start, rounds = time.perf_counter(), 0
    while rounds < least or (rounds < most and time.perf_counter() - start < seconds):
        for name, call in calls.items():
            if announce is not None:
                announce(name)
            timings[name].append(clock.time(call))
        rounds += 1
    return {name: clock.of(found) for name, found in timings.items()}, rounds


def product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """A square matrix product by torch, the ceiling of what multiplies, and its FLOPs."""
    size = _PRODUCT[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
    return lambda: a @ a, 2.0 * size**3


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes a second of a large copy, read and written both counted."""
    source = torch.ones(_COPY[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    take_turns(calls, clock, least=2, most=2, seconds=0)
    found, _ = take_turns(calls, clock, least=7, most=7, seconds=0)
    return 2 * source.nbytes / clock.seconds(found["copy"])


def gpu_state() -> str:
    """Clocks, power and temperature as the driver has them now."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return NOT_MEASURED
    return done.stdout.strip().splitlines()[0]
