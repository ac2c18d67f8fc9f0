"""Memory-bound operations of a block: bandwidth against plain torch, eager and compiled.

Bytes are the least that must move (each tensor read or written once), so a share of the memory's
speed cannot be flattered by a kernel that moves more. Every arm is held to the reference in fp64,
outputs and gradients, before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.arms import first_line
from benchmarks.kernels.clock import (
    NOT_MEASURED,
    Options,
    clock_of,
    copy_bandwidth,
    gpu_state,
    take_turns,
)
from megagen.core.registry import resolve
from megagen.kernels import GPU_SPECS, SPECS
from megagen.kernels.spec import Spec

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

_ROUNDS = {"cpu": (5, 15), "cuda": (10, 30)}
_ERROR = {torch.float32: 5e-5, torch.bfloat16: 2**-6}
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
_SMALL = "1,024 tokens"


def cases(name: str, device: torch.device) -> dict[str, dict[str, int]]:
    """The operation's sizes by their names.

    A GPU gets Wan's at 480p, the losses one large latent; a CPU a block of 1,024 tokens.
    """
    base = dict(resolve({**SPECS, **GPU_SPECS}[name]).bench_case)
    if device.type == "cpu":
        return {_SMALL: base}
    if name.endswith("loss"):
        return {"latents": base}
    tokens = GRID if "T" in base else {"S": NUM_TOKENS}
    sizes = {}
    for model, (dim, ffn) in WIDTHS.items():
        wide = {"D": dim, "F": ffn, "N": dim // HEAD_DIM, "K": HEAD_DIM, **tokens}
        sizes[model] = {**base, **{key: wide[key] for key in wide if key in base}}
    return sizes


def operations(device: torch.device) -> tuple[str, ...]:
    """Those that are one kernel on a device."""
    return tuple(SPECS) if device.type == "cpu" else (*SPECS, *GPU_SPECS)


def measure(name: str, size: str, device: torch.device, options: Options) -> dict[str, Any]:
    """One operation at one of its ``cases``.

    Args:
        name: of the operation.
        size: name of the case.
        device: a CPU or a GPU.
        options: as ``suite.measure`` takes them.
    """
    spec, case, dtype = _spec(name), cases(name, device)[size], _DTYPES[device.type]
    options.announce("inputs")
    made = spec.make(case, torch.Generator().manual_seed(0), dtype)
    made = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}
    arms, calls = _try_all(spec, made, device, options)
    clock = clock_of(device)
    for _ in range(2):
        for call in calls.values():
            call()
    least, most = _ROUNDS[device.type]
    times, rounds = take_turns(
        calls, clock, least=least, most=most, seconds=options.seconds, announce=options.announce
    )
    copy = copy_bandwidth(device, clock)
    seconds = {key: clock.seconds(timing) for key, timing in times.items()}
    cells(name, spec.bytes(case, dtype.itemsize), seconds, copy, arms)
    return {
        "name": f"{name}, {size}",
        "operation": name,
        "size": size,
        "case": case,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "clock": clock.name,
        "statistic": f"{clock.statistic} of {rounds}",
        "ceiling": {"copy_bytes_per_s": copy},
        "gpu": gpu_state() if device.type == "cuda" else None,
        "arms": arms,
    }


def _try_all(
    spec: Spec, made: Mapping[str, Any], device: torch.device, options: Options
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    wide = {k: v.double() if _is_float(v) else v for k, v in made.items()}
    exact = results(spec, spec.reference, wide)
    limit = _ERROR[_DTYPES[device.type]]
    arms: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for arm, function in functions(spec, device).items():
        record: dict[str, Any] = {"ours": arm == "megagen", "kind": "fused"}
        arms[arm] = record
        record["status"] = options.skip.get(arm, "measured")
        if function is None:
            record["status"] = f"{NOT_MEASURED}: a CPU has megagen and eager alone"
        if function is None or arm in options.skip:
            continue
        options.announce(arm)
        try:
            record["error"] = errors(results(spec, function, made), exact)
        except Exception as error:  # its words are the result
            record["status"] = f"{NOT_MEASURED}: {first_line(error)}"
            continue
        worst = max(record["error"].values())
        if not worst <= limit:  # nan too
            record["status"] = f"wrong, so {NOT_MEASURED}: {worst:.1e} from fp64"
            continue
        forward, backward = directions(spec, function, made)
        calls |= {f"{arm}|forward": forward, f"{arm}|backward": backward}
    return arms, calls


def functions(spec: Spec, device: torch.device) -> dict[str, Callable[..., Any] | None]:
    """The arms; None where a device has none."""
    compiled = None if device.type == "cpu" else torch.compile(spec.reference)
    return {"megagen": spec.function, "eager": spec.reference, "compiled": compiled}


def cells(
    name: str, moved: int, seconds: Mapping[str, float], copy: float, arms: dict[str, Any]
) -> None:
    """Adds the figures of each arm by direction, and its time by ours."""
    for key, taken in seconds.items():
        arm, _, direction = key.partition("|")
        moved_here = moved * (BACKWARD[name] if direction == "backward" else 1)
        ours = seconds.get(f"megagen|{direction}")
        arms[arm][direction] = {
            "ms": 1e3 * taken,
            "bytes_per_s": moved_here / taken,
            "share_of_copy": moved_here / taken / copy,
            "times_ours": None if ours is None else taken / ours,
        }


def directions(
    spec: Spec, function: Callable[..., Any], made: Mapping[str, Any]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward without gradient, and the backward alone."""
    inputs, leaves = _with_leaves(spec, made)
    outs = _differentiable(function(**inputs))
    grads = _gradients(outs)

    def forward() -> None:
        with torch.no_grad():
            function(**inputs)

    return forward, lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)


def results(spec: Spec, function: Callable[..., Any], made: Mapping[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients by their names."""
    inputs, leaves = _with_leaves(spec, made)
    outs = _tuple(function(**inputs))
    kept = _differentiable(outs)
    grads = torch.autograd.grad(kept, leaves, _gradients(kept))
    names = [n for n in spec.differentiable if isinstance(made.get(n), Tensor)]
    found = {f"out{i}" if len(outs) > 1 else "out": x.detach() for i, x in enumerate(outs)}
    return found | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of each."""
    return {
        name: float((x.double() - exact[name]).norm() / exact[name].norm())
        for name, x in found.items()
    }


def _spec(name: str) -> Spec:
    spec: Spec = resolve({**SPECS, **GPU_SPECS}[name])
    return spec


def _with_leaves(spec: Spec, made: Mapping[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    inputs, leaves = dict(made), []
    for name in spec.differentiable:
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = inputs[name].detach().requires_grad_()
            leaves.append(inputs[name])
    return inputs, leaves


def _gradients(outs: tuple[Tensor, ...]) -> list[Tensor]:
    """The same numbers for every arm, whatever its type; a scalar's is 1."""
    generator = torch.Generator(outs[0].device).manual_seed(1)
    return [
        torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
        if x.dim()
        else torch.ones_like(x)
        for x in outs
    ]


def _differentiable(made: Any) -> tuple[Tensor, ...]:
    return tuple(x for x in _tuple(made) if x.requires_grad)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _tuple(made: Any) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else tuple(made)
