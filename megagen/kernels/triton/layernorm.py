"""LayerNorm with modulation or affine, alone or behind a gated residual, and its backward.

    o = x + gate * y,   h = LN(o) * (ONE + scale) + shift

One kernel each way serves both operations: without ``y`` it reads and writes one tensor, with it
two and two. The backward goes segment by segment (see ``segments``), so that sums over tokens are
made where the tensors are read anyhow. Of the forward it needs ``o``, its mean and 1 / deviation.

Legend: S tokens, B batch, R modulation rows, Bm samples of the modulation (B or 1), D model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.rows import lines, strides
from megagen.kernels.triton import residual
from megagen.kernels.triton.launch import block_of, on_device_of, warps_of
from megagen.kernels.triton.segments import (
    SEGMENT,
    cut_rows,
    modulation,
    segment,
    sums_at,
    token_of,
)

_LARGEST = 4096
"""Lanes for which registers hold all three sums of the backward; beyond, it takes two kernels."""


@triton.jit
def forward_kernel(
    X,
    Y,
    GATE,
    SCALE,
    SHIFT,
    ROWS,
    OUT,
    H,
    MEAN,
    RSTD,
    batch,
    dim,
    run,
    num_rows,
    gate_row,
    gate_batch,
    scale_row,
    scale_batch,
    shift_row,
    shift_batch,
    eps,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    token, lane = line // batch, line % batch
    row = token // run if ROWS is None else tl.load(ROWS + token)
    columns = tl.arange(0, BLOCK)
    keep = columns < dim
    known = keep & (row >= 0) & (row < num_rows)
    at = line * dim + columns
    x = tl.load(X + at, mask=keep, other=0.0).to(tl.float32)
    if Y is not None:
        y = tl.load(Y + at, mask=keep, other=0.0).to(tl.float32)
        if GATE is not None:
            y = y * modulation(GATE, row, gate_row, lane, gate_batch, columns, known)
        out = (x + y).to(OUT.dtype.element_ty)
        tl.store(OUT + at, out, mask=keep)
        x = tl.where(keep, out.to(tl.float32), 0.0)  # the norm sees the stream as it is kept
    mean = tl.sum(x, 0) / dim
    centred = tl.where(keep, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / dim + eps)
    scale = modulation(SCALE, row, scale_row, lane, scale_batch, columns, known)
    shift = modulation(SHIFT, row, shift_row, lane, shift_batch, columns, known)
    h = centred * rstd * (ONE + scale) + shift
    tl.store(H + at, h.to(H.dtype.element_ty), mask=keep)
    tl.store(MEAN + line, mean)
    tl.store(RSTD + line, rstd)


@triton.jit
def backward_kernel(
    DH,
    DOUT,
    X,
    Y,
    GATE,
    SCALE,
    MEAN,
    RSTD,
    DX,
    DY,
    DGATE,
    MORE_GATE,
    DSCALE,
    MORE_SCALE,
    DSHIFT,
    MORE_SHIFT,
    ORDER,
    OFFSETS,
    MORE_ROW,
    MORE_BEGIN,
    num_rows,
    run,
    lanes,
    per_row,
    batch,
    mod_batch,
    dim,
    gate_row,
    gate_batch,
    scale_row,
    scale_batch,
    ONE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, mod_lane = tl.program_id(0), tl.program_id(1)
    row, begin, end = segment(
        program, OFFSETS, MORE_ROW, MORE_BEGIN, num_rows, run, lanes, per_row, SIZE
    )
    columns = tl.arange(0, BLOCK)
    keep = columns < dim
    wide = row.to(tl.int64)
    slope = ONE + modulation(SCALE, wide, scale_row, mod_lane, scale_batch, columns, keep)
    if GATE is not None:
        gate = modulation(GATE, wide, gate_row, mod_lane, gate_batch, columns, keep)
        dgate = tl.zeros([BLOCK], tl.float32)
    dscale = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    for number in tl.range(begin, end, num_stages=STAGES):
        token = token_of(number, row, ORDER, OFFSETS, run, lanes).to(tl.int64)
        line = token * batch + mod_lane + number % lanes
        at = line * dim + columns
        rstd = tl.load(RSTD + line)
        x = tl.load(X + at, mask=keep, other=0.0).to(tl.float32)
        normed = tl.where(keep, (x - tl.load(MEAN + line)) * rstd, 0.0)
        dh = tl.load(DH + at, mask=keep, other=0.0).to(tl.float32)
        dscale += dh * normed
        dshift += dh
        dnormed = tl.where(keep, dh * slope, 0.0)
        along = tl.sum(dnormed * normed, 0) / dim
        dx = rstd * (dnormed - tl.sum(dnormed, 0) / dim - normed * along)
        if DOUT is not None:
            dx += tl.load(DOUT + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=keep)
        if GATE is not None:
            dgate += dx * tl.load(Y + at, mask=keep, other=0.0).to(tl.float32)
            tl.store(DY + at, (dx * gate).to(DY.dtype.element_ty), mask=keep)
    if GATE is not None:
        to = sums_at(DGATE, MORE_GATE, program, row, num_rows, mod_lane, mod_batch, dim)
        tl.store(to + columns, dgate, mask=keep)
    to = sums_at(DSCALE, MORE_SCALE, program, row, num_rows, mod_lane, mod_batch, dim)
    tl.store(to + columns, dscale, mask=keep)
    to = sums_at(DSHIFT, MORE_SHIFT, program, row, num_rows, mod_lane, mod_batch, dim)
    tl.store(to + columns, dshift, mask=keep)


def forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    rows: Tensor | None,
    eps: float,
    one: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``o`` (``x`` without ``y``), ``h``, and mean and 1 / deviation of ``o``, ``[S, B]`` fp32.

    Args:
        x, y: ``[S, B, D]``; y is None where there is no residual.
        gate: ``[R, Bm, D]``; None: 1.
        scale, shift: like ``gate``.
        rows: int64 ``[S]``, contiguous; None: R equal runs. A row that does not exist gives NaN.
        eps: added to the variance.
        one: 1 for a modulation, 0 for an affine.
    """
    x, scale, shift = x.contiguous(), lines(scale), lines(shift)
    y = None if y is None else y.contiguous()
    gate = None if gate is None else lines(gate)
    rows = None if rows is None else rows.contiguous()
    num_tokens, batch, dim = x.shape
    out, h = x if y is None else torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    block = block_of(dim)
    if x.numel():
        with on_device_of(x):
            forward_kernel[(num_tokens * batch,)](
                *(x, y, gate, scale, shift, rows, out, h, mean, rstd),
                *(batch, dim, num_tokens // len(scale), len(scale)),
                *(*strides(gate), *strides(scale), *strides(shift)),
                eps,
                ONE=one,
                BLOCK=block,
                num_warps=warps_of(block, 16),
            )
    return out, h, mean, rstd


def backward(
    dh: Tensor,
    dout: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: Tensor | None,
    one: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients of x, y, gate, scale and shift; those of y and gate are None without a gate.

    Args:
        dh: of ``h``.
        dout: of ``o``; None: 0.
        x: ``o``.
        y, gate, scale, rows, one: as in the forward; without a gate y need not be given, for its
            gradient is that of x.
        mean, rstd: from the forward.
    """
    block = block_of(x.shape[-1])
    if gate is not None and block > _LARGEST:
        assert y is not None
        dx, _, _, dscale, dshift = backward(dh, dout, x, None, None, scale, mean, rstd, rows, one)
        return dx, *residual.backward(dx, y, gate, rows), dscale, dshift
    dh, x, scale = dh.contiguous(), x.contiguous(), lines(scale)
    dout, y = (None if t is None else t.contiguous() for t in (dout, y))
    gate = None if gate is None else lines(gate)
    batch, dim = x.shape[1:]
    segments = cut_rows(x, scale, rows)
    dx, dy = torch.empty_like(x), None if gate is None or y is None else torch.empty_like(y)
    sums = [segments.buffers(x, dim) for _ in range(2 if gate is None else 3)]
    with on_device_of(x):
        backward_kernel[segments.grid()](
            *(dh, dout, x, None if gate is None else y, gate, scale, mean, rstd, dx, dy),
            *((None, None) if gate is None else sums[2]),
            *(*sums[0], *sums[1]),
            *segments.arguments(),
            *(batch, segments.mod_batch, dim, *strides(gate), *strides(scale)),
            ONE=one,
            SIZE=SEGMENT,
            BLOCK=block,
            STAGES=3 if block <= 4096 else 2,
            num_warps=warps_of(block, 8),
        )
        segments.finish(*sums)
    totals = [first.to(scale.dtype) for first, _ in sums[:2]]
    dgate = None if gate is None else sums[2][0].to(gate.dtype)
    return dx, dy, dgate, totals[0], totals[1]
