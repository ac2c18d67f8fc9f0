"""The fine stage with the gated sum and the way back to raster order in its epilogue.

For backends with the optional operation ``fine_forward_combined``; the fine output is written only
where a backward will need it. The gradients are those of ``untile_combine`` and of the fine stage.

Legend: B batch, S tokens, H heads, Q K query and key slots (64 a block), D head dim, q k blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagen.kernels.vsa import dispatch
from megagen.kernels.vsa.fine import fine_grads
from megagen.kernels.vsa.index import BlockIndex, Lists
from megagen.kernels.vsa.layout import Tables
from megagen.kernels.vsa.tile import combine_backward


def fine_combined(
    q_BHQD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    oc_BHqD: Tensor,
    gate_BSHD: Tensor,
    index: BlockIndex,
    queries: Tables,
    kv_sizes: Tensor,
    *,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """``o + gate oc`` of each token.

    Args:
        q_BHQD: queries of all blocks of their layout.
        k_BHKD: keys.
        v_BHKD: values.
        oc_BHqD: output of the coarse stage.
        gate_BSHD: in raster order.
        index: key blocks of each query block.
        queries: of their layout.
        kv_sizes: int32 ``[n_k]``.
        backend: one that has the operation.
        deterministic: see ``block_sparse_attention``.

    Returns:
        ``[B, S, H, D]``, and the fine stage's LSE ``[B, H, Q]`` without gradient.
    """
    given = (q_BHQD, k_BHKD, v_BHKD, oc_BHqD, gate_BSHD)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    out, _, lse = _fine_combined(
        *(x.contiguous() for x in given),
        index.idx_BHqM.contiguous(),
        index.num_BHq.contiguous(),
        queries.sizes_n,
        kv_sizes,
        queries.slot_to_raster_P,
        queries.raster_to_slot_S,
        q_BHQD.size(-1) ** -0.5,
        keep,
        backend,
        deterministic,
    )
    return out, lse


@torch.library.custom_op("megagen::vsa_fine_combined", mutates_args=())
def _fine_combined(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    oc: Tensor,
    gate: Tensor,
    idx: Tensor,
    num: Tensor,
    q_sizes: Tensor,
    kv_sizes: Tensor,
    slot_to_raster: Tensor,
    raster_to_slot: Tensor,
    scale: float,
    keep: bool,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = Lists(idx, num, q_sizes, kv_sizes)
    forward = dispatch.function(backend, "fine_forward_combined")
    given = (q, k, v, lists, scale, gate, oc, slot_to_raster.int())
    out, o, lse = forward(*given, keep=keep)
    return out, q.new_empty(0) if o is None else o, lse


@_fine_combined.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    oc: Tensor,
    gate: Tensor,
    idx: Tensor,
    num: Tensor,
    q_sizes: Tensor,
    kv_sizes: Tensor,
    slot_to_raster: Tensor,
    raster_to_slot: Tensor,
    scale: float,
    keep: bool,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o = torch.empty_like(q) if keep else q.new_empty(0)
    return gate.new_empty(gate.shape), o, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _, ctx.backend, ctx.deterministic = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dout: Tensor | None, *others: Any) -> tuple[Any, ...]:
    q, k, v, oc, gate, idx, num, q_sizes, kv_sizes, order, places, o, lse = ctx.saved_tensors
    if dout is None:
        return (None,) * 15
    do, doc, dgate = combine_backward(dout, oc, gate, order, places, ctx.backend)
    lists = (idx, num, q_sizes, kv_sizes)
    given = (do, None, q, k, v, o, lse, *lists, ctx.scale, ctx.backend, ctx.deterministic)
    dq, dk, dv = fine_grads(*given)
    return dq, dk, dv, doc, dgate, *(None,) * 10


_fine_combined.register_autograd(_backward, setup_context=_save)
