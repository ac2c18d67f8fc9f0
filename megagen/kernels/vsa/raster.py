"""Both stages and their gated sum as one operator, from tokens in raster order to the same.

For backends that read raster order as fast as blocks, which have the optional operations
``raster_forward`` and ``raster_backward``: slots of queries, keys, values and their gradients are
not kept, and what means hand on is added where the fine stage writes its gradients.

Legend: B batch, S tokens, H heads, D head dim, P slots (64 a block), q k blocks, M places of a
list.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagen.kernels.vsa import dispatch
from megagen.kernels.vsa.layout import BLOCK, Blocks


class RasterForward(NamedTuple):
    """What ``raster_forward`` of a backend returns.

    Args:
        out: ``o + gate oc`` of each token, ``[B, S, H, D]``.
        o: of the fine stage, ``[B, H, P, D]``; no slots where it was not to be kept.
        lse: of the fine stage, natural logarithm, ``[B, H, P]`` fp32.
        oc: of the coarse stage, ``[B, H, q, D]``.
        lse_c: of the coarse stage, ``[B, H, q]`` fp32.
        idx: chosen blocks, as in ``BlockIndex``.
        num: how many.
        qm, km, vm: means of the blocks.
    """

    out: Tensor
    o: Tensor
    lse: Tensor
    oc: Tensor
    lse_c: Tensor
    idx: Tensor
    num: Tensor
    qm: Tensor
    km: Tensor
    vm: Tensor


def attend_raster(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    gate_BSHD: Tensor | None,
    queries: Blocks,
    keys: Blocks,
    *,
    topk: int,
    scale: float,
    score_dtype: str,
    backend: str,
) -> RasterForward:
    """Video sparse attention of tokens; ``out`` has gradients, the rest none.

    Args:
        q_BSHD: any strides, as all of them.
        k_BSHD: of one type and device with ``q``, as all of them.
        v_BSHD: like ``k``.
        gate_BSHD: like ``q``; None: 1.
        queries: their blocks.
        keys: theirs.
        topk: at least 1.
        scale: of scores.
        score_dtype: ``fp32`` or ``bf16``, see ``coarse_attention``.
        backend: one that has the operations.
    """
    given = (q_BSHD, k_BSHD, v_BSHD, gate_BSHD)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    made = _attend(
        *given,
        queries.slot_to_raster_P,
        queries.sizes_n,
        keys.slot_to_raster_P,
        keys.sizes_n,
        min(topk, keys.sizes_n.numel()),
        scale,
        score_dtype == "bf16",
        keep,
        backend,
    )
    return RasterForward(*made)


_TEN = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # torch.library reads annotations, not NamedTuples


@torch.library.custom_op("megagen::vsa_raster", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    q_order: Tensor,
    q_sizes: Tensor,
    kv_order: Tensor,
    kv_sizes: Tensor,
    topk: int,
    scale: float,
    is_bf16_score: bool,
    keep: bool,
    backend: str,
) -> _TEN:
    blocks = Blocks(q_order, q_sizes), Blocks(kv_order, kv_sizes)
    score_dtype = torch.bfloat16 if is_bf16_score else torch.float32
    forward = dispatch.function(backend, "raster_forward")
    made: _TEN = tuple(forward(q, k, v, gate, *blocks, topk, scale, score_dtype, keep=keep))
    return made


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    q_order: Tensor,
    q_sizes: Tensor,
    kv_order: Tensor,
    kv_sizes: Tensor,
    topk: int,
    scale: float,
    is_bf16_score: bool,
    keep: bool,
    backend: str,
) -> _TEN:
    batch, _, heads, dim = q.shape
    num_q, num_k = q_sizes.numel(), kv_sizes.numel()

    def empty(*shape: int, dtype: torch.dtype = q.dtype) -> Tensor:
        return q.new_empty(batch, heads, *shape, dtype=dtype)

    return (
        q.new_empty(q.shape),
        empty(BLOCK * num_q if keep else 0, dim),
        empty(BLOCK * num_q, dtype=torch.float32),
        empty(num_q, dim),
        empty(num_q, dtype=torch.float32),
        empty(num_q, topk, dtype=torch.int32),
        empty(num_q, dtype=torch.int32),
        empty(num_q, dim),
        empty(num_k, dim),
        empty(num_k, dim),
    )


@torch.library.custom_op("megagen::vsa_raster_backward", mutates_args=())
def _attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    q_order: Tensor,
    q_sizes: Tensor,
    kv_order: Tensor,
    kv_sizes: Tensor,
    made: list[Tensor],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = Blocks(q_order, q_sizes), Blocks(kv_order, kv_sizes)
    found = RasterForward(dout, *made)  # out is not needed
    backward = dispatch.function(backend, "raster_backward")
    dq, dk, dv, dgate = backward(dout, q, k, v, gate, found, *blocks, scale)
    return dq, dk, dv, q.new_empty(0) if dgate is None else dgate


@_attend_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    q_order: Tensor,
    q_sizes: Tensor,
    kv_order: Tensor,
    kv_sizes: Tensor,
    made: list[Tensor],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if gate is None else gate.new_empty(gate.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: _TEN) -> None:
    *tensors, _, ctx.scale, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dout: Tensor | None, *others: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if dout is None:
        return (None,) * 13
    given, made = saved[:8], list(saved[8:])
    dq, dk, dv, dgate = _attend_backward(dout, *given, made, ctx.scale, ctx.backend)
    return dq, dk, dv, None if given[3] is None else dgate, *(None,) * 9


_attend.register_autograd(_backward, setup_context=_save)
