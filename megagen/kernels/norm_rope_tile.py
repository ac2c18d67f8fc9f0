"""Queries and keys on their way into sparse attention: RMSNorm, RoPE, blocks and their means.

What ``rmsnorm_rope`` and ``tile_pool`` do one after the other, in one pass over the tokens. Values
take it without a norm and a rotation.

Legend: S tokens in raster order, B batch, N heads, K head size, P slots (64 a block), n blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagen.kernels.backend import math_dtype, serves_triton, triton_kernels
from megagen.kernels.norm_rope import SPEC as NORM_ROPE
from megagen.kernels.norm_rope import rmsnorm_rope, rmsnorm_rope_reference
from megagen.kernels.spec import Case, Spec
from megagen.kernels.vsa import dispatch
from megagen.kernels.vsa.layout import BLOCK, VSALayout
from megagen.kernels.vsa.tile import tile_pool

_MAX_HEAD_DIM = 256


def norm_rope_tile_pool(
    x_SBNK: Tensor,
    weight: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    layout: VSALayout,
    eps: float = 1e-6,
    sum_squares_SB1: Tensor | None = None,
    num_features: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Slots ``[B, N, P, K]``, zeros in empty ones, and block means ``[B, N, n, K]``.

    Args:
        x_SBNK: queries, keys or values of the layout's tokens; a view into a fused projection is
            fine.
        weight: N x K numbers, ``[N, K]`` or ``[N * K]``; None: no norm.
        cos, sin: S x K / 2 numbers, ``[S, 1, 1, K / 2]`` or ``[S, K / 2]``; None: no rotation,
            as must be without a norm.
        layout: the blocks.
        eps, sum_squares_SB1, num_features: as of ``rmsnorm_rope``.

    Raises:
        ValueError: the shapes do not fit together or to the layout.
    """
    num_tokens, _, heads, head_dim = x_SBNK.shape
    if num_tokens != layout.num_tokens:
        raise ValueError(f"x has {num_tokens} tokens, the layout {layout.num_tokens}")
    if (cos is None) != (sin is None) or (weight is None and cos is not None):
        raise ValueError("cos and sin are given together, with a weight, or not at all")
    tensors = (x_SBNK, weight, cos, sin, sum_squares_SB1)
    if head_dim <= _MAX_HEAD_DIM and serves_triton(*tensors):
        if cos is not None and sin is not None:
            cos, sin = (t.reshape(num_tokens, head_dim // 2) for t in (cos, sin))
        weight = None if weight is None else weight.reshape(heads, head_dim)
        features = heads * head_dim if num_features is None else num_features
        tokens_P = layout.tables(x_SBNK.device).slot_to_raster_P
        given = (x_SBNK, weight, cos, sin, sum_squares_SB1, tokens_P, eps, features)
        slots, mean, _ = _norm_rope_tile(*given)
        return slots, mean
    normed = x_SBNK
    if weight is not None:
        more: dict[str, Any] = {"sum_squares_SB1": sum_squares_SB1, "num_features": num_features}
        normed = rmsnorm_rope(x_SBNK, weight, cos, sin, eps=eps, **more)
    backend = dispatch.choose("auto", x_SBNK)
    return tile_pool(normed.transpose(0, 1).contiguous(), layout, backend)


def norm_rope_tile_pool_reference(
    x_SBNK: Tensor,
    weight: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    layout: VSALayout,
    eps: float = 1e-6,
    sum_squares_SB1: Tensor | None = None,
    num_features: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch."""
    normed = x_SBNK
    if weight is not None:
        more: dict[str, Any] = {"sum_squares_SB1": sum_squares_SB1, "num_features": num_features}
        normed = rmsnorm_rope_reference(x_SBNK, weight, cos, sin, eps=eps, **more)
    tables = layout.tables(x_SBNK.device)
    tokens_P = tables.slot_to_raster_P
    slots_PBNK = normed[tokens_P.clamp(min=0)] * (tokens_P >= 0).view(-1, 1, 1, 1)
    slots = slots_PBNK.permute(1, 2, 0, 3)
    total = slots.to(math_dtype(slots)).unflatten(2, (-1, BLOCK)).sum(3)
    return slots, (total / tables.sizes_n.view(-1, 1)).to(slots.dtype)


@torch.library.custom_op("megagen::norm_rope_tile_pool", mutates_args=())
def _norm_rope_tile(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    tokens: Tensor,
    eps: float,
    num_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (None if t is None else t.contiguous() for t in (weight, cos, sin, squares))
    x = x if x.stride(-1) == 1 else x.contiguous()
    forward = triton_kernels("norm_rope_tile").forward
    made: tuple[Tensor, Tensor, Tensor] = forward(x, *rest, tokens, eps, num_features)
    return made


@_norm_rope_tile.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    tokens: Tensor,
    eps: float,
    num_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, batch, heads, head_dim = x.shape
    slots = x.new_empty(batch, heads, tokens.numel(), head_dim)
    mean = x.new_empty(batch, heads, tokens.numel() // BLOCK, head_dim)
    lines = num_tokens if weight is not None else 0
    return slots, mean, x.new_empty(lines, batch, dtype=torch.float32)


@torch.library.custom_op("megagen::norm_rope_tile_pool_backward", mutates_args=())
def _norm_rope_tile_backward(
    dslots: Tensor,
    dmean: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    rstd: Tensor,
    tokens: Tensor,
    num_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (None if t is None else t.contiguous() for t in (weight, cos, sin, squares))
    x = x if x.stride(-1) == 1 else x.contiguous()
    dx, dweight, dsquares = triton_kernels("norm_rope_tile").backward(
        dslots.contiguous(), dmean.contiguous(), x, *rest, rstd, tokens, num_features
    )
    none = x.new_empty(0), x.new_empty(0)
    given = (dweight, dsquares)
    dweight, dsquares = (a if a is not None else b for a, b in zip(given, none, strict=True))
    return dx, dweight, dsquares


@_norm_rope_tile_backward.register_fake
def _(
    dslots: Tensor,
    dmean: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    rstd: Tensor,
    tokens: Tensor,
    num_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else t.new_empty(t.shape)

    return x.new_empty(x.shape), like(weight), like(None if weight is None else squares)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, cos, sin, squares, tokens, _, ctx.num_features = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, weight, cos, sin, squares, output[2], tokens)


def _backward(ctx: Any, dslots: Tensor, dmean: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    dx, dweight, dsquares = _norm_rope_tile_backward(dslots, dmean, *given, ctx.num_features)
    dweight_or_none = None if given[1] is None else dweight
    dsquares_or_none = None if given[1] is None or given[4] is None else dsquares
    return dx, dweight_or_none, None, None, dsquares_or_none, None, None, None


_norm_rope_tile.register_autograd(_backward, setup_context=_save)


def _make(case: Case, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    layout = VSALayout((case["T"], case["H"], case["W"]), prefix=case["prefix"])
    sizes = {"S": layout.num_tokens, "rope": 1, **case}
    made = NORM_ROPE.make(sizes, generator, dtype)
    if not case["norm"]:
        made |= {"weight": None, "cos": None, "sin": None}
    return {**made, "layout": layout}


SPEC = Spec(
    name="norm_rope_tile_pool",
    function=norm_rope_tile_pool,
    reference=norm_rope_tile_pool_reference,
    make=_make,
    differentiable=("x_SBNK", "weight", "sum_squares_SB1"),
    cases=(
        {"T": 5, "H": 6, "W": 7, "prefix": 0, "B": 2, "N": 3, "K": 24, "norm": 1, "reduced": 0},
        {"T": 4, "H": 4, "W": 9, "prefix": 7, "B": 1, "N": 2, "K": 64, "norm": 1, "reduced": 1},
        {"T": 2, "H": 5, "W": 4, "prefix": 0, "B": 1, "N": 2, "K": 16, "norm": 0, "reduced": 0},
    ),
    bench_case={
        **{"T": 21, "H": 30, "W": 52, "prefix": 0},
        **{"B": 1, "N": 12, "K": 128, "norm": 1, "reduced": 0},
    },
    bytes=lambda case, size: (
        2 * case["T"] * case["H"] * case["W"] * case["B"] * case["N"] * case["K"] * size
    ),
)
