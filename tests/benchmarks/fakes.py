"""Stand-ins for packages that are not here: the documented interface over the definition."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megagen.kernels.vsa import (
    BLOCK,
    BlockIndex,
    Lists,
    block_mean,
    block_sparse_attention,
    map_from_index,
    select_topk,
)
from megagen.kernels.vsa.backends import reference


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Puts a module where an import finds it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
    for key, value in members.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def fastvideo_operator(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, num: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """``q2k_idx [B, H, n, M]``, ``q2k_num``, ``variable_block_sizes``."""
    assert idx.dtype == num.dtype == sizes.dtype == torch.int32
    return block_sparse_attention(q, k, v, BlockIndex(idx, num), sizes, sizes)


def fused_block_mean(x: Tensor, sizes: Tensor, volume: int) -> Tensor:
    assert volume == BLOCK
    return block_mean(x.contiguous(), sizes)


def fused_topk_mask(scores: Tensor, topk: int) -> Tensor:
    sizes = torch.ones(scores.size(-1), dtype=torch.int32)
    return map_from_index(select_topk(scores, sizes, topk), scores.size(-1))


def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    q_variable_block_sizes: Tensor,
    topk: int,
    block_size: int | tuple[int, int, int] = 64,
    compress_attn_weight: Tensor | None = None,
) -> Tensor:
    """``[B, H, P, D]``; an int block size would be cubed."""
    assert block_size == (4, 4, 4)
    sizes = variable_block_sizes
    qm, km, vm = (block_mean(x, sizes) for x in (q, k, v))
    scores = qm @ km.mT / q.size(-1) ** 0.5
    coarse = (scores.softmax(-1) @ vm).repeat_interleave(BLOCK, 2)
    fine, _ = block_sparse_attention(q, k, v, select_topk(scores, sizes, topk), sizes, sizes)
    return fine + (coarse if compress_attn_weight is None else coarse * compress_attn_weight)


@dataclass
class Pair:
    """cuDNN's results, which unpack in order."""

    values: tuple[Tensor, ...]

    def __iter__(self) -> Any:
        return iter(self.values)


def bsa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_block_index: Tensor,
    block_sparse_num: int | None = None,
    block_sizes: Tensor | None = None,
    *,
    sparse_block_size: int | None = None,
) -> Pair:
    assert sparse_block_size == BLOCK and block_sizes is not None
    lists = _lists(q2k_block_index, block_sparse_num, block_sizes)
    return Pair(reference.fine_forward(q, k, v, lists, q.size(-1) ** -0.5))


def bsa_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    q2k_block_index: Tensor,
    block_sparse_num: int | None = None,
    block_sizes: Tensor | None = None,
    *,
    sparse_block_size: int | None = None,
) -> Pair:
    assert sparse_block_size == BLOCK and block_sizes is not None
    lists = _lists(q2k_block_index, block_sparse_num, block_sizes)
    scale = q.size(-1) ** -0.5
    return Pair(reference.fine_backward(do, None, q, k, v, o, lse, lists, scale))


def _lists(idx: Tensor, count: int | None, sizes: Tensor) -> Lists:
    assert count == idx.size(-1)
    return Lists(idx, torch.full_like(idx[..., 0], count), sizes, sizes)


BSA = SimpleNamespace(
    block_sparse_attention_forward=bsa_forward, block_sparse_attention_backward=bsa_backward
)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    """``[B, S, H, D]``; the LSE beside it, as some versions do."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2), None
