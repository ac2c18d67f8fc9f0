"""Gated residual and the LayerNorm behind it: ``o = x + gate y``, ``LN(o) (1 + scale) + shift``.

The stream ``o`` goes on to the next residual, its norm into the next sub-layer: two tensors are
read and two written, in place of three and two.

Legend: S tokens, B batch, R modulation rows, D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagen.kernels.backend import serves_triton, triton_kernels
from megagen.kernels.layernorm import (
    layernorm_affine,
    layernorm_modulate,
    layernorm_modulate_reference,
)
from megagen.kernels.residual import gated_residual, gated_residual_reference
from megagen.kernels.rows import check_rows
from megagen.kernels.spec import Case, Spec


def gated_residual_layernorm_modulate(
    x_SBD: Tensor,
    y_SBD: Tensor,
    gate_RBD: Tensor | None,
    scale_RBD: Tensor,
    shift_RBD: Tensor,
    rows_S: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``o = x + gate y`` and ``LN(o) (1 + scale) + shift``, computed in fp32, in the type of ``x``.

    The norm is that of ``o`` as it is returned, rounded.

    Args:
        x_SBD, y_SBD: hidden states and what a sub-layer made of them.
        gate_RBD: ``[R, B or 1, D]``; None: 1.
        scale_RBD, shift_RBD: like ``gate_RBD``; views into one modulation tensor are fine.
        rows_S: row of each token, int64; None: R equal runs of tokens, one row each.
        eps: added to the variance.

    Raises:
        ValueError: shapes do not fit together.
    """
    modulations = {"scale": scale_RBD, "shift": shift_RBD}
    if gate_RBD is not None:
        modulations["gate"] = gate_RBD
    check_rows(x_SBD, rows_S, **modulations)
    if y_SBD.shape != x_SBD.shape:
        raise ValueError(f"y is {tuple(y_SBD.shape)}, x is {tuple(x_SBD.shape)}")
    if serves_triton(x_SBD, y_SBD, *modulations.values(), line=x_SBD.shape[-1]):
        return _fused(x_SBD, y_SBD, gate_RBD, scale_RBD, shift_RBD, rows_S, eps, 1.0)
    out = _residual(x_SBD, y_SBD, gate_RBD, rows_S)
    return out, layernorm_modulate(out, scale_RBD, shift_RBD, rows_S, eps=eps)


