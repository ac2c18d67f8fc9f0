"""How the extension ``megagen._cpu`` is told of tensors: addresses, types, strides.

Legend: B batch, H heads, D head dim, S tokens in raster order, P slots (64 a block).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megagen.kernels.backend import address, cpu, num_threads
from megagen.kernels.vsa.index import Lists
from megagen.kernels.vsa.layout import BLOCK, Blocks

_HUGE_FROM = 1 << 22
"""Bytes from which huge pages can make a difference."""
NONE = [0, 0, 0, 0, 0, 0]
"""A tensor that is not there."""


def rows_of(x: Tensor) -> Tensor:
    """``x``, its last axis without gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def fresh(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Fresh memory, of huge pages where it is large."""
    x = torch.empty(tuple(shape), dtype=dtype)
    if x.nbytes >= _HUGE_FROM:
        cpu().advise_huge(x.data_ptr(), x.nbytes)
    return x


def fresh_like(x: Tensor) -> Tensor:
    """Likewise."""
    return fresh(x.shape, x.dtype)


def as_blocks(tokens_S: Tensor) -> Blocks:
    """Tokens in blocks of 64, one after the other."""
    count = -(-tokens_S.numel() // BLOCK)
    order = torch.nn.functional.pad(tokens_S, (0, count * BLOCK - tokens_S.numel()), value=-1)
    sizes = (tokens_S.numel() - BLOCK * torch.arange(count)).clamp(max=BLOCK)
    return Blocks(order, sizes.int())


def slots_of(x_BHPD: Tensor, order_P: Tensor | None = None) -> list[int]:
    """Where the extension finds the tokens of a tensor with heads before slots."""
    strides = (x_BHPD.stride(0), x_BHPD.stride(1), x_BHPD.stride(2))
    return [x_BHPD.data_ptr(), x_BHPD.dtype == torch.bfloat16, *strides, address(order_P)]


def raster_of(x_BSHD: Tensor | None, slot_to_raster_P: Tensor) -> list[int]:
    """Likewise of tokens in raster order."""
    if x_BSHD is None:
        return NONE
    strides = (x_BSHD.stride(0), x_BSHD.stride(2), x_BSHD.stride(1))
    is_bf16 = x_BSHD.dtype == torch.bfloat16
    return [x_BSHD.data_ptr(), is_bf16, *strides, slot_to_raster_P.data_ptr()]


def blocks_of(raster_to_slot_S: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Token of each slot (-1: none), and the number of each block's tokens."""
    slot_to_raster = torch.full((num_blocks * BLOCK,), -1, dtype=torch.int64)
    slot_to_raster[raster_to_slot_S] = torch.arange(raster_to_slot_S.numel())
    return slot_to_raster, (slot_to_raster.view(-1, BLOCK) >= 0).sum(1, dtype=torch.int32)


def lists_of(lists: Lists) -> list[int]:
    """Their width and addresses."""
    tensors = (lists.idx_BHqM, lists.num_BHq, lists.q_sizes, lists.kv_sizes)
    return [lists.idx_BHqM.size(-1), *map(address, (*tensors, lists.indptr, lists.rows))]


def threads_for(elements: int) -> int:
    """Threads for attention: far more work for a number than an elementwise operation."""
    return num_threads(elements * 8)
