"""The definition of video sparse attention in plain torch: any device, any head dim.

bf16 and fp16 are computed in fp32, fp64 in fp64. One head at a time, so that a dense score matrix
of one head is the most that is held. The backwards are written out from the formulas.

Legend: B batch, H heads, Q K query and key slots (64 a block), q k blocks, D head dim, n blocks, S
tokens, P slots, M places of a list.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megagen.kernels.backend import math_dtype
from megagen.kernels.vsa.index import BlockIndex, Lists, map_from_index
from megagen.kernels.vsa.index import transpose_index as transposed
from megagen.kernels.vsa.layout import BLOCK


def serves(q_BHQD: Tensor) -> str | None:
    """It serves everything."""
    return None


def fine_forward(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, lists: Lists, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the real tokens of the listed blocks: output and natural-log LSE."""
    dtype = math_dtype(q_BHQD)
    out, lse = (
        torch.zeros_like(q_BHQD),
        q_BHQD.new_zeros(q_BHQD.shape[:-1], dtype=_lse_dtype(dtype)),
    )
    for b, h, is_seen in _seen_pairs(lists):
        scores = scale * (q_BHQD[b, h].to(dtype) @ k_BHKD[b, h].to(dtype).T)
        scores.masked_fill_(~is_seen, -torch.inf)
        total = scores.logsumexp(-1)
        weights = torch.exp(scores - total.clamp(min=torch.finfo(dtype).min)[:, None])
        out[b, h] = weights @ _cleared(v_BHKD[b, h].to(dtype), lists.kv_sizes)
        lse[b, h] = total
    return out, lse


