"""One row measured: every arm tried, those that are right timed in turns, and the figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import peers, problem
from benchmarks.kernels.arms import Arm, Call, first_line, parts
from benchmarks.kernels.clock import (
    NOT_MEASURED,
    Clock,
    GpuClock,
    Options,
    clock_of,
    copy_bandwidth,
    gpu_state,
    product,
    take_turns,
)
from benchmarks.kernels.lists import overlap
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.rows import FACTOR, Row, Work, dense_work, sparse_work
from benchmarks.kernels.trial import Judge, attempt
from benchmarks.measure import Timing

DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
_ROUNDS = {"cpu": (2, 5), "cuda": (5, 25)}
"""Fewest and most rounds. One is enough on a CPU with several threads, where the trial was in this
process and warmed it."""
_PRODUCT = "matrix product"
_PART, _FINE = "part ", ", fine stage"


def arms_of(row: Row, device: torch.device) -> tuple[Arm, ...]:
    """All of a device's."""
    return peers.for_cpu(row) if device.type == "cpu" else peers.for_gpu(row)


def measure(row: Row, mask: str, device: torch.device, options: Options) -> dict[str, Any]:
    """The record of a row; see ``docs/benchmarks.md`` for what its fields mean."""
    dtype = DTYPES[device.type]
    options.announce("inputs")
    inputs = problem.make(row, mask, device, dtype)
    works = {
        "sparse": sparse_work(inputs.index, inputs.sizes_n),
        "all": sparse_work(inputs.every, inputs.sizes_n),
        "dense": dense_work(row),
    }
    found, calls = _try_all(row, inputs, device, options)
    clock = clock_of(device)
    times, rounds, ceiling = _time(inputs, calls, clock, options)
    record = {
        **describe(row, mask),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "overlap": overlap(inputs.index, row.layout.num_blocks),
        "clock": clock.name,
        "statistic": f"{clock.statistic} of {rounds}",
        "ceiling": {
            "flop_per_s": ceiling,
            "copy_bytes_per_s": copy_bandwidth(device, clock),
        },
        "load_average": os.getloadavg()[0],
        "gpu": gpu_state() if device.type == "cuda" else None,
        "parts": breakdown(calls, times, clock),
        "arms": found,
    }
    for name, (arm, call) in calls.items():
        # a layer's lists are its own: block means of few tokens are larger, and chosen more often
        work = works.get(arm.kind) or sparse_work(call.index or inputs.index, inputs.sizes_n)
        found[name] |= cells(times[name], clock, work, ceiling)
        for direction, timing in times.get(f"{name}{_FINE}", {}).items():
            own = clock.seconds(times[name][direction]) / clock.seconds(timing)
            found[name][direction]["over_fine"] = own
    compare(found)
    return record


def describe(row: Row, mask: str) -> dict[str, Any]:
    """What a record says of its row."""
    layout = row.layout
    return {
        "name": row.name,
        "mask": mask,
        "grid": list(row.grid),
        "tile": list(row.tile),
        "heads": row.heads,
        "tokens": layout.num_tokens,
        "slots": layout.padded,
        "blocks": layout.num_blocks,
        "selected": row.selected,
    }


def _try_all(
    row: Row, inputs: Problem, device: torch.device, options: Options
) -> tuple[dict[str, Any], dict[str, tuple[Arm, Call]]]:
    found: dict[str, Any] = {}
    calls: dict[str, tuple[Arm, Call]] = {}
    judge = Judge(inputs)
    for arm in arms_of(row, device):
        status = options.skip.get(arm.name) or arm.absence(row, device)
        if arm.kind == "layer" and inputs.mask == "local":
            status = f"{NOT_MEASURED}: a layer chooses its own lists"
        found[arm.name] = record = {"kind": arm.kind, "ours": arm.is_ours, "status": status}
        if status is not None:
            continue
        options.announce(arm.name)
        try:
            call = arm.build(inputs)
            if arm.no_backward is not None:
                with torch.no_grad():
                    call.run()  # compiles
            told = attempt(arm, call, inputs, judge)
        except Exception as error:  # a peer may fail in any way; its words are the result
            record["status"] = f"{NOT_MEASURED}: {first_line(error)}"
            continue
        record |= {"error": told.errors, "peak_mb": told.peak_mb, "status": "measured"}
        if told.complaint is not None:
            record["status"] = f"wrong, so {NOT_MEASURED}: {told.complaint}"
            continue
        if arm.no_backward is not None:
            record["no_backward"] = arm.no_backward
        calls[arm.name] = (arm, call)
    return found, calls


