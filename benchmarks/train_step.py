"""One SFT step of megagen against a plain PyTorch loop over diffusers' Wan with AdamW, on the CPU.

    python -m benchmarks.train_step [--case small] [--threads 1] [--pairs 9]

Time: both in one process, one step after the other. Memory: each in its own process, the peak of
its resident memory over what it was before the network was made. Layouts: TP2 on two ranks of one
thread against one rank with two. Nothing is reported where the losses of both sides differ.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import Any

import torch
import typer

from benchmarks.measure import compare, reset_peak, resident_mb, time_once, write_result
from benchmarks.wan_step import CASES, Step, make_ours, make_theirs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(case: str = "", threads: int = 1, pairs: int = 9) -> None:
    """Measure time, memory and TP2 of one case or of all, and write ``train_step.json``."""
    result: dict[str, Any] = {"threads": threads, "pairs": pairs, "cases": {}}
    for name in [case] if case else list(CASES):
        found = {
            "time": in_new_process("time", name, threads, pairs),
            "memory": memory(name, threads),
            "tensor_parallel": in_new_process("layouts", name, threads, pairs),
        }
        result["cases"][name] = found
        typer.echo(
            f"{name}: time {found['time']['process_ratio']:.3f}x "
            f"(wall {found['time']['wall_ratio']:.3f}x), "
            f"peak memory {found['memory']['peak_ratio']:.3f}x, "
            f"TP2 {found['tensor_parallel']['ratio']:.3f}x the time of one rank with two threads"
        )
    typer.echo(write_result("train_step", result))


@app.command()
def part(what: str, name: str, threads: int, pairs: int) -> None:
    """One measurement in this process, printed as JSON."""
    torch.set_num_threads(threads)
    if what == "layouts":
        found = measure_layouts(name, pairs)
    elif what == "time":
        found = measure_time(name, pairs)
    else:
        found = measure_memory(name, what)
    print(json.dumps(found))


def in_new_process(what: str, name: str, threads: int, pairs: int) -> dict[str, Any]:
    """``part`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.train_step", "part", what, name]
    done = subprocess.run(
        [*command, str(threads), str(pairs)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_time(name: str, pairs: int) -> dict[str, Any]:
    """Ratios of neighbouring steps; the first losses must agree."""
    join_alone()
    ours, theirs = make_ours(CASES[name]), make_theirs(CASES[name])
    losses = [(ours(), theirs()) for _ in range(3)]
    for mine, other in losses:
        if abs(mine - other) > 1e-4 * abs(other):
            raise SystemExit(f"losses differ, {losses}: not timed")
    return {"losses": losses, **compare(ours, theirs, pairs=pairs)}


def memory(name: str, threads: int) -> dict[str, Any]:
    """Peak resident memory of each side, and their ratio."""
    ours, theirs = (in_new_process(side, name, threads, 1) for side in ("ours", "theirs"))
    return {
        "ours": ours,
        "theirs": theirs,
        "peak_ratio": ours["peak_mb"] / theirs["peak_mb"],
        "saved_ratio": ours["saved_mb"] / theirs["saved_mb"],
    }


def measure_memory(name: str, side: str) -> dict[str, Any]:
    """Peak over what was resident after the imports, and tensors kept for the backward."""
    importlib.import_module("diffusers.models.transformers.transformer_wan")
    importlib.import_module("megagen.engine.role")  # both sides have all libraries loaded
    importlib.import_module("megagen.models.wan")
    join_alone()
    before = resident_mb("VmRSS")
    step: Step = make_ours(CASES[name]) if side == "ours" else make_theirs(CASES[name])
    step()
    reset_peak()
    for _ in range(3):
        step()
    peak = resident_mb("VmHWM") - before
    return {"peak_mb": peak, "saved_mb": saved_for_backward_mb(step)}


def saved_for_backward_mb(step: Step) -> float:
    """Storage that one step's graph keeps, each counted once."""
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values()) / 2**20


def measure_layouts(name: str, pairs: int) -> dict[str, Any]:
    """Wall time of a step under TP2 (one thread each) and on one rank with two threads."""
    from megagen.parallel.launch import run_ranks

    tp2 = run_ranks(2, timed_rank, name, pairs, {"tp_size": 2}, threads=1, timeout=600)[0]
    one = run_ranks(1, timed_rank, name, pairs, {}, threads=2, timeout=600)[0]
    return {"tp2_wall_s": tp2, "one_rank_two_threads_wall_s": one, "ratio": tp2 / one}


def timed_rank(name: str, pairs: int, layout: dict[str, int]) -> float:
    """Median wall time of a step on this rank."""
    step = make_ours(CASES[name], **layout)
    for _ in range(2):
        step()
    times = sorted(time_once(step).wall for _ in range(pairs))
    return times[len(times) // 2]


def join_alone() -> None:
    """A process group of one."""
    from megagen.parallel.launch import init_distributed

    init_distributed()


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "part":
        app()
    else:
        typer.run(main)
