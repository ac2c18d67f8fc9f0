"""Bias and tanh-GELU of the feed-forward layer; the backward makes the tanh again from ``x``.

Legend: S tokens, B batch, F ffn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagen.kernels.backend import (
    address,
    cpu,
    math_dtype,
    num_threads,
    serves_cpu,
    serves_triton,
    triton_kernels,
)
from megagen.kernels.spec import Case, Spec


def bias_gelu_tanh(x_SBF: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """``gelu(x + bias)`` with the tanh formula, computed in fp32, in the type of ``x``."""
    if bias_F is not None and bias_F.shape != x_SBF.shape[-1:]:
        raise ValueError(f"bias is {tuple(bias_F.shape)}, x is {tuple(x_SBF.shape)}")
    if serves_triton(x_SBF, bias_F) or serves_cpu(x_SBF, bias_F):
        y: Tensor = _bias_gelu(x_SBF, bias_F)
        return y
    return bias_gelu_tanh_reference(x_SBF, bias_F)


def bias_gelu_tanh_reference(x_SBF: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """The formula in plain torch."""
    dtype = math_dtype(x_SBF)
    u = x_SBF.to(dtype) if bias_F is None else x_SBF.to(dtype) + bias_F.to(dtype)
    return torch.nn.functional.gelu(u, approximate="tanh").to(x_SBF.dtype)


@torch.library.custom_op("megagen::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    if serves_triton(x):
        fused: Tensor = triton_kernels("bias_gelu").forward(x, bias)
        return fused
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y, dim = torch.empty_like(x), x.shape[-1]
    threads = num_threads(x.numel())
    cpu().bias_gelu_forward(x.numel() // max(dim, 1), dim, *map(address, (x, bias, y)), threads)
    return y


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("megagen::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if serves_triton(x):
        dx, dbias = triton_kernels("bias_gelu").backward(dy, x, bias)
        return dx, x.new_empty(0) if bias is None else dbias
    dy, x = dy.contiguous(), x.contiguous()
    bias = None if bias is None else bias.contiguous()
    dim = x.shape[-1]
    num_lines = x.numel() // max(dim, 1)
    count = 0 if bias is None else -(-num_lines // cpu().SEGMENT)
    dx, partial = torch.empty_like(x), x.new_empty(count, dim)
    dbias = x.new_empty(0 if bias is None else dim)
    cpu().bias_gelu_backward(
        num_lines,
        dim,
        *map(address, (x, bias, dy, dx, partial, dbias)),
        num_threads(x.numel()),
    )
    return dx, dbias


@_bias_gelu_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = _bias_gelu_backward(dy, x, bias)
    return dx, None if bias is None else dbias


_bias_gelu.register_autograd(_backward, setup_context=_save)


def _make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    shape = (case["S"], case["B"], case["F"])
    x = 3 * torch.randn(shape, generator=generator)
    bias = torch.randn(case["F"], generator=generator).to(dtype) if case["bias"] else None
    return {"x_SBF": x.to(dtype), "bias_F": bias}


SPEC = Spec(
    name="bias_gelu_tanh",
    function=bias_gelu_tanh,
    reference=bias_gelu_tanh_reference,
    make=_make,
    differentiable=("x_SBF", "bias_F"),
    cases=(
        {"S": 9, "B": 2, "F": 96, "bias": 1},
        {"S": 130, "B": 3, "F": 37, "bias": 1},
        {"S": 66, "B": 1, "F": 19, "bias": 0},
    ),
    bench_case={"S": 1024, "B": 1, "F": 8960, "bias": 1},
    bytes=lambda case, size: 2 * case["S"] * case["B"] * case["F"] * size,
)
