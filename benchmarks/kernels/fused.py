"""Memory-bound operations of a block on a GPU: bandwidth against torch, eager and compiled.

``rows()`` gives one row for each operation and size. Every arm is checked against fp64 before it is
timed; arms take turns, each with an empty cache. Bytes are the least that must move
(each tensor read or written once), so a share of the memory's speed cannot be flattered by a kernel
that moves more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megagen.core.registry import resolve
from megagen.kernels import GPU_SPECS, SPECS
from megagen.kernels.spec import Spec

Arm = tuple[Callable[[], Any], Callable[[], Any]]
"""A forward without gradient, and the backward alone."""

WIDTHS = {"Wan 1.3B": (1536, 8960), "Wan 14B": (5120, 13_824)}
GRID = {"T": 21, "H": 30, "W": 52}
NUM_TOKENS = 32_760
HEAD_DIM = 128

BACKWARD = {
    "bias_gelu_tanh": 3 / 2,
    "flow_matching_loss": 4 / 3,
    "gated_residual": 1.0,
    "gated_residual_layernorm_modulate": 6 / 4,
    "layernorm_modulate": 3 / 2,
    "norm_rope_tile_pool": 3 / 2,
    "rmsnorm_rope": 3 / 2,
    "vsd_loss": 1.0,
}
"""Bytes of the backward by those of the forward; what the residual hands on is not moved."""

_CACHE = 256 << 20
_ERROR = 2**-6


def cases(name: str) -> dict[str, dict[str, int]]:
    """The operation's sizes by their names: Wan's at 480p; the losses take one large latent."""
    base = dict(resolve({**SPECS, **GPU_SPECS}[name]).bench_case)
    if name.endswith("loss"):
        return {"latents": base}
    tokens = GRID if "T" in base else {"S": NUM_TOKENS}
    sizes = {}
    for model, (dim, ffn) in WIDTHS.items():
        wide = {"D": dim, "F": ffn, "N": dim // HEAD_DIM, "K": HEAD_DIM, **tokens}
        sizes[model] = {**base, **{key: wide[key] for key in wide if key in base}}
    return sizes


def rows(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, repeats: int = 20
) -> list[dict[str, Any]]:
    """Measure all operations.

    Args:
        device: a GPU; on a CPU the same runs with the wall clock, to try the code.
        dtype: of activations.
        repeats: calls of each arm.
    """
    return [
        measure(resolve(target), size, case, device, dtype, repeats)
        for name, target in {**SPECS, **GPU_SPECS}.items()
        for size, case in cases(name).items()
    ]


def measure(
    spec: Spec,
    size: str,
    case: Mapping[str, int],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
) -> dict[str, Any]:
    """One row: milliseconds, TB/s and error of each arm.

    Raises:
        SystemExit: an arm's result is not that of fp64.
    """
    made = spec.make(case, torch.Generator().manual_seed(0), dtype)
    made = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}
    functions = {
        "megagen": spec.function,
        "eager": spec.reference,
        "compiled": torch.compile(spec.reference),
    }
    errors = {name: error_of(spec, function, made) for name, function in functions.items()}
    for name, error in errors.items():
        if error > _ERROR:
            raise SystemExit(f"{spec.name} {size}: {name} is {error:.1e} from fp64: not timed")
    arms = {name: arm(spec, function, made) for name, function in functions.items()}
    moved = spec.bytes(case, dtype.itemsize)
    row: dict[str, Any] = {
        "operation": spec.name,
        "size": size,
        "case": dict(case),
        "error": errors,
    }
    for place, direction in enumerate(("forward", "backward")):
        times = take_turns({name: both[place] for name, both in arms.items()}, device, repeats)
        bytes_moved = moved * (BACKWARD[spec.name] if place else 1)
        row[direction] = {
            name: {"ms": 1e3 * seconds, "tb_per_s": bytes_moved / seconds / 1e12}
            for name, seconds in times.items()
        }
    return row


def arm(spec: Spec, function: Callable[..., Any], made: Mapping[str, Any]) -> Arm:
    """The two callables of a function."""
    inputs, leaves = dict(made), []
    for name in spec.differentiable:
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = inputs[name].detach().requires_grad_()
            leaves.append(inputs[name])
    out = _tuple(function(**inputs))
    grads = [torch.ones_like(o) for o in out]

    def forward() -> None:
        with torch.no_grad():
            function(**inputs)

    def backward() -> None:
        torch.autograd.grad(out, leaves, grads, retain_graph=True)

    return forward, backward


def error_of(spec: Spec, function: Callable[..., Any], made: Mapping[str, Any]) -> float:
    """Largest relative L2 error of an output."""
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in made.items()
    }
    with torch.no_grad():
        pairs = zip(_tuple(function(**made)), _tuple(spec.reference(**wide)), strict=True)
        return max(float((found - exact).norm() / exact.norm()) for found, exact in pairs)


def take_turns(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Median seconds of each call; they take turns, each with an empty cache."""
    flush = torch.empty(_CACHE if device.type != "cpu" else 1, dtype=torch.int8, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            flush.zero_()
            taken = _timed(call, device)
            if turn >= 2:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _tuple(made: Any) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else made
