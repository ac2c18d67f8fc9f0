"""Modulation rows as the kernels want them.

Legend: S tokens, B batch, R modulation rows, D model. A modulation tensor is ``[R, B or 1, D]``:
one row for all tokens, or one a frame or a token. ``rows_S`` (int64, 0..R-1) says which token uses
which row; without it the tokens are R equal runs, one row each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagen.kernels.backend import address, cpu


def check_rows(x_SBD: Tensor, rows_S: Tensor | None, **modulations: Tensor) -> None:
    """Raise ``ValueError`` where shapes do not fit together."""
    if x_SBD.dim() != 3:
        raise ValueError(f"x must be [S, B, D], found {tuple(x_SBD.shape)}")
    num_tokens, batch, dim = x_SBD.shape
    first: Tensor | None = None
    for name, value in modulations.items():
        ok = value.dim() == 3 and value.shape[1] in (1, batch) and value.shape[2] == dim
        if not ok or (first is not None and value.shape != first.shape):
            raise ValueError(
                f"{name} must be [R, {batch} or 1, {dim}] like the others, "
                f"found {tuple(value.shape)}"
            )
        if rows_S is None and (value.shape[0] == 0 or num_tokens % value.shape[0]):
            raise ValueError(f"{value.shape[0]} rows of {name} do not divide {num_tokens} tokens")
        first = value
    if rows_S is not None and (rows_S.shape != (num_tokens,) or rows_S.dtype != torch.int64):
        raise ValueError(
            f"rows_S must be int64 [{num_tokens}], found {rows_S.dtype} {tuple(rows_S.shape)}"
        )


def per_token(modulation_RBD: Tensor, rows_S: Tensor | None, num_tokens: int) -> Tensor:
    """``[S or 1, B or 1, D]``: each token's row."""
    if rows_S is not None:
        return modulation_RBD.index_select(0, rows_S)
    rows = modulation_RBD.shape[0]
    return modulation_RBD if rows == 1 else modulation_RBD.repeat_interleave(num_tokens // rows, 0)


def lines(modulation_RBD: Tensor) -> Tensor:
    """The same with D contiguous; the other axes may have any stride."""
    return modulation_RBD if modulation_RBD.stride(-1) == 1 else modulation_RBD.contiguous()


def strides(modulation_RBD: Tensor | None) -> tuple[int, int]:
    """Row stride and batch stride, each 0 where one serves all; zeros for None."""
    if modulation_RBD is None:
        return 0, 0
    rows, batch, _ = modulation_RBD.shape
    row_stride, batch_stride, _ = modulation_RBD.stride()
    return row_stride if rows > 1 else 0, batch_stride if batch > 1 else 0


def strided(modulation_RBD: Tensor) -> tuple[int, int, int]:
    """Address and strides, for the extension."""
    return modulation_RBD.data_ptr(), *strides(modulation_RBD)


def describe(
    x_SBD: Tensor, modulation_RBD: Tensor, rows_S: Tensor | None
) -> tuple[Any, int, tuple[Tensor | None, ...]]:
    """The extension's ``Rows``, its number of segments, and tensors that must outlive the call."""
    num_tokens, batch, dim = x_SBD.shape
    num_rows, mod_batch, _ = modulation_RBD.shape
    bounds = None
    if rows_S is None:
        count = num_rows * -(-(num_tokens // num_rows) // cpu().SEGMENT)
    else:
        rows_S = rows_S.contiguous()
        bounds = torch.empty(num_tokens + 1, dtype=torch.int64)
        count = cpu().cut_segments(rows_S.data_ptr(), num_tokens, num_rows, bounds.data_ptr())
        if count < 0:
            raise IndexError(f"rows_S must lie in 0..{num_rows - 1}")
    described = cpu().Rows(
        num_tokens, batch, dim, num_rows, mod_batch, address(rows_S), address(bounds), count
    )
    return described, count, (rows_S, bounds)