def gated_residual_layernorm_affine(
    x_SBD: Tensor,
    y_SBD: Tensor,
    gate_RBD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    rows_S: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``o = x + gate y`` and ``LN(o) weight + bias``; arguments as in the modulated form."""
    check_rows(x_SBD, rows_S, gate=gate_RBD)
    if serves_triton(x_SBD, y_SBD, gate_RBD, weight_D, bias_D, line=x_SBD.shape[-1]):
        weight, bias = weight_D.expand_as(gate_RBD), bias_D.expand_as(gate_RBD)
        return _fused(x_SBD, y_SBD, gate_RBD, weight, bias, rows_S, eps, 0.0)
    out = gated_residual(x_SBD, y_SBD, gate_RBD, rows_S)
    return out, layernorm_affine(out, weight_D, bias_D, eps=eps)


def gated_residual_layernorm_modulate_reference(
    x_SBD: Tensor,
    y_SBD: Tensor,
    gate_RBD: Tensor | None,
    scale_RBD: Tensor,
    shift_RBD: Tensor,
    rows_S: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch."""
    gate = torch.ones_like(scale_RBD) if gate_RBD is None else gate_RBD
    out = gated_residual_reference(x_SBD, y_SBD, gate, rows_S)
    return out, layernorm_modulate_reference(out, scale_RBD, shift_RBD, rows_S, eps=eps)


def _residual(x: Tensor, y: Tensor, gate: Tensor | None, rows: Tensor | None) -> Tensor:
    return x + y if gate is None else gated_residual(x, y, gate, rows)


def _fused(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    rows: Tensor | None,
    eps: float,
    one: float,
) -> tuple[Tensor, Tensor]:
    out, h, _, _ = _residual_layernorm(x, y, gate, scale, shift, rows, eps, one)
    return out, h


@torch.library.custom_op("megagen::residual_layernorm", mutates_args=())
def _residual_layernorm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    rows: Tensor | None,
    eps: float,
    one: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made: tuple[Tensor, Tensor, Tensor, Tensor] = triton_kernels("layernorm").forward(
        x, y, gate, scale, shift, rows, eps, one
    )
    return made


@_residual_layernorm.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    rows: Tensor | None,
    eps: float,
    one: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, h = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return out, h, mean, rstd


@torch.library.custom_op("megagen::residual_layernorm_backward", mutates_args=())
def _residual_layernorm_backward(
    dh: Tensor,
    dout: Tensor,
    out: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: Tensor | None,
    one: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (dh, dout, out, y, gate, scale, mean, rstd, rows, one)
    dx, dy, dgate, dscale, dshift = triton_kernels("layernorm").backward(*given)
    none = out.new_empty(0), out.new_empty(0)
    dy, dgate = none if gate is None else (dy, dgate)
    return dx, dy, dgate, dscale, dshift


@_residual_layernorm_backward.register_fake
def _(
    dh: Tensor,
    dout: Tensor,
    out: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: Tensor | None,
    one: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = out.new_empty(out.shape)
    dscale, dshift = (scale.new_empty(scale.shape) for _ in range(2))
    if gate is None or y is None:
        return dx, out.new_empty(0), out.new_empty(0), dscale, dshift
    return dx, y.new_empty(y.shape), gate.new_empty(gate.shape), dscale, dshift


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, gate, scale, _, rows, _, ctx.one = inputs
    out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    # without a gate the gradient of y is that of x, and y need not be kept
    ctx.save_for_backward(out, None if gate is None else y, gate, scale, mean, rstd, rows)


def _backward(ctx: Any, dout: Tensor, dh: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    dx, dy, dgate, dscale, dshift = _residual_layernorm_backward(dh, dout, *given, ctx.one)
    gated = (dx, None) if given[2] is None else (dy, dgate)
    return dx, *gated, dscale, dshift, None, None, None


_residual_layernorm.register_autograd(_backward, setup_context=_save)


def _make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    modulation = normal(case["R"], case["Bm"], 3, case["D"])
    rows = torch.randint(case["R"], (case["S"],), generator=generator) if case["rows"] else None
    return {
        "x_SBD": 3 * normal(case["S"], case["B"], case["D"]) + 1,
        "y_SBD": normal(case["S"], case["B"], case["D"]),
        "gate_RBD": modulation[:, :, 2] if case["gate"] else None,
        "scale_RBD": modulation[:, :, 0],
        "shift_RBD": modulation[:, :, 1],
        "rows_S": rows,
    }


SPEC = Spec(
    name="gated_residual_layernorm_modulate",
    function=gated_residual_layernorm_modulate,
    reference=gated_residual_layernorm_modulate_reference,
    make=_make,
    differentiable=("x_SBD", "y_SBD", "gate_RBD", "scale_RBD", "shift_RBD"),
    cases=(
        {"S": 7, "B": 2, "D": 96, "R": 1, "Bm": 2, "rows": 0, "gate": 1},
        {"S": 130, "B": 1, "D": 37, "R": 1, "Bm": 1, "rows": 0, "gate": 0},
        {"S": 140, "B": 2, "D": 64, "R": 3, "Bm": 1, "rows": 1, "gate": 1},
    ),
    bench_case={"S": 1024, "B": 1, "D": 1536, "R": 1, "Bm": 1, "rows": 0, "gate": 1},
    bytes=lambda case, size: 4 * case["S"] * case["B"] * case["D"] * size,
)
