"""Attention of query blocks to the key blocks that their lists name.

Legend: B batch, H heads, Q K query and key slots (64 a block), D head dim, q k blocks, M places of
a list.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megagen.kernels.vsa import dispatch
from megagen.kernels.vsa.index import BlockIndex, Lists
from megagen.kernels.vsa.layout import BLOCK


def block_sparse_attention(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    index: BlockIndex,
    q_sizes: Tensor,
    kv_sizes: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the real tokens of the selected blocks; differentiable.

    Zhang et al. 2025 (arXiv 2505.13389), the fine stage.

    Args:
        q_BHQD: queries, blocks of 64 slots with the real tokens first. Empty slots may hold any
            finite numbers; they change nothing.
        k_BHKD: keys; their number may differ from the queries'.
        v_BHKD: values.
        index: key blocks of each query block, of which there may be none.
        q_sizes: int32 ``[n_q]``, real tokens of each query block, 0..64.
        kv_sizes: int32 ``[n_k]``, of each key block.
        scale: of the scores; None: ``1 / sqrt(D)``.
        backend: ``auto`` | ``cuda`` | ``triton`` | ``cpu`` | ``reference``.
        deterministic: gradients are the same bits in every run; False allows a faster backward
            where a backend has one.

    Returns:
        Output like ``q``, and the natural-log LSE of the scaled scores, ``[B, H, Q]`` fp32 (fp64
        for fp64). Where nothing is attended to, and in empty slots: 0 and -inf.

    Raises:
        ValueError: shapes, types or devices do not fit together, or the backend does not serve
            such tensors.
    """
    _check(q_BHQD, k_BHKD, v_BHKD, index, q_sizes, kv_sizes)
    chosen = dispatch.choose(backend, q_BHQD)
    out, lse = _fine(
        *(x.contiguous() for x in (q_BHQD, k_BHKD, v_BHKD)),
        *(x.contiguous() for x in (index.idx_BHqM, index.num_BHq, q_sizes, kv_sizes)),
        1 / math.sqrt(q_BHQD.size(-1)) if scale is None else scale,
        chosen,
        deterministic,
    )
    return out, lse


def _check(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, q_sizes: Tensor, kv_sizes: Tensor
) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            "q, k and v must be [B, H, slots, D] with one B and H, k and v alike, found "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.size(-1) != k.size(-1) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"head dims and types must agree, found {q.size(-1)} and {k.size(-1)}, "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    num_q, num_k = q_sizes.numel(), kv_sizes.numel()
    if q.size(2) != BLOCK * num_q or k.size(2) != BLOCK * num_k:
        raise ValueError(
            f"{num_q} query and {num_k} key blocks of {BLOCK} slots need {BLOCK * num_q} and "
            f"{BLOCK * num_k} slots, found {q.size(2)} and {k.size(2)}"
        )
    expected = (*q.shape[:2], num_q)
    if index.num_BHq.shape != expected or index.idx_BHqM.shape[:-1] != expected:
        raise ValueError(
            f"the index must be [B, H, n_q(, M)] = {expected}, found "
            f"{tuple(index.idx_BHqM.shape)} and {tuple(index.num_BHq.shape)}"
        )
    small = {"idx": index.idx_BHqM, "num": index.num_BHq, "q_sizes": q_sizes, "kv_sizes": kv_sizes}
    for name, x in small.items():
        if x.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, found {x.dtype}")
    for name, x in {"k": k, "v": v, **small}.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")


@torch.library.custom_op("megagen::vsa_fine", mutates_args=())
def _fine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    num: Tensor,
    q_sizes: Tensor,
    kv_sizes: Tensor,
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    lists = Lists(idx, num, q_sizes, kv_sizes)
    out, lse = dispatch.function(backend, "fine_forward")(q, k, v, lists, scale)
    return out, lse


@_fine.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    num: Tensor,
    q_sizes: Tensor,
    kv_sizes: Tensor,
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=lse_dtype)


@torch.library.custom_op("megagen::vsa_fine_backward", mutates_args=())
def fine_grads(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    idx: Tensor,
    num: Tensor,
    q_sizes: Tensor,
    kv_sizes: Tensor,
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the fine stage: of q, k and v."""
    lists = Lists(idx, num, q_sizes, kv_sizes)
    name = "fine_backward"
    if not deterministic and hasattr(dispatch.backend(backend), "fine_backward_fast"):
        name = "fine_backward_fast"
    dlse = None if dlse is None else dlse.contiguous()
    given = (do.contiguous(), dlse, q, k, v, o, lse, lists, scale)
    dq, dk, dv = dispatch.function(backend, name)(*given)
    return dq, dk, dv


@fine_grads.register_fake
def _(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.backend, ctx.deterministic = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, idx, num, q_sizes, kv_sizes, o, lse = ctx.saved_tensors
    if do is None and dlse is None:
        return (None,) * 10
    do = torch.zeros_like(o) if do is None else do
    tensors = (q, k, v, o, lse, idx, num, q_sizes, kv_sizes)
    grads = fine_grads(do, dlse, *tensors, ctx.scale, ctx.backend, ctx.deterministic)
    return (*grads, *(None,) * 7)


_fine.register_autograd(_backward, setup_context=_save)
