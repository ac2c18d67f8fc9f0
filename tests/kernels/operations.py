"""Running an operation of the table with gradients, in any precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagen.core.registry import resolve
from megagen.kernels import GPU_SPECS, SPECS
from megagen.kernels.spec import Case, Spec

ALL: dict[str, Spec] = {name: resolve(target) for name, target in SPECS.items()}
CASES: list[tuple[str, Case]] = [(name, case) for name, spec in ALL.items() for case in spec.cases]

COMPOSED: dict[str, Spec] = {name: resolve(target) for name, target in GPU_SPECS.items()}
COMPOSED_CASES = [(name, case) for name, spec in COMPOSED.items() for case in spec.cases]


def case_id(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(f"{k}{v}" for k, v in value.items())
    return str(value)


def outputs_of(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Always a tuple."""
    return (made,) if isinstance(made, Tensor) else made


def gradients_like(
    spec: Spec, made: dict[str, Any], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """A gradient for every output, fp32."""
    outputs = outputs_of(spec.reference(**made))
    return tuple(torch.randn(out.shape, generator=generator) for out in outputs)


def run(
    function: Callable[..., Tensor],
    spec: Spec,
    made: dict[str, Any],
    dtype: torch.dtype,
    grad: tuple[Tensor, ...],
) -> dict[str, Tensor]:
    """The output and the gradients by argument name, given the gradients of the outputs.

    An argument keeps its strides, so that what a model hands over is what is tested.
    """
    inputs: dict[str, Any] = {}
    for name, value in made.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            base = torch.empty_strided(
                value.size(), value.stride(), dtype=dtype, device=value.device
            ).copy_(value)
            inputs[name] = base.requires_grad_(name in spec.differentiable)
        else:
            inputs[name] = value
    out = outputs_of(function(**inputs))
    names = [name for name in spec.differentiable if isinstance(inputs.get(name), Tensor)]
    leaves = [inputs[name] for name in names]
    grads = torch.autograd.grad(
        out, leaves, [g.to(o.dtype) for o, g in zip(out, grad, strict=True)]
    )
    made_out = {"out" if i == 0 else f"out{i}": o.detach() for i, o in enumerate(out)}
    return {**made_out, **dict(zip(names, grads, strict=True))}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 errors by name."""
    return {
        name: float((found[name].double() - value.double()).norm() / value.double().norm())
        for name, value in exact.items()
    }