def fine_backward(
    do_BHQD: Tensor,
    dlse_BHQ: Tensor | None,
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    o_BHQD: Tensor,
    lse_BHQ: Tensor,
    lists: Lists,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dS = P (do v^T - delta)``, ``delta = rowsum(o do) - dlse``; zeros in empty slots."""
    dtype = math_dtype(q_BHQD)
    dq, dk, dv = (torch.zeros_like(x) for x in (q_BHQD, k_BHKD, v_BHKD))
    for b, h, is_seen in _seen_pairs(lists):
        q, k, v = (x[b, h].to(dtype) for x in (q_BHQD, k_BHKD, v_BHKD))
        do, o = do_BHQD[b, h].to(dtype), o_BHQD[b, h].to(dtype)
        lse = lse_BHQ[b, h].to(dtype)[:, None]
        weights = torch.where(is_seen, torch.exp(scale * (q @ k.T) - lse), 0)
        delta = (o * do).sum(-1)
        if dlse_BHQ is not None:
            delta = delta - dlse_BHQ[b, h].to(dtype)
        dscores = torch.where(is_seen, weights * (do @ v.T - delta[:, None]), 0)
        dq[b, h], dk[b, h], dv[b, h] = scale * dscores @ k, scale * dscores.T @ q, weights.T @ do
    return dq, dk, dv


def block_mean(x_BHPD: Tensor, sizes_n: Tensor) -> Tensor:
    """Mean over the real tokens of each block, ``[B, H, n, D]``; 0 for an empty block."""
    x = _cleared(x_BHPD.to(math_dtype(x_BHPD)), sizes_n).unflatten(-2, (-1, BLOCK)).sum(-2)
    return (x / sizes_n.clamp(min=1)[:, None]).to(x_BHPD.dtype)


def select_topk(scores_BHqk: Tensor, sizes_k: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, ties by the lower index, never an empty block; ascending."""
    has_tokens = sizes_k > 0
    # key: -inf scores still count before empty blocks, so sort twice, the last time by emptiness
    order = torch.argsort(scores_BHqk, dim=-1, descending=True, stable=True)
    order = order.gather(-1, torch.argsort(~has_tokens[order], dim=-1, stable=True))
    width = min(k, scores_BHqk.size(-1))
    num = has_tokens.sum().clamp(max=width).int().expand(scores_BHqk.shape[:-1]).contiguous()
    is_kept = torch.arange(width, device=order.device) < num[..., None]
    kept = torch.where(is_kept, order[..., :width], scores_BHqk.size(-1)).sort(-1).values
    return torch.where(is_kept, kept, 0).int(), num


def coarse_forward(
    qm_BHqD: Tensor,
    km_BHkD: Tensor,
    vm_BHkD: Tensor,
    sizes_k: Tensor,
    k: int,
    scale: float,
    score_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense attention over block means, its LSE, and lists of the k best key blocks.

    ``score_dtype`` bf16 rounds the product, then the scaled product, before it is used.
    """
    dtype = math_dtype(qm_BHqD)
    scores = qm_BHqD.to(dtype) @ km_BHkD.to(dtype).mT
    if score_dtype == torch.bfloat16:
        scores = (scores.bfloat16() * scale).to(dtype)
    else:
        scores = scores * scale
    idx, num = select_topk(scores, sizes_k, k)
    scores = scores.masked_fill(sizes_k == 0, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(dtype).min)[..., None])
    return (weights @ vm_BHkD.to(dtype)).to(vm_BHkD.dtype), lse.to(_lse_dtype(dtype)), idx, num


def coarse_backward(
    doc_BHqD: Tensor,
    qm_BHqD: Tensor,
    km_BHkD: Tensor,
    vm_BHkD: Tensor,
    oc_BHqD: Tensor,
    lse_BHq: Tensor,
    sizes_k: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the means; the selection carries none."""
    dtype = math_dtype(qm_BHqD)
    dq, dk, dv = (torch.empty_like(x) for x in (qm_BHqD, km_BHkD, vm_BHkD))
    is_empty = sizes_k == 0
    for b in range(qm_BHqD.size(0)):
        for h in range(qm_BHqD.size(1)):
            q, k, v = (x[b, h].to(dtype) for x in (qm_BHqD, km_BHkD, vm_BHkD))
            do, o = doc_BHqD[b, h].to(dtype), oc_BHqD[b, h].to(dtype)
            weights = torch.exp(scale * (q @ k.T) - lse_BHq[b, h].to(dtype)[:, None])
            weights.masked_fill_(is_empty, 0)
            dscores = scale * weights * (do @ v.T - (o * do).sum(-1, keepdim=True))
            dq[b, h], dk[b, h], dv[b, h] = dscores @ k, dscores.T @ q, weights.T @ do
    return dq, dk, dv


def transpose_index(
    idx_BHqM: Tensor, num_BHq: Tensor, num_key_blocks: int
) -> tuple[Tensor, Tensor]:
    """``index.transpose_index``."""
    return transposed(BlockIndex(idx_BHqM, num_BHq), num_key_blocks)


def tile_pool(x_BSHD: Tensor, slot_to_raster_P: Tensor, sizes_n: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to slots ``[B, H, P, D]``, zeros in empty ones, and the means of the blocks."""
    x_BHPD = to_slots(x_BSHD, slot_to_raster_P)
    return x_BHPD, block_mean(x_BHPD, sizes_n)


def tile_pool_backward(
    dx_BHPD: Tensor, dmean_BHnD: Tensor, raster_to_slot_S: Tensor, sizes_n: Tensor
) -> Tensor:
    """A token's gradient: its slot's, and its share of its block's mean's; ``[B, S, H, D]``."""
    dtype = math_dtype(dx_BHPD)
    share_BHnD = dmean_BHnD.to(dtype) / sizes_n.clamp(min=1)[:, None]
    dx = dx_BHPD.index_select(2, raster_to_slot_S).to(dtype)
    dx = dx + share_BHnD.index_select(2, raster_to_slot_S // BLOCK)
    return dx.to(dx_BHPD.dtype).transpose(1, 2).contiguous()


def untile_combine(
    o_BHPD: Tensor, oc_BHnD: Tensor, gate_BSHD: Tensor | None, raster_to_slot_S: Tensor
) -> Tensor:
    """``o + gate oc`` of each token, ``[B, S, H, D]``; without a gate the plain sum."""
    dtype = math_dtype(o_BHPD)
    coarse = oc_BHnD.index_select(2, raster_to_slot_S // BLOCK).transpose(1, 2).to(dtype)
    if gate_BSHD is not None:
        coarse = coarse * gate_BSHD.to(dtype)
    out = o_BHPD.index_select(2, raster_to_slot_S).transpose(1, 2).to(dtype) + coarse
    return out.to(o_BHPD.dtype).contiguous()


def untile_combine_backward(
    do_BSHD: Tensor,
    oc_BHnD: Tensor,
    gate_BSHD: Tensor | None,
    slot_to_raster_P: Tensor,
    raster_to_slot_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``o`` (slots), ``oc`` (blocks), and the gate (tokens; None without one)."""
    dtype = math_dtype(do_BSHD)
    do, dgate = do_BSHD.to(dtype), None
    if gate_BSHD is not None:
        coarse = oc_BHnD.index_select(2, raster_to_slot_S // BLOCK).transpose(1, 2).to(dtype)
        dgate = (do * coarse).to(gate_BSHD.dtype).contiguous()
        do = do * gate_BSHD.to(dtype)
    doc = to_slots(do, slot_to_raster_P).unflatten(2, (-1, BLOCK)).sum(3)
    return to_slots(do_BSHD, slot_to_raster_P), doc.to(oc_BHnD.dtype), dgate


def to_slots(x_BSHD: Tensor, slot_to_raster_P: Tensor) -> Tensor:
    """``[B, H, P, D]``, zeros in empty slots."""
    x = x_BSHD.transpose(1, 2).index_select(2, slot_to_raster_P.clamp(min=0))
    return x.masked_fill_((slot_to_raster_P < 0)[:, None], 0)


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cleared(x: Tensor, sizes_n: Tensor) -> Tensor:
    """``x`` with zeros in empty slots, whatever stands there."""
    return torch.where(_is_real(sizes_n)[:, None], x, 0)


def _is_real(sizes_n: Tensor) -> Tensor:
    """Which slots hold a token, ``[P]``."""
    return (torch.arange(BLOCK, device=sizes_n.device) < sizes_n[:, None]).flatten()


def _seen_pairs(lists: Lists) -> Iterator[tuple[int, int, Tensor]]:
    """``(b, h, bool [Q, K])``: which key slots each query slot attends to."""
    blocks = map_from_index(BlockIndex(lists.idx_BHqM, lists.num_BHq), lists.kv_sizes.numel())
    is_query, is_key = _is_real(lists.q_sizes), _is_real(lists.kv_sizes)
    for b in range(blocks.size(0)):
        for h in range(blocks.size(1)):
            pairs = blocks[b, h].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            yield b, h, pairs & is_query[:, None] & is_key
