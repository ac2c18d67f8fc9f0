"""Which key blocks each query block attends to.

Legend: B batch, H heads, q and k query and key blocks, M places of a list, n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockIndex:
    """Lists of key blocks.

    Args:
        idx_BHqM: int32, each row's first ``num`` entries ascending and different, in 0..n_k - 1;
            entries after them are 0.
        num_BHq: int32, 0..M.
    """

    idx_BHqM: Tensor
    num_BHq: Tensor


@dataclass(frozen=True)
class Lists:
    """Lists and block sizes as backends take them, all contiguous int32 on one device.

    Args:
        idx_BHqM: see ``BlockIndex``.
        num_BHq: see ``BlockIndex``.
        q_sizes: ``[n_q]``, real slots of each query block, 0..64, first in the block.
        kv_sizes: ``[n_k]``, of each key block.
        indptr: ``[B, H, n_k + 1]``, of ``transpose_index``; None: whoever needs it makes it.
        rows: ``[B, H, n_q M]``.
    """

    idx_BHqM: Tensor
    num_BHq: Tensor
    q_sizes: Tensor
    kv_sizes: Tensor
    indptr: Tensor | None = None
    rows: Tensor | None = None


def index_from_map(map_BHqk: Tensor) -> BlockIndex:
    """Lists of a bool map; M is n_k, so that no count is read back from the device."""
    num_BHq = map_BHqk.sum(-1, dtype=torch.int32)
    # stable: the chosen blocks keep their order and come first
    order = torch.argsort(map_BHqk, dim=-1, descending=True, stable=True).int()
    return BlockIndex(order * _is_listed(order, num_BHq), num_BHq)


def map_from_index(index: BlockIndex, num_key_blocks: int) -> Tensor:
    """The bool map ``[B, H, n_q, n_k]`` of lists."""
    idx = index.idx_BHqM
    listed = _is_listed(idx, index.num_BHq)
    counts = torch.zeros(*idx.shape[:-1], num_key_blocks, dtype=torch.int32, device=idx.device)
    return counts.scatter_add_(-1, idx.long(), listed.int()) > 0


def transpose_index(index: BlockIndex, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """For each key block the query blocks that list it.

    Returns:
        ``indptr [B, H, n_k + 1]`` and ``rows [B, H, n_q M]``, int32: block j is listed by
        ``rows[indptr[j] : indptr[j + 1]]``, ascending; what follows the last is 0.
    """
    idx, width = index.idx_BHqM, index.idx_BHqM.size(-1)
    listed = _is_listed(idx, index.num_BHq).flatten(-2)
    keys = torch.where(listed, idx.flatten(-2), num_key_blocks)
    order = torch.argsort(keys, dim=-1, stable=True)
    rows = torch.where(listed.gather(-1, order), order // max(width, 1), 0).int()
    counts = torch.zeros(*idx.shape[:2], num_key_blocks + 2, dtype=torch.int64, device=idx.device)
    counts.scatter_add_(-1, keys.long() + 1, torch.ones_like(keys, dtype=torch.int64))
    return counts.cumsum(-1)[..., : num_key_blocks + 1].int(), rows


def _is_listed(idx_BHqM: Tensor, num_BHq: Tensor) -> Tensor:
    places = torch.arange(idx_BHqM.size(-1), device=idx_BHqM.device)
    return places < num_BHq[..., None]
