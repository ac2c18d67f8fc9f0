"""Bias and tanh-GELU, and the backward with the bias's gradient.

    gelu(u) = u s,   s = sigmoid(2 c (u + a u^3)),   gelu'(u) = s + u s (1 - s) 2 c (1 + 3 a u^2)

with c = sqrt(2 / pi), a = 0.044715: ``(1 + tanh(z)) / 2`` is ``sigmoid(2 z)``, which loses no
digits where it is small.

Legend: L lines (tokens, samples), F ffn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.triton.launch import on_device_of
from megagen.kernels.triton.segments import SEGMENT, cut, sums_at

_LINES, _COLUMNS = 8, 512


@triton.jit
def sigmoid_part(u):
    """``s`` of the formula above; 2 c = 1.5957691..."""
    return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (u + 0.044715 * u * u * u)))


@triton.jit
def tile_of(X, BIAS, line, columns, num_lines, dim):
    """Places, mask and ``u = x + bias`` in fp32 of lines from ``line`` on."""
    mask = (line < num_lines)[:, None] & (columns < dim)[None, :]
    at = line.to(tl.int64)[:, None] * dim + columns[None, :]
    u = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + columns, mask=columns < dim, other=0.0).to(tl.float32)
        u += bias[None, :]
    return at, mask, u


@triton.jit
def forward_kernel(X, BIAS, Y, num_lines, dim, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, mask, u = tile_of(X, BIAS, line, columns, num_lines, dim)
    tl.store(Y + at, (u * sigmoid_part(u)).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    DY,
    X,
    BIAS,
    DX,
    DBIAS,
    MORE_BIAS,
    num_lines,
    dim,
    SIZE: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum(program * SIZE + SIZE, num_lines)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in tl.range(program * SIZE, end, LINES, num_stages=STAGES):
        line = begin + tl.arange(0, LINES)
        at, mask, u = tile_of(X, BIAS, line, columns, num_lines, dim)
        s = sigmoid_part(u)
        slope = s + u * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * u * u))
        dx = slope * tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
        if BIAS is not None:
            total += tl.sum(dx, 0)
    if BIAS is not None:
        to = sums_at(DBIAS, MORE_BIAS, program, program * 0, 1, 0, 1, dim)
        tl.store(to + columns, total, mask=columns < dim)


def forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """``gelu(x + bias)`` of ``[..., F]``, bias ``[F]`` or None."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y, dim = torch.empty_like(x), x.shape[-1]
    if x.numel():
        num_lines = x.numel() // dim
        with on_device_of(x):
            forward_kernel[(triton.cdiv(num_lines, _LINES), triton.cdiv(dim, _COLUMNS))](
                x, bias, y, num_lines, dim, LINES=_LINES, COLUMNS=_COLUMNS, num_warps=8
            )
    return y


def backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and bias."""
    dy, x, bias = dy.contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    dx, dim = torch.empty_like(x), x.shape[-1]
    num_lines = x.numel() // max(dim, 1)
    segments = cut(num_lines, 1, 1, 1, None)
    dbias, more = segments.buffers(x, dim)
    if x.numel():
        programs = segments.num_rows + segments.num_more
        with on_device_of(x):
            backward_kernel[(programs, triton.cdiv(dim, _COLUMNS))](
                *(dy, x, bias, dx, dbias, more, num_lines, dim),
                SIZE=SEGMENT,
                LINES=_LINES,
                COLUMNS=_COLUMNS,
                STAGES=3,
                num_warps=8,
            )
            if bias is not None:
                segments.finish((dbias, more))
    else:
        dbias.zero_()
    return dx, None if bias is None else dbias.view(dim).to(bias.dtype)
