"""RMSNorm over all heads, then RoPE on interleaved pairs, and the backward; sums of squares for TP.

    n = x * weight * rstd,   rstd = 1 / sqrt(sum(x^2) / num_features + eps)
    y[2h] = n[2h] cos[h] - n[2h+1] sin[h],   y[2h+1] = n[2h] sin[h] + n[2h+1] cos[h]

A program holds all features of one (token, sample) as one line of N * K numbers; ``x`` may be a
view into a fused projection and ``dy`` a permuted tensor, as long as head dims lie side by side.

Legend: S tokens, B batch, N heads, K head size, H = K / 2 pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.triton.launch import block_of, on_device_of, warps_of
from megagen.kernels.triton.segments import SEGMENT, cut, sums_at


@triton.jit
def features_of(token, lane, token_stride, batch_stride, head_stride, features, K: tl.constexpr):
    """Places of a line's features in a tensor ``[S, B, N, K]``; ``token`` is int64."""
    base = token * token_stride + lane * batch_stride
    return base + (features // K) * head_stride + features % K


@triton.jit
def rotate(x, cos, sin, BLOCK: tl.constexpr):
    """Pairs turned by their angles; with ``-sin`` back again."""
    even, odd = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK])


@triton.jit
def angles(COS, SIN, token, K: tl.constexpr, BLOCK: tl.constexpr):
    """Cosine and sine of every pair of a line."""
    at = token * (K // 2) + tl.arange(0, BLOCK // 2) % (K // 2)
    return tl.load(COS + at).to(tl.float32), tl.load(SIN + at).to(tl.float32)


@triton.jit
def forward_kernel(
    X,
    WEIGHT,
    COS,
    SIN,
    SQUARES,
    Y,
    RSTD,
    batch,
    dim,
    token_stride,
    batch_stride,
    head_stride,
    num_features,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    token, lane = line // batch, line % batch
    features = tl.arange(0, BLOCK)
    keep = features < dim
    at = features_of(token, lane, token_stride, batch_stride, head_stride, features, K)
    x = tl.load(X + at, mask=keep, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, 0) if SQUARES is None else tl.load(SQUARES + line).to(tl.float32)
    rstd = 1.0 / tl.sqrt(squares / num_features + eps)
    y = x * rstd * tl.load(WEIGHT + features, mask=keep, other=0.0).to(tl.float32)
    if COS is not None:
        cos, sin = angles(COS, SIN, token, K, BLOCK)
        y = rotate(y, cos, sin, BLOCK)
    tl.store(Y + line * dim + features, y.to(Y.dtype.element_ty), mask=keep)
    tl.store(RSTD + line, rstd)


@triton.jit
def backward_kernel(
    DY,
    X,
    WEIGHT,
    COS,
    SIN,
    RSTD,
    DX,
    DSQUARES,
    DWEIGHT,
    MORE_WEIGHT,
    num_lines,
    batch,
    dim,
    token_stride,
    batch_stride,
    head_stride,
    dy_token_stride,
    dy_batch_stride,
    dy_head_stride,
    num_features,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    features = tl.arange(0, BLOCK)
    keep = features < dim
    weight = tl.load(WEIGHT + features, mask=keep, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    end = tl.minimum(program * SIZE + SIZE, num_lines)
    for number in tl.range(program * SIZE, end, num_stages=STAGES):
        token, lane = (number // batch).to(tl.int64), number % batch
        at = features_of(token, lane, token_stride, batch_stride, head_stride, features, K)
        x = tl.load(X + at, mask=keep, other=0.0).to(tl.float32)
        at = features_of(token, lane, dy_token_stride, dy_batch_stride, dy_head_stride, features, K)
        dy = tl.load(DY + at, mask=keep, other=0.0).to(tl.float32)
        if COS is not None:
            cos, sin = angles(COS, SIN, token, K, BLOCK)
            dy = rotate(dy, cos, -sin, BLOCK)
        rstd = tl.load(RSTD + number)
        dweight += dy * x * rstd
        dn = dy * weight
        along = -rstd * rstd * rstd / num_features * tl.sum(dn * x, 0)  # 2 d / d squares
        dx = dn * rstd
        if DSQUARES is None:
            dx += x * along
        else:
            tl.store(DSQUARES + number, (0.5 * along).to(DSQUARES.dtype.element_ty))
        to = (token * batch + lane) * dim + features
        tl.store(DX + to, dx.to(DX.dtype.element_ty), mask=keep)
    to = sums_at(DWEIGHT, MORE_WEIGHT, program, program * 0, 1, 0, 1, dim)
    tl.store(to + features, dweight, mask=keep)


@triton.jit
def squares_kernel(
    X,
    TOTAL,
    batch,
    dim,
    token_stride,
    batch_stride,
    head_stride,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, BLOCK)
    at = features_of(
        line // batch, line % batch, token_stride, batch_stride, head_stride, features, K
    )
    x = tl.load(X + at, mask=features < dim, other=0.0).to(tl.float32)
    tl.store(TOTAL + line, tl.sum(x * x, 0))


def forward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    eps: float,
    num_features: int,
) -> tuple[Tensor, Tensor]:
    """``y`` like x, contiguous, and ``rstd`` ``[S, B]`` fp32.

    Args:
        x: ``[S, B, N, K]``, the last axis contiguous.
        weight: ``[N, K]``, contiguous, as are all that follow.
        cos, sin: ``[S, H]``, or both None.
        squares: ``[S, B, 1]``; None: of this x.
        eps: added to the mean square.
        num_features: of all ranks.
    """
    num_tokens, batch, heads, head_dim = x.shape
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)
    block = block_of(heads * head_dim)
    if x.numel():
        with on_device_of(x):
            forward_kernel[(num_tokens * batch,)](
                *(x, weight, cos, sin, squares, y, rstd, batch, heads * head_dim),
                *(*x.stride()[:3], num_features, eps),
                K=head_dim,
                BLOCK=block,
                num_warps=warps_of(block, 16),
            )
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    squares: Tensor | None,
    rstd: Tensor,
    num_features: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and squares; arguments as in the forward, ``dy`` like ``x``."""
    num_tokens, batch, heads, head_dim = x.shape
    num_lines, dim = num_tokens * batch, heads * head_dim
    segments = cut(num_lines, 1, 1, 1, None)
    dx, dweight, block = x.new_empty(x.shape), segments.buffers(x, dim), block_of(dim)
    dsquares = None if squares is None else squares.new_empty(squares.shape)
    with on_device_of(x):
        backward_kernel[(1 + segments.num_more,)](
            *(dy, x, weight, cos, sin, rstd, dx, dsquares, *dweight),
            *(num_lines, batch, dim, *x.stride()[:3], *dy.stride()[:3], num_features),
            K=head_dim,
            SIZE=SEGMENT,
            BLOCK=block,
            STAGES=3 if block <= 4096 else 2,
            num_warps=warps_of(block, 8),
        )
        segments.finish(dweight)
    return dx, dweight[0].view(heads, head_dim).to(weight.dtype), dsquares


def sum_squares(x: Tensor) -> Tensor:
    """Sum of squares over heads and head dims, ``[S, B, 1]`` fp32."""
    num_tokens, batch, heads, head_dim = x.shape
    total = x.new_empty(num_tokens, batch, 1, dtype=torch.float32)
    block = block_of(heads * head_dim)
    if x.numel():
        with on_device_of(x):
            squares_kernel[(num_tokens * batch,)](
                *(x, total, batch, heads * head_dim, *x.stride()[:3]),
                K=head_dim,
                BLOCK=block,
                num_warps=warps_of(block, 16),
            )
    return total