def timed_calls(
    inputs: Problem, calls: dict[str, tuple[Arm, Call]]
) -> dict[str, Callable[[], Any]]:
    """Every arm's directions, named ``arm|direction``; both together on a GPU alone."""
    timed: dict[str, Callable[[], Any]] = {}
    grads: dict[str, Tensor] = {}
    for name, (arm, call) in calls.items():
        timed[f"{name}|forward"] = _without_grad(call.run)
        if arm.no_backward is not None:
            continue
        if arm.order not in grads:
            grads[arm.order] = inputs.ordered(inputs.grad, arm.order)
        grad = grads[arm.order]
        if call.fine is not None:
            own, slots = f"{name}{_FINE}", inputs.ordered(inputs.grad, "slots")
            timed[f"{own}|forward"] = _without_grad(call.fine.run)
            timed[f"{own}|backward"] = _backward(call.fine, call.fine.run(), slots)
        timed[f"{name}|backward"] = _backward(call, call.run(), grad)
        if inputs.device.type == "cuda":
            timed[f"{name}|both"] = _step(call, grad)
    return timed


def _without_grad(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    return forward


def _backward(call: Call, out: Tensor, grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(out, call.leaves, grad, retain_graph=True)


def _step(call: Call, grad: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(call.run(), call.leaves, grad)


def _time(
    inputs: Problem, calls: dict[str, tuple[Arm, Call]], clock: Clock, options: Options
) -> tuple[dict[str, dict[str, Timing]], int, float]:
    """Timings by arm and direction (``hot``: with a warm cache), rounds, FLOP/s of the product."""
    device = inputs.device
    timed = timed_calls(inputs, calls)
    backend = _backend(calls)
    if backend is not None:
        pieces = parts(inputs, backend=backend).items()
        timed |= {f"{_PART}{name}|forward": run for name, run in pieces}
    multiply, flop = product(device, inputs.q.dtype)
    least, most = _ROUNDS[device.type]
    if device.type == "cpu" and torch.get_num_threads() > 1:
        least = 1
    limits: dict[str, Any] = {"least": least, "most": most, "seconds": options.seconds}
    limits |= {"announce": options.announce}
    found, rounds = take_turns({**timed, _PRODUCT: multiply}, clock, **limits)
    times: dict[str, dict[str, Timing]] = {}
    for name, timing in found.items():
        arm, _, direction = name.partition("|")
        times.setdefault(arm, {})[direction] = timing
    if device.type == "cuda":
        warm = GpuClock(device, flushes=False)
        limits |= {"seconds": options.seconds / 4}
        for name, timing in take_turns(timed, warm, **limits)[0].items():
            arm, _, direction = name.partition("|")
            times[arm][f"{direction} hot"] = timing
    return times, rounds, flop / clock.seconds(times[_PRODUCT][""])


def _backend(calls: dict[str, tuple[Arm, Call]]) -> str | None:
    """The first of ours whose layer is measured."""
    layers = (name for name, (arm, _) in calls.items() if arm.is_ours and arm.kind == "layer")
    return next((name.partition(",")[0] for name in layers), None)


def breakdown(
    calls: dict[str, tuple[Arm, Call]], times: dict[str, dict[str, Timing]], clock: Clock
) -> dict[str, Any] | None:
    """Milliseconds of a forward's parts, and of the whole."""
    backend = _backend(calls)
    if backend is None:
        return None
    names = {n.removeprefix(_PART): n for n in times if n.startswith(_PART)}
    whole = f"{backend}, whole layer"
    names |= {"fine": f"{whole}{_FINE}", "whole": whole}
    found = {part: 1e3 * clock.seconds(times[name]["forward"]) for part, name in names.items()}
    return {"backend": backend, "forward_ms": found}


def cells(times: dict[str, Timing], clock: Clock, work: Work, ceiling: float) -> dict[str, Any]:
    """The figures of an arm by direction, by the clock that counts; ``wall_ms`` beside it."""
    found: dict[str, Any] = {}
    for direction, factor in FACTOR.items():
        if direction not in times:
            found[direction] = NOT_MEASURED
            continue
        seconds = clock.seconds(times[direction])
        found[direction] = {
            "ms": 1e3 * seconds,
            "wall_ms": 1e3 * times[direction].wall,
            "flop_per_s_blocks": factor * work.blocks / seconds,
            "flop_per_s_tokens": factor * work.tokens / seconds,
            "share_of_ceiling": factor * work.tokens / seconds / ceiling,
        }
        if f"{direction} hot" in times:
            found[direction]["hot_ms"] = 1e3 * times[f"{direction} hot"].wall
    return found


def compare(found: dict[str, Any]) -> None:
    """Adds to every one of our cells how many times its time the peers take.

    Peers are the dense arms and those of the same kind.
    """
    for record in found.values():
        for direction in FACTOR:
            cell = record.get(direction)
            if not record["ours"] or not isinstance(cell, dict):
                continue
            others = {
                other: it[direction]
                for other, it in found.items()
                if not it["ours"]
                and it["kind"] in ("dense", record["kind"])
                and isinstance(it.get(direction), dict)
            }
            cell["times"] = {other: it["ms"] / cell["ms"] for other, it in others.items()}


def wrong(records: Iterable[dict[str, Any]]) -> list[str]:
    """Arms of ours whose numbers were wrong, in words."""
    return [
        f"{record['name']}: {name}: {arm['status']}"
        for record in records
        for name, arm in record.get("arms", {}).items()
        if arm["ours"] and arm["status"].startswith("wrong")
    ]
