"""RMSNorm, RoPE, the way into blocks and the blocks' means in one kernel, and the way back.

A program owns a block of 64 slots of one sample. It reads the block's tokens where they lie, head
after head: once for the norm's sum of squares where that is not given, and once more, from L2, for
the result, which goes to ``[B, N, P, K]``. The mean is that of the numbers as they are stored.

Legend: S tokens, B batch, N heads, K head size, H = K / 2 pairs, P slots, n blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.triton.launch import on_device_of
from megagen.kernels.triton.segments import Segments

SLOTS = 64
_WARPS = 8


@triton.jit
def rotate(x, cos, sin, SLOTS: tl.constexpr, LANES: tl.constexpr):
    """Pairs of every slot turned by their angles; with ``-sin`` back again."""
    even, odd = tl.split(tl.reshape(x, [SLOTS, LANES // 2, 2]))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [SLOTS, LANES])


@triton.jit
def angles(ANGLES, token, real, K: tl.constexpr, LANES: tl.constexpr):
    """Cosines or sines of the slots' pairs."""
    pairs = tl.arange(0, LANES // 2)
    mask = real[:, None] & (pairs < K // 2)[None, :]
    return tl.load(ANGLES + token[:, None] * (K // 2) + pairs[None, :], mask=mask, other=0.0)


@triton.jit
def forward_kernel(
    X,
    WEIGHT,
    COS,
    SIN,
    SQUARES,
    TOKENS,
    Y,
    MEAN,
    RSTD,
    batch,
    heads,
    blocks,
    token_stride,
    batch_stride,
    head_stride,
    num_features,
    eps,
    K: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    block, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    lanes = tl.arange(0, LANES)
    token = tl.load(TOKENS + block * SLOTS + slots)
    real = token >= 0
    count = tl.sum(real.to(tl.float32), 0)
    mask = real[:, None] & (lanes < K)[None, :]
    at = X + token[:, None] * token_stride + sample * batch_stride + lanes[None, :]
    if WEIGHT is not None:
        if SQUARES is None:
            squares = tl.zeros([SLOTS], tl.float32)
            for head in range(heads):
                x = tl.load(at + head * head_stride, mask=mask, other=0.0).to(tl.float32)
                squares += tl.sum(x * x, 1)
        else:
            line = token * batch + sample
            squares = tl.load(SQUARES + line, mask=real, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(squares / num_features + eps)
        tl.store(RSTD + token * batch + sample, rstd, mask=real)
    if COS is not None:
        cos = angles(COS, token, real, K, LANES).to(tl.float32)
        sin = angles(SIN, token, real, K, LANES).to(tl.float32)
    for head in range(heads):
        y = tl.load(at + head * head_stride, mask=mask, other=0.0).to(tl.float32)
        if WEIGHT is not None:
            weight = tl.load(WEIGHT + head * K + lanes, mask=lanes < K, other=0.0)
            y = y * rstd[:, None] * weight.to(tl.float32)[None, :]
        if COS is not None:
            y = rotate(y, cos, sin, SLOTS, LANES)
        kept = y.to(Y.dtype.element_ty)
        place = (sample * heads + head) * blocks + block
        to = (place * SLOTS + slots)[:, None] * K + lanes[None, :]
        tl.store(Y + to, kept, mask=(lanes < K)[None, :])
        mean = tl.sum(kept.to(tl.float32), 0) / tl.maximum(count, 1.0)
        tl.store(MEAN + place * K + lanes, mean.to(MEAN.dtype.element_ty), mask=lanes < K)


@triton.jit
def unrotated(
    DY,
    DMEAN,
    COS,
    cos,
    sin,
    place,
    slots,
    lanes,
    count,
    mask,
    K: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The gradient before the rotation: a slot's own, and its part of the mean's."""
    to = (place * SLOTS + slots)[:, None] * K + lanes[None, :]
    dy = tl.load(DY + to, mask=mask, other=0.0).to(tl.float32)
    dmean = tl.load(DMEAN + place * K + lanes, mask=lanes < K, other=0.0).to(tl.float32)
    dy = tl.where(mask, dy + (dmean / tl.maximum(count, 1.0))[None, :], 0.0)
    if COS is not None:
        dy = rotate(dy, cos, -sin, SLOTS, LANES)
    return dy


@triton.jit
def backward_kernel(
    DY,
    DMEAN,
    X,
    WEIGHT,
    COS,
    SIN,
    RSTD,
    TOKENS,
    DX,
    DSQUARES,
    DWEIGHT,
    batch,
    heads,
    blocks,
    token_stride,
    batch_stride,
    head_stride,
    num_features,
    K: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    block, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slots = tl.arange(0, SLOTS)
    lanes = tl.arange(0, LANES)
    token = tl.load(TOKENS + block * SLOTS + slots)
    real = token >= 0
    count = tl.sum(real.to(tl.float32), 0)
    mask = real[:, None] & (lanes < K)[None, :]
    cos = 0.0
    sin = 0.0
    if COS is not None:
        cos = angles(COS, token, real, K, LANES).to(tl.float32)
        sin = angles(SIN, token, real, K, LANES).to(tl.float32)
    line = token * batch + sample
    to = line[:, None] * (heads * K) + lanes[None, :]
    if WEIGHT is None:
        for head in range(heads):
            place = (sample * heads + head) * blocks + block
            dx = unrotated(
                DY, DMEAN, COS, cos, sin, place, slots, lanes, count, mask, K, LANES, SLOTS
            )
            tl.store(DX + to + head * K, dx.to(DX.dtype.element_ty), mask=mask)
    else:
        at = X + token[:, None] * token_stride + sample * batch_stride + lanes[None, :]
        rstd = tl.load(RSTD + line, mask=real, other=0.0)
        along = tl.zeros([SLOTS], tl.float32)
        for head in range(heads):
            place = (sample * heads + head) * blocks + block
            dy = unrotated(
                DY, DMEAN, COS, cos, sin, place, slots, lanes, count, mask, K, LANES, SLOTS
            )
            x = tl.load(at + head * head_stride, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(WEIGHT + head * K + lanes, mask=lanes < K, other=0.0)
            dn = dy * weight.to(tl.float32)[None, :]
            along += tl.sum(dn * x, 1)
            dweight = tl.sum(dy * x * rstd[:, None], 0)
            part = ((block * batch + sample) * heads + head) * K
            tl.store(DWEIGHT + part + lanes, dweight, mask=lanes < K)
            if DSQUARES is not None:
                dx = dn * rstd[:, None]
                tl.store(DX + to + head * K, dx.to(DX.dtype.element_ty), mask=mask)
        along = -rstd * rstd * rstd / num_features * along
        if DSQUARES is not None:
            tl.store(DSQUARES + line, (0.5 * along).to(DSQUARES.dtype.element_ty), mask=real)
        else:
            for head in range(heads):
                place = (sample * heads + head) * blocks + block
                dy = unrotated(
                    DY, DMEAN, COS, cos, sin, place, slots, lanes, count, mask, K, LANES, SLOTS
                )
                x = tl.load(at + head * head_stride, mask=mask, other=0.0).to(tl.float32)
                weight = tl.load(WEIGHT + head * K + lanes, mask=lanes < K, other=0.0)
                dx = dy * weight.to(tl.float32)[None, :] * rstd[:, None] + x * along[:, None]
                tl.store(DX + to + head * K, dx.to(DX.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    tokens_P: Tensor,
    eps: float,
    num_features: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots ``[B, N, P, K]``, block means ``[B, N, n, K]`` and ``rstd`` ``[S, B]`` fp32.

    Args:
        x: ``[S, B, N, K]``, the last axis contiguous.
        weight: ``[N, K]``, contiguous, as are all that follow; None: no norm.
        cos, sin: ``[S, H]``, or both None.
        squares: ``[S, B, 1]``; None: of this x.
        tokens_P: int64, token of each slot, -1 for none.
        eps: added to the mean square.
        num_features: of all ranks.
    """
    num_tokens, batch, heads, head_dim = x.shape
    blocks = tokens_P.numel() // SLOTS
    y = x.new_empty(batch, heads, tokens_P.numel(), head_dim)
    mean = x.new_empty(batch, heads, blocks, head_dim)
    rstd = x.new_empty(num_tokens if weight is not None else 0, batch, dtype=torch.float32)
    with on_device_of(x):
        forward_kernel[(blocks, batch)](
            *(x, weight, cos, sin, squares, tokens_P, y, mean, rstd),
            *(batch, heads, blocks, *x.stride()[:3], num_features, eps),
            K=head_dim,
            LANES=triton.next_power_of_2(head_dim),
            SLOTS=SLOTS,
            num_warps=_WARPS,
        )
    return y, mean, rstd


def backward(
    dy: Tensor,
    dmean: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    rstd: Tensor,
    tokens_P: Tensor,
    num_features: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and squares; ``dy`` and ``dmean`` contiguous."""
    _, batch, heads, head_dim = x.shape
    blocks = tokens_P.numel() // SLOTS
    dx = x.new_empty(x.shape)
    dsquares = None if squares is None else squares.new_empty(squares.shape)
    parts = Segments(1, 1, 1, 0, blocks * batch, blocks * batch)
    dweight, more = parts.buffers(x, heads * head_dim)
    dweight.zero_()
    with on_device_of(x):
        backward_kernel[(blocks, batch)](
            *(dy, dmean, x, weight, cos, sin, rstd, tokens_P, dx, dsquares, more),
            *(batch, heads, blocks, *x.stride()[:3], num_features),
            K=head_dim,
            LANES=triton.next_power_of_2(head_dim),
            SLOTS=SLOTS,
            num_warps=_WARPS,
        )
        if weight is None:
            return dx, None, None
        parts.finish((dweight, more))
    return dx, dweight.view(heads, head_dim).to(weight.dtype), dsquares
