"""Fused operations against the same formula in plain torch: time of forward and forward + backward.

    python -m benchmarks.kernels --part fused [--threads 1] [--pairs 15]

Both sides do the same work on the same tensors, one call after the other. A speed is printed only
where the fused result agrees with an fp64 reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks.measure import compare, write_result
from megagen.core.registry import resolve
from megagen.kernels import SPECS
from megagen.kernels.spec import Spec


def main(threads: int = 1, pairs: int = 15) -> None:
    """Time every operation of the table and write ``kernels.json``."""
    torch.set_num_threads(threads)
    rows = {}
    typer.echo(
        f"{'operation':20} {'forward':>9} {'fwd+bwd':>9} {'GB/s fwd':>9}   (time / plain torch)"
    )
    for name, target in SPECS.items():
        rows[name] = row = time_operation(resolve(target), pairs)
        typer.echo(
            f"{name:20} {row['forward']['process_ratio']:8.2f}x "
            f"{row['both']['process_ratio']:8.2f}x {row['gigabytes_per_s']:9.1f}"
        )
    typer.echo(write_result("kernels", {"threads": threads, "pairs": pairs, "operations": rows}))


def time_operation(spec: Spec, pairs: int) -> dict[str, Any]:
    """Ratios of one operation at its ``bench_case``."""
    generator = torch.Generator().manual_seed(0)
    made = spec.make(spec.bench_case, generator, torch.float32)
    error = relative_error(spec, made)
    if error > 1e-5:
        raise SystemExit(f"{spec.name}: relative error {error:.1e} against fp64: not timed")
    ours, theirs = (runs(function, spec, made) for function in (spec.function, spec.reference))
    forward = compare(ours[0], theirs[0], pairs=pairs)
    moved = spec.bytes(spec.bench_case, 4)
    return {
        "case": dict(spec.bench_case),
        "relative_error": error,
        "forward": forward,
        "both": compare(ours[1], theirs[1], pairs=pairs),
        "gigabytes_per_s": moved / forward["ours_wall_s"] / 1e9,
    }


def runs(
    function: Callable[..., Tensor], spec: Spec, made: dict[str, Any]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward without gradient, and a forward with the backward to every input."""
    inputs = dict(made)
    leaves = []
    for name in spec.differentiable:
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = inputs[name].detach().requires_grad_()
            leaves.append(inputs[name])
    grad = torch.ones_like(function(**inputs))

    def forward() -> None:
        with torch.no_grad():
            function(**inputs)

    def both() -> None:
        torch.autograd.grad(function(**inputs), leaves, grad)

    return forward, both


def relative_error(spec: Spec, made: dict[str, Any]) -> float:
    """Of the fused forward, against the reference in fp64."""
    exact = spec.reference(
        **{
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in made.items()
        }
    )
    return float((spec.function(**made).double() - exact).norm() / exact.norm())
