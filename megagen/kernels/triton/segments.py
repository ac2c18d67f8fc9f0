"""Sums over the tokens of each modulation row in two stages, without atomics: always the same bits.

The lines of a row (its tokens, times the samples that share it) are cut into segments of
``SEGMENT``. One program walks a segment: the first of a row writes its sums straight to where the
result belongs, each further one to a line of its own in ``more``; ``add_more`` adds those in order.
So one token a row costs no temporary memory, and one row for all tokens is summed in parallel.
The cut depends on shapes alone, never on the GPU, and nothing waits for the device.

Legend: S tokens, B batch, R modulation rows, Bm samples of the modulation (B or 1), D columns, E
further segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 64
"""Lines of a segment: sums cost 1/64 of the traffic, and 32,768 lines still fill a GPU."""

_COLUMNS, _LINES = 128, 32


@dataclass(frozen=True)
class Segments:
    """How lines are cut; the tensors are None where rows are equal runs of tokens.

    Attributes:
        num_rows: R.
        mod_batch: Bm.
        lanes: samples that share a row: B where Bm is 1, else 1.
        run: tokens of a row (equal runs).
        per_row: further segments of a row (equal runs).
        num_more: E, further segments of all rows; an upper bound where rows are given.
        order_S: tokens, row by row.
        offsets: int64 ``[R + 1]``, where each row begins in ``order_S``.
        more_row_E: the row of each further segment.
        more_begin: int64 ``[R + 1]``, the first further segment of each row.
    """

    num_rows: int
    mod_batch: int
    lanes: int
    run: int
    per_row: int
    num_more: int
    order_S: Tensor | None = None
    offsets: Tensor | None = None
    more_row_E: Tensor | None = None
    more_begin: Tensor | None = None

    def grid(self) -> tuple[int, int]:
        """Programs: first and further segments, times the samples of the modulation."""
        return self.num_rows + self.num_more, self.mod_batch

    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """What ``segment`` and ``token_of`` take, in order."""
        return (
            *(self.order_S, self.offsets, self.more_row_E, self.more_begin),
            *(self.num_rows, self.run, self.lanes, self.per_row),
        )

    def buffers(self, like: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """fp32 ``[R, Bm, D]`` for the result and ``[E, Bm, D]`` for further segments."""
        sizes = ((rows, self.mod_batch, dim) for rows in (self.num_rows, self.num_more))
        first, more = (like.new_empty(size, dtype=torch.float32) for size in sizes)
        return first, more

    def finish(self, *sums: tuple[Tensor, Tensor]) -> None:
        """Add the further segments to the first ones, for up to three pairs of ``buffers``."""
        if self.num_more == 0:
            return
        dim = sums[0][0].shape[-1]
        pairs = [*sums, *[(None, None)] * (3 - len(sums))]
        add_more[(self.num_more, self.mod_batch, triton.cdiv(dim, _COLUMNS))](
            *(buffer for pair in pairs for buffer in pair),
            *(self.more_row_E, self.more_begin, self.per_row, self.mod_batch, dim),
            COLUMNS=_COLUMNS,
            LINES=_LINES,
            num_warps=4,
        )


def cut_rows(x_SBD: Tensor, modulation_RBD: Tensor, rows_S: Tensor | None) -> Segments:
    """The segments of the lines of ``x``, by the rows of its modulation."""
    num_tokens, batch, _ = x_SBD.shape
    num_rows, mod_batch, _ = modulation_RBD.shape
    return cut(num_tokens, batch, num_rows, mod_batch, rows_S)


def cut(
    num_tokens: int, batch: int, num_rows: int, mod_batch: int, rows_S: Tensor | None
) -> Segments:
    """The segments of ``[S, B]`` lines.

    Args:
        num_tokens: S.
        batch: B.
        num_rows: R.
        mod_batch: Bm.
        rows_S: row of each token, int64; None: R equal runs. A token whose row is not in 0..R-1
            belongs to none.
    """
    lanes = batch if mod_batch == 1 else 1
    if rows_S is None:
        run = num_tokens // num_rows
        per_row = max(run * lanes - 1, 0) // SEGMENT
        return Segments(num_rows, mod_batch, lanes, run, per_row, num_rows * per_row)
    ordered, order = rows_S.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(num_rows + 1, device=rows_S.device))
    more = (offsets.diff() * lanes - 1).clamp_(min=0) // SEGMENT
    begin = torch.nn.functional.pad(more.cumsum(0), (1, 0))
    num_more = num_tokens * lanes // SEGMENT
    numbers = torch.arange(num_more, device=rows_S.device)
    more_row = torch.searchsorted(begin[1:], numbers, right=True).clamp_(max=num_rows - 1)
    tables = (order, offsets, more_row, begin)
    return Segments(num_rows, mod_batch, lanes, 0, 0, num_more, *tables)


@triton.jit
def segment(
    program, OFFSETS, MORE_ROW, MORE_BEGIN, num_rows, run, lanes, per_row, SIZE: tl.constexpr
):
    """Row, first line and one past the last of a program's segment; the lines of a row are 0...

    A program past the last segment gets an empty one.
    """
    is_first = program < num_rows
    number = tl.maximum(program - num_rows, 0)
    if OFFSETS is None:
        shared = tl.maximum(per_row, 1)
        row = tl.where(is_first, program, number // shared)
        place = tl.where(is_first, 0, number % shared + 1)
        count = run * lanes
    else:
        further = tl.load(MORE_ROW + number, mask=program >= num_rows, other=0)
        row = tl.where(is_first, program, further)
        place = tl.where(is_first, 0, number - tl.load(MORE_BEGIN + row) + 1)
        count = (tl.load(OFFSETS + row + 1) - tl.load(OFFSETS + row)) * lanes
    begin = tl.minimum(place * SIZE, count)
    return row, begin, tl.minimum(begin + SIZE, count)


@triton.jit
def token_of(line, row, ORDER, OFFSETS, run, lanes):
    """The token of a row's line."""
    if ORDER is None:
        token = row * run + line // lanes
    else:
        token = tl.load(ORDER + tl.load(OFFSETS + row) + line // lanes)
    return token


@triton.jit
def modulation(POINTER, row, row_stride, lane, batch_stride, columns, mask):
    """A modulation row in fp32; NaN where the mask is off, as it is where no such row exists."""
    at = POINTER + row * row_stride + lane * batch_stride + columns
    return tl.load(at, mask=mask, other=float("nan")).to(tl.float32)


@triton.jit
def sums_at(FIRST, MORE, program, row, num_rows, lane, mod_batch, dim):
    """Where a program puts its sums."""
    first = FIRST + (row.to(tl.int64) * mod_batch + lane) * dim
    number = tl.maximum(program - num_rows, 0).to(tl.int64)
    more = MORE + (number * mod_batch + lane) * dim
    return tl.where(program < num_rows, first, more)


@triton.jit
def _add(FIRST, MORE, row, begin, end, lane, mod_batch, dim, columns, LINES: tl.constexpr):
    keep = columns < dim
    lines = tl.arange(0, LINES)
    at = FIRST + (row.to(tl.int64) * mod_batch + lane) * dim + columns
    total = tl.load(at, mask=keep, other=0.0)
    for base in range(begin, end, LINES):
        number = (base + lines).to(tl.int64)
        places = (number[:, None] * mod_batch + lane) * dim + columns[None, :]
        mask = (number < end)[:, None] & keep[None, :]
        total += tl.sum(tl.load(MORE + places, mask=mask, other=0.0), 0)
    tl.store(at, total, mask=keep)


@triton.jit
def add_more(
    A,
    MORE_A,
    B,
    MORE_B,
    C,
    MORE_C,
    MORE_ROW,
    MORE_BEGIN,
    per_row,
    mod_batch,
    dim,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
):
    """The program at a row's first further segment adds all of them, in order."""
    program = tl.program_id(0)
    lane = tl.program_id(1)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    if MORE_ROW is None:
        row = program // per_row
        begin = row * per_row
        end = begin + per_row
    else:
        row = tl.load(MORE_ROW + program)
        begin = tl.load(MORE_BEGIN + row)
        end = tl.load(MORE_BEGIN + row + 1)
    if program == begin:
        _add(A, MORE_A, row, begin, end, lane, mod_batch, dim, columns, LINES)
        if B is not None:
            _add(B, MORE_B, row, begin, end, lane, mod_batch, dim, columns, LINES)
        if C is not None:
            _add(C, MORE_C, row, begin, end, lane, mod_batch, dim, columns, LINES)
