"""Gated residual ``out = x + gate * y`` and its backward, with the sums of the gate's gradient.

Legend: S tokens, B batch, R modulation rows, Bm samples of the modulation (B or 1), D model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.rows import lines, strides
from megagen.kernels.triton.launch import block_of, on_device_of, warps_of
from megagen.kernels.triton.segments import (
    SEGMENT,
    cut_rows,
    modulation,
    segment,
    sums_at,
    token_of,
)


@triton.jit
def forward_kernel(
    X,
    Y,
    GATE,
    ROWS,
    OUT,
    batch,
    dim,
    run,
    num_rows,
    gate_row,
    gate_batch,
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
    y = tl.load(Y + at, mask=keep, other=0.0).to(tl.float32)
    out = x + modulation(GATE, row, gate_row, lane, gate_batch, columns, known) * y
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=keep)


@triton.jit
def backward_kernel(
    DOUT,
    Y,
    GATE,
    DY,
    DGATE,
    MORE_GATE,
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
    gate = modulation(GATE, wide, gate_row, mod_lane, gate_batch, columns, keep)
    dgate = tl.zeros([BLOCK], tl.float32)
    for number in tl.range(begin, end, num_stages=STAGES):
        token = token_of(number, row, ORDER, OFFSETS, run, lanes).to(tl.int64)
        at = (token * batch + mod_lane + number % lanes) * dim + columns
        dout = tl.load(DOUT + at, mask=keep, other=0.0).to(tl.float32)
        dgate += dout * tl.load(Y + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(DY + at, (dout * gate).to(DY.dtype.element_ty), mask=keep)
    to = sums_at(DGATE, MORE_GATE, program, row, num_rows, mod_lane, mod_batch, dim)
    tl.store(to + columns, dgate, mask=keep)


def forward(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
    """``x + gate * y`` of ``[S, B, D]``; gate ``[R, Bm, D]``, rows int64 ``[S]`` or None."""
    x, y, gate = x.contiguous(), y.contiguous(), lines(gate)
    rows = None if rows is None else rows.contiguous()
    num_tokens, batch, dim = x.shape
    out, block = torch.empty_like(x), block_of(dim)
    if x.numel():
        with on_device_of(x):
            forward_kernel[(num_tokens * batch,)](
                *(x, y, gate, rows, out, batch, dim, num_tokens // len(gate), len(gate)),
                *strides(gate),
                BLOCK=block,
                num_warps=warps_of(block, 16),
            )
    return out


def backward(dout: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate; that of x is ``dout``."""
    dout, y, gate = dout.contiguous(), y.contiguous(), lines(gate)
    batch, dim = y.shape[1:]
    segments = cut_rows(y, gate, rows)
    dy, dgate, block = torch.empty_like(y), segments.buffers(y, dim), block_of(dim)
    with on_device_of(y):
        backward_kernel[segments.grid()](
            *(dout, y, gate, dy, *dgate, *segments.arguments()),
            *(batch, segments.mod_batch, dim, *strides(gate)),
            SIZE=SEGMENT,
            BLOCK=block,
            STAGES=3,
            num_warps=warps_of(block, 8),
        )
        segments.finish(dgate)
    return dy, dgate[0].to(gate.dtype)
