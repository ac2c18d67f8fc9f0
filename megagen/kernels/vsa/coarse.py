"""Attention over block means, and the choice of key blocks that comes with it.

Legend: B batch, H heads, P slots (64 a block), D head dim, n q k blocks, M places of a list.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megagen.kernels.vsa import dispatch
from megagen.kernels.vsa.index import BlockIndex
from megagen.kernels.vsa.layout import BLOCK

SCORE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def coarse_attention(
    qm_BHqD: Tensor,
    km_BHkD: Tensor,
    vm_BHkD: Tensor,
    kv_sizes: Tensor,
    *,
    topk: int,
    scale: float | None = None,
    score_dtype: str = "fp32",
    backend: str = "auto",
) -> tuple[Tensor, Tensor, BlockIndex]:
    """Dense attention over block means; each query block keeps its ``topk`` best key blocks.

    Zhang et al. 2025 (arXiv 2505.13389), the coarse stage. Ties go to the lower block. Blocks
    without tokens take no part. The selection carries no gradient.

    Args:
        qm_BHqD: means of query blocks.
        km_BHkD: means of key blocks.
        vm_BHkD: means of values.
        kv_sizes: int32 ``[n_k]``, real tokens of each key block.
        topk: at least 1.
        scale: of the scores; None: ``1 / sqrt(D)``.
        score_dtype: ``fp32``, or ``bf16`` to round scores as a bf16 product would.
        backend: ``auto`` | ``cuda`` | ``triton`` | ``cpu`` | ``reference``.

    Returns:
        Output ``[B, H, n_q, D]``, natural-log LSE ``[B, H, n_q]`` (no gradient), and the lists,
        ``min(topk, n_k)`` wide, with ``min(topk, blocks that have tokens)`` entries each.

    Raises:
        ValueError: ``topk`` or ``score_dtype`` is out of range, or shapes do not fit.
    """
    if topk < 1:
        raise ValueError(f"topk must be at least 1, found {topk}")
    if score_dtype not in SCORE_DTYPES:
        raise ValueError(f"score_dtype must be fp32 or bf16, found {score_dtype!r}")
    if km_BHkD.shape != vm_BHkD.shape or km_BHkD.size(2) != kv_sizes.numel():
        raise ValueError(
            f"k and v means must be alike with {kv_sizes.numel()} blocks, found "
            f"{tuple(km_BHkD.shape)} and {tuple(vm_BHkD.shape)}"
        )
    out, lse, idx, num = _coarse(
        *(x.contiguous() for x in (qm_BHqD, km_BHkD, vm_BHkD, kv_sizes)),
        min(topk, kv_sizes.numel()),
        1 / math.sqrt(qm_BHqD.size(-1)) if scale is None else scale,
        score_dtype == "bf16",
        dispatch.choose(backend, qm_BHqD),
    )
    return out, lse, BlockIndex(idx, num)


def select_topk(scores_BHqk: Tensor, kv_sizes: Tensor, topk: int) -> BlockIndex:
    """Each row's ``topk`` largest scores as ascending lists; ties go to the lower block.

    Args:
        scores_BHqk: any float type.
        kv_sizes: int32 ``[n_k]``; blocks of size 0 are never chosen.
        topk: at least 1.
    """
    backend = "cpu" if scores_BHqk.dtype == torch.float32 else "reference"
    if backend == "cpu":
        backend = dispatch.choose("auto", scores_BHqk[..., :1].expand(*scores_BHqk.shape[:-1], 64))
    width = min(topk, kv_sizes.numel())
    scores, sizes = scores_BHqk.detach().contiguous(), kv_sizes.contiguous()
    return BlockIndex(*dispatch.function(backend, "select_topk")(scores, sizes, width))


def block_mean(x_BHPD: Tensor, sizes_n: Tensor, *, backend: str = "auto") -> Tensor:
    """Mean over the real tokens of each block, ``[B, H, n, D]``; 0 for a block without tokens.

    Args:
        x_BHPD: blocks of 64 slots, real tokens first.
        sizes_n: int32, real tokens of each block, 0..64.
        backend: ``auto`` | ``cuda`` | ``triton`` | ``cpu`` | ``reference``.
    """
    mean: Tensor = _block_mean(x_BHPD.contiguous(), sizes_n, dispatch.choose(backend, x_BHPD))
    return mean


@torch.library.custom_op("megagen::vsa_block_mean", mutates_args=())
def _block_mean(x: Tensor, sizes: Tensor, backend: str) -> Tensor:
    mean: Tensor = dispatch.function(backend, "block_mean")(x, sizes)
    return mean


@_block_mean.register_fake
def _(x: Tensor, sizes: Tensor, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:2], x.size(2) // BLOCK, x.size(3))


def _save_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _spread(ctx: Any, dmean: Tensor) -> tuple[Any, ...]:
    (sizes,) = ctx.saved_tensors
    is_real = torch.arange(BLOCK, device=sizes.device) < sizes[:, None]
    share = is_real / sizes.clamp(min=1)[:, None].to(
        torch.promote_types(dmean.dtype, torch.float32)
    )
    return (dmean[..., None, :] * share[..., None]).flatten(2, 3).to(dmean.dtype), None, None


_block_mean.register_autograd(_spread, setup_context=_save_sizes)


@torch.library.custom_op("megagen::vsa_coarse", mutates_args=())
def _coarse(
    qm: Tensor,
    km: Tensor,
    vm: Tensor,
    sizes: Tensor,
    topk: int,
    scale: float,
    is_bf16_score: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    score_dtype = torch.bfloat16 if is_bf16_score else torch.float32
    forward = dispatch.function(backend, "coarse_forward")
    out, lse, idx, num = forward(qm, km, vm, sizes, topk, scale, score_dtype)
    return out, lse, idx, num


@_coarse.register_fake
def _(
    qm: Tensor,
    km: Tensor,
    vm: Tensor,
    sizes: Tensor,
    topk: int,
    scale: float,
    is_bf16_score: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = qm.new_empty(qm.shape[:-1], dtype=torch.promote_types(qm.dtype, torch.float32))
    idx = qm.new_empty(*qm.shape[:-1], topk, dtype=torch.int32)
    return torch.empty_like(qm), lse, idx, qm.new_empty(qm.shape[:-1], dtype=torch.int32)


@torch.library.custom_op("megagen::vsa_coarse_backward", mutates_args=())
def _coarse_backward(
    doc: Tensor,
    qm: Tensor,
    km: Tensor,
    vm: Tensor,
    oc: Tensor,
    lse: Tensor,
    sizes: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = dispatch.function(backend, "coarse_backward")
    dq, dk, dv = backward(doc.contiguous(), qm, km, vm, oc, lse, sizes, scale)
    return dq, dk, dv


@_coarse_backward.register_fake
def _(
    doc: Tensor, qm: Tensor, km: Tensor, vm: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(qm), torch.empty_like(km), torch.empty_like(vm)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qm, km, vm, sizes, _, ctx.scale, _, ctx.backend = inputs
    out, lse, idx, num = output
    ctx.mark_non_differentiable(lse, idx, num)
    ctx.save_for_backward(qm, km, vm, out, lse, sizes)


def _backward(ctx: Any, doc: Tensor, *others: Any) -> tuple[Any, ...]:
    qm, km, vm, out, lse, sizes = ctx.saved_tensors
    grads = _coarse_backward(doc, qm, km, vm, out, lse, sizes, ctx.scale, ctx.backend)
    return (*grads, *(None,) * 5)


_coarse.register_autograd(_backward, setup_context=_save)
