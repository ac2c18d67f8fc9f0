"""Gated residual, ``out = x + gate * y``.

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


def gated_residual(
    x_SBD: Tensor, y_SBD: Tensor, gate_RBD: Tensor, rows_S: Tensor | None = None
) -> Tensor:
    """``x + gate * y``, computed in fp32, in the type of ``x``.

    Args:
        x_SBD, y_SBD: hidden states and what a sub-layer made of them.
        gate_RBD: ``[R, B or 1, D]``; a view into a modulation tensor is fine.
        rows_S: row of each token, int64; None: R equal runs of tokens, one row each.
    """
    check_rows(x_SBD, rows_S, gate=gate_RBD)
    if y_SBD.shape != x_SBD.shape:
        raise ValueError(f"y is {tuple(y_SBD.shape)}, x is {tuple(x_SBD.shape)}")
    served = serves_triton(x_SBD, y_SBD, gate_RBD, line=x_SBD.shape[-1])
    if served or serves_cpu(x_SBD, y_SBD, gate_RBD):
        out: Tensor = _residual(x_SBD, y_SBD, gate_RBD, rows_S)
        return out
    return gated_residual_reference(x_SBD, y_SBD, gate_RBD, rows_S)


def gated_residual_reference(
    x_SBD: Tensor, y_SBD: Tensor, gate_RBD: Tensor, rows_S: Tensor | None = None
) -> Tensor:
    """The formula in plain torch."""
    dtype = math_dtype(x_SBD)
    gate = per_token(gate_RBD.to(dtype), rows_S, len(x_SBD))
    return (x_SBD.to(dtype) + gate * y_SBD.to(dtype)).to(x_SBD.dtype)


@torch.library.custom_op("megagen::gated_residual", mutates_args=())
def _residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    if serves_triton(x):
        fused: Tensor = triton_kernels("residual").forward(x, y, gate, rows)
        return fused
    x, y, gate = x.contiguous(), y.contiguous(), lines(gate)
    described, _, keep = describe(x, gate, rows)
    out = torch.empty_like(x)
    threads = num_threads(x.numel())
    cpu().residual_forward(
        described, x.data_ptr(), y.data_ptr(), strided(gate), out.data_ptr(), threads
    )
    del keep
    return out


@_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("megagen::gated_residual_backward", mutates_args=())
def _residual_backward(
    dout: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    if serves_triton(y):
        grads: tuple[Tensor, Tensor] = triton_kernels("residual").backward(dout, y, gate, rows)
        return grads
    dout, y, gate = dout.contiguous(), y.contiguous(), lines(gate)
    described, count, keep = describe(y, gate, rows)
    dy, dgate = torch.empty_like(y), y.new_empty(gate.shape)
    partial = y.new_empty(count, y.shape[1], y.shape[2])
    cpu().residual_backward(
        described,
        y.data_ptr(),
        strided(gate),
        dout.data_ptr(),
        dy.data_ptr(),
        partial.data_ptr(),
        dgate.data_ptr(),
        num_threads(y.numel()),
    )
    del keep
    return dy, dgate


@_residual_backward.register_fake
def _(dout: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y, memory_format=torch.contiguous_format), y.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, y, gate, rows = inputs
    ctx.save_for_backward(y, gate, rows)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dy, dgate = _residual_backward(dout, *ctx.saved_tensors)
    return dout, dy, dgate, None


_residual.register_autograd(_backward, setup_context=_save)


def _make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows = torch.randint(case["R"], (case["S"],), generator=generator) if case["rows"] else None
    return {
        "x_SBD": normal(case["S"], case["B"], case["D"]),
        "y_SBD": normal(case["S"], case["B"], case["D"]),
        "gate_RBD": normal(case["R"], case["Bm"], 3, case["D"])[:, :, 1],
        "rows_S": rows,
    }


SPEC = Spec(
    name="gated_residual",
    function=gated_residual,
    reference=gated_residual_reference,
    make=_make,
    differentiable=("x_SBD", "y_SBD", "gate_RBD"),
    cases=(
        {"S": 7, "B": 2, "D": 96, "R": 1, "Bm": 2, "rows": 0},
        {"S": 130, "B": 3, "D": 37, "R": 1, "Bm": 1, "rows": 0},
        {"S": 200, "B": 2, "D": 64, "R": 5, "Bm": 2, "rows": 1},
        {"S": 64, "B": 1, "D": 3, "R": 64, "Bm": 1, "rows": 1},
        {"S": 201, "B": 2, "D": 20, "R": 3, "Bm": 2, "rows": 0},
    ),
    bench_case={"S": 1024, "B": 1, "D": 1536, "R": 1, "Bm": 1, "rows": 0},
    bytes=lambda case, size: 3 * case["S"] * case["B"] * case["D"] * size,
)
