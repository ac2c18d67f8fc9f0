"""LayerNorm followed by a modulation, ``y = LN(x) * (1 + scale) + shift`` (adaLN), or by an affine.

Legend: S tokens, B batch, R modulation rows, D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagen.kernels.backend import (
    cpu,
    math_dtype,
    num_threads,
    serves_cpu,
    serves_triton,
    triton_kernels,
)
from megagen.kernels.rows import check_rows, describe, lines, per_token, strided
from megagen.kernels.spec import Case, Spec


def layernorm_modulate(
    x_SBD: Tensor,
    scale_RBD: Tensor,
    shift_RBD: Tensor,
    rows_S: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """``LN(x) * (1 + scale) + shift``, computed in fp32, in the type of ``x``.

    Args:
        x_SBD: hidden states.
        scale_RBD, shift_RBD: ``[R, B or 1, D]``; views into one modulation tensor are fine.
        rows_S: row of each token, int64; None: R equal runs of tokens, one row each.
        eps: added to the variance.
    """
    check_rows(x_SBD, rows_S, scale=scale_RBD, shift=shift_RBD)
    if is_served(x_SBD, scale_RBD, shift_RBD):
        y: Tensor = _layernorm(x_SBD, scale_RBD, shift_RBD, rows_S, eps, 1.0)[0]
        return y
    return layernorm_modulate_reference(x_SBD, scale_RBD, shift_RBD, rows_S, eps=eps)


def layernorm_affine(
    x_SBD: Tensor, weight_D: Tensor, bias_D: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """``LN(x) * weight + bias``, computed in fp32, in the type of ``x``."""
    weight, bias = weight_D.view(1, 1, -1), bias_D.view(1, 1, -1)
    check_rows(x_SBD, None, weight=weight, bias=bias)
    if is_served(x_SBD, weight, bias):
        y: Tensor = _layernorm(x_SBD, weight, bias, None, eps, 0.0)[0]
        return y
    dtype = math_dtype(x_SBD)
    y = torch.nn.functional.layer_norm(
        x_SBD.to(dtype), x_SBD.shape[-1:], weight_D.to(dtype), bias_D.to(dtype), eps
    )
    return y.to(x_SBD.dtype)


def is_served(x_SBD: Tensor, *others: Tensor | None) -> bool:
    """Whether a backend has fused LayerNorms for these tensors."""
    served = serves_triton(x_SBD, *others, line=x_SBD.shape[-1])
    return served or serves_cpu(x_SBD, *others)


def layernorm_modulate_reference(
    x_SBD: Tensor,
    scale_RBD: Tensor,
    shift_RBD: Tensor,
    rows_S: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """The formula in plain torch."""
    dtype = math_dtype(x_SBD)
    normed = torch.nn.functional.layer_norm(x_SBD.to(dtype), x_SBD.shape[-1:], eps=eps)
    scale, shift = (per_token(t.to(dtype), rows_S, len(x_SBD)) for t in (scale_RBD, shift_RBD))
    return (normed * (1 + scale) + shift).to(x_SBD.dtype)


@torch.library.custom_op("megagen::layernorm", mutates_args=())
def _layernorm(
    x: Tensor, scale: Tensor, shift: Tensor, rows: Tensor | None, eps: float, one: float
) -> tuple[Tensor, Tensor, Tensor]:
    if serves_triton(x):
        made = triton_kernels("layernorm").forward(x, None, None, scale, shift, rows, eps, one)
        _, y, mean, rstd = made
        return y, mean, rstd
    x, scale, shift = x.contiguous(), lines(scale), lines(shift)
    described, _, keep = describe(x, scale, rows)
    y, mean, rstd = torch.empty_like(x), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
    cpu().layernorm_forward(
        described,
        eps,
        one,
        x.data_ptr(),
        strided(scale),
        strided(shift),
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        num_threads(x.numel()),
    )
    del keep
    return y, mean, rstd


@_layernorm.register_fake
def _(
    x: Tensor, scale: Tensor, shift: Tensor, rows: Tensor | None, eps: float, one: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return y, mean, rstd


@torch.library.custom_op("megagen::layernorm_backward", mutates_args=())
def _layernorm_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: Tensor | None,
    one: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if serves_triton(x):
        backward = triton_kernels("layernorm").backward
        made = backward(dy, None, x, None, None, scale, mean, rstd, rows, one)
        return made[0], made[3], made[4]
    dy, x, scale = dy.contiguous(), x.contiguous(), lines(scale)
    described, count, keep = describe(x, scale, rows)
    dx = torch.empty_like(x)
    dscale, dshift = x.new_empty(scale.shape), x.new_empty(scale.shape)
    partial = x.new_empty(count, x.shape[1], 2, x.shape[2])
    cpu().layernorm_backward(
        described,
        one,
        x.data_ptr(),
        strided(scale),
        mean.data_ptr(),
        rstd.data_ptr(),
        dy.data_ptr(),
        dx.data_ptr(),
        partial.data_ptr(),
        dscale.data_ptr(),
        dshift.data_ptr(),
        num_threads(x.numel()),
    )
    del keep
    return dx, dscale, dshift


@_layernorm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: Tensor | None,
    one: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(scale.shape), x.new_empty(scale.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scale, _, rows, _, ctx.one = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, scale, mean, rstd, rows)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, scale, mean, rstd, rows = ctx.saved_tensors
    dx, dscale, dshift = _layernorm_backward(dy, x, scale, mean, rstd, rows, ctx.one)
    return dx, dscale, dshift, None, None, None


_layernorm.register_autograd(_backward, setup_context=_save)


def _make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    modulation = normal(case["R"], case["Bm"], 2, case["D"])
    rows = torch.randint(case["R"], (case["S"],), generator=generator) if case["rows"] else None
    return {
        "x_SBD": 3 * normal(case["S"], case["B"], case["D"]) + 1,
        "scale_RBD": modulation[:, :, 0],
        "shift_RBD": modulation[:, :, 1],
        "rows_S": rows,
    }


SPEC = Spec(
    name="layernorm_modulate",
    function=layernorm_modulate,
    reference=layernorm_modulate_reference,
    make=_make,
    differentiable=("x_SBD", "scale_RBD", "shift_RBD"),
    cases=(
        {"S": 7, "B": 2, "D": 96, "R": 1, "Bm": 2, "rows": 0},
        {"S": 130, "B": 3, "D": 37, "R": 1, "Bm": 1, "rows": 0},
        {"S": 200, "B": 2, "D": 64, "R": 5, "Bm": 2, "rows": 1},
        {"S": 64, "B": 1, "D": 3, "R": 64, "Bm": 1, "rows": 1},
        {"S": 201, "B": 2, "D": 20, "R": 3, "Bm": 2, "rows": 0},
        {"S": 1, "B": 1, "D": 1536, "R": 1, "Bm": 1, "rows": 0},
    ),
    bench_case={"S": 1024, "B": 1, "D": 1536, "R": 1, "Bm": 1, "rows": 0},
    bytes=lambda case, size: 2 * case["S"] * case["B"] * case["D"] * size,
)
