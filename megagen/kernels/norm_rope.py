"""RMSNorm over all heads, then rotary embedding on interleaved pairs: queries and keys of Wan.

    n = x * weight / sqrt(sum(x^2) / num_features + eps)
    y[2h] = n[2h] cos[h] - n[2h+1] sin[h],   y[2h+1] = n[2h] sin[h] + n[2h+1] cos[h]

Legend: S tokens, B batch, N heads, K head size, H = K / 2 pairs. Under tensor parallelism a rank
holds some heads: it sums ``sum_squares`` over the ranks and gives the result to ``rmsnorm_rope``.
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

_MAX_HEAD_DIM = 1024


def rmsnorm_rope(
    x_SBNK: Tensor,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    sum_squares_SB1: Tensor | None = None,
    num_features: int | None = None,
) -> Tensor:
    """RMSNorm across heads and RoPE in one pass, computed in fp32, in the type of ``x``.

    Args:
        x_SBNK: queries or keys; a view into a fused projection is fine.
        weight: N x K numbers, ``[N, K]`` or ``[N * K]``.
        cos, sin: S x K / 2 numbers, ``[S, 1, 1, K / 2]`` or ``[S, K / 2]``; None: no rotation.
        eps: added to the mean square.
        sum_squares_SB1: the sum of squares over the features of all ranks; None: of this ``x``.
        num_features: features of all ranks; None: those of ``x``.
    """
    num_tokens, _, heads, head_dim = x_SBNK.shape
    weight = weight.reshape(heads, head_dim)
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin are given together or not at all")
    if cos is not None and sin is not None:
        cos, sin = (t.reshape(num_tokens, head_dim // 2) for t in (cos, sin))
    if num_features is None:
        num_features = heads * head_dim
    given = (x_SBNK, weight, cos, sin, sum_squares_SB1)
    served = serves_triton(*given, line=heads * head_dim)
    if served or (serves_cpu(*given) and head_dim <= _MAX_HEAD_DIM):
        y: Tensor = _norm_rope(x_SBNK, weight, cos, sin, sum_squares_SB1, eps, num_features)[0]
        return y
    return rmsnorm_rope_reference(
        x_SBNK,
        weight,
        cos,
        sin,
        eps=eps,
        sum_squares_SB1=sum_squares_SB1,
        num_features=num_features,
    )


def sum_squares(x_SBNK: Tensor) -> Tensor:
    """Sum of squares over heads and head dims, ``[S, B, 1]``, at least fp32."""
    if serves_triton(x_SBNK, line=x_SBNK.shape[-2:].numel()) or serves_cpu(x_SBNK):
        total: Tensor = _sum_squares(x_SBNK)
        return total
    return x_SBNK.to(math_dtype(x_SBNK)).square().sum((-2, -1)).unsqueeze(-1)


def rmsnorm_rope_reference(
    x_SBNK: Tensor,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    sum_squares_SB1: Tensor | None = None,
    num_features: int | None = None,
) -> Tensor:
    """The formula in plain torch."""
    dtype = math_dtype(x_SBNK)
    x = x_SBNK.to(dtype)
    num_tokens, _, heads, head_dim = x.shape
    if sum_squares_SB1 is None:
        sum_squares_SB1 = x.square().sum((-2, -1)).unsqueeze(-1)
    rstd = torch.rsqrt(sum_squares_SB1 / (num_features or heads * head_dim) + eps).unsqueeze(-1)
    y = x * rstd.to(dtype) * weight.to(dtype).reshape(heads, head_dim)
    if cos is not None and sin is not None:
        c, s = (t.to(dtype).reshape(num_tokens, 1, 1, head_dim // 2) for t in (cos, sin))
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        y = torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)
    return y.to(x_SBNK.dtype)


def _with_heads_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(x: Tensor, num_features: int) -> tuple[int, ...]:
    return (*x.shape, *x.stride()[:3], num_features)


@torch.library.custom_op("megagen::norm_rope", mutates_args=())
def _norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    eps: float,
    num_features: int,
) -> tuple[Tensor, Tensor]:
    x, weight = _with_heads_contiguous(x), weight.contiguous()
    cos, sin, squares = (None if t is None else t.contiguous() for t in (cos, sin, squares))
    if serves_triton(x):
        given = (x, weight, cos, sin, squares, eps, num_features)
        fused: tuple[Tensor, Tensor] = triton_kernels("norm_rope").forward(*given)
        return fused
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:2])
    cpu().norm_rope_forward(
        _sizes(x, num_features),
        eps,
        *map(address, (x, weight, cos, sin, squares, y, rstd)),
        num_threads(x.numel()),
    )
    return y, rstd


@_norm_rope.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    eps: float,
    num_features: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("megagen::norm_rope_backward", mutates_args=())
def _norm_rope_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    rstd: Tensor,
    num_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x = _with_heads_contiguous(dy), _with_heads_contiguous(x)
    weight = weight.contiguous()
    cos, sin, squares = (None if t is None else t.contiguous() for t in (cos, sin, squares))
    if serves_triton(x):
        given = (dy, x, weight, cos, sin, squares, rstd, num_features)
        dx, dweight, dsquares = triton_kernels("norm_rope").backward(*given)
        return dx, dweight, x.new_empty(0) if squares is None else dsquares
    dx, dweight = x.new_empty(x.shape), x.new_empty(weight.shape)
    dsquares = x.new_empty((0,) if squares is None else squares.shape)
    partial = x.new_empty(-(-x.shape[0] // cpu().SEGMENT), *weight.shape)
    cpu().norm_rope_backward(
        _sizes(x, num_features),
        *map(address, (x, weight, cos, sin, squares, rstd, dy, dx, dsquares, partial, dweight)),
        dy.stride()[:3],
        num_threads(x.numel()),
    )
    return dx, dweight, dsquares


@_norm_rope_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    rstd: Tensor,
    num_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dsquares = x.new_empty(0) if squares is None else squares.new_empty(squares.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dsquares


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, cos, sin, squares, _, ctx.num_features = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, cos, sin, squares, output[1])


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation recompute unpacks them only once
    dx, dweight, dsquares = _norm_rope_backward(dy, *saved, ctx.num_features)
    return dx, dweight, None, None, None if saved[4] is None else dsquares, None, None


_norm_rope.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("megagen::sum_squares", mutates_args=())
def _sum_squares(x: Tensor) -> Tensor:
    x = _with_heads_contiguous(x)
    if serves_triton(x):
        fused: Tensor = triton_kernels("norm_rope").sum_squares(x)
        return fused
    total = x.new_empty(*x.shape[:2], 1)
    cpu().sum_squares(_sizes(x, 0), address(x), address(total), num_threads(x.numel()))
    return total


@_sum_squares.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], 1, dtype=torch.float32)


def _sum_squares_backward(ctx: Any, dtotal: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return (x * (2 * dtotal).unsqueeze(-1)).to(x.dtype)


_sum_squares.register_autograd(
    _sum_squares_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    num_tokens, heads, head_dim = case["S"], case["N"], case["K"]
    angle = 7 * normal(num_tokens, 1, 1, head_dim // 2).double()
    made: dict[str, Any] = {
        "x_SBNK": normal(num_tokens, case["B"], heads, 3, head_dim)[:, :, :, 1],
        "weight": 1 + 0.3 * normal(heads, head_dim),
        "cos": angle.cos().to(dtype) if case["rope"] else None,
        "sin": angle.sin().to(dtype) if case["rope"] else None,
    }
    if case["reduced"]:  # as if as many features again sat on another rank
        made["sum_squares_SB1"] = 2.0 * heads * head_dim + normal(num_tokens, case["B"], 1)
        made["num_features"] = 2 * heads * head_dim
    return made


SPEC = Spec(
    name="rmsnorm_rope",
    function=rmsnorm_rope,
    reference=rmsnorm_rope_reference,
    make=_make,
    differentiable=("x_SBNK", "weight", "sum_squares_SB1"),
    cases=(
        {"S": 5, "B": 2, "N": 3, "K": 24, "rope": 1, "reduced": 0},
        {"S": 130, "B": 3, "N": 2, "K": 10, "rope": 1, "reduced": 0},
        {"S": 70, "B": 2, "N": 2, "K": 22, "rope": 0, "reduced": 0},
        {"S": 33, "B": 2, "N": 1, "K": 128, "rope": 1, "reduced": 1},
    ),
    bench_case={"S": 1024, "B": 1, "N": 12, "K": 128, "rope": 1, "reduced": 0},
    bytes=lambda case, size: 2 * case["S"] * case["B"] * case["N"] * case["K"] * size,
)
