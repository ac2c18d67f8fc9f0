"""Between raster order and blocks, and what is done on the way: means in, the gate out.

Legend: B batch, S tokens, H heads, D head dim, P slots (64 a block), n blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megagen.kernels.vsa import dispatch
from megagen.kernels.vsa.backends.reference import to_slots
from megagen.kernels.vsa.layout import VSALayout


def tile(x_BSHD: Tensor, layout: VSALayout) -> Tensor:
    """Tokens in raster order to slots ``[B, H, P, D]``, zeros in empty ones; differentiable."""
    _check_tokens(x_BSHD, layout)
    slots: Tensor = _tile(x_BSHD, *_order(layout, x_BSHD))
    return slots


def untile(x_BHPD: Tensor, layout: VSALayout) -> Tensor:
    """Slots to tokens in raster order ``[B, S, H, D]``; differentiable."""
    if x_BHPD.dim() != 4 or x_BHPD.size(2) != layout.padded:
        raise ValueError(f"x must be [B, H, {layout.padded}, D], found {tuple(x_BHPD.shape)}")
    tokens: Tensor = _untile(x_BHPD, *_order(layout, x_BHPD))
    return tokens


def tile_pool(x_BSHD: Tensor, layout: VSALayout, backend: str) -> tuple[Tensor, Tensor]:
    """``tile`` and ``block_mean`` in one pass; ``backend`` as ``dispatch.choose`` gave it."""
    _check_tokens(x_BSHD, layout)
    sizes = layout.tables(x_BSHD.device).sizes_n
    slots, mean = _tile_pool(x_BSHD, *_order(layout, x_BSHD), sizes, backend)
    return slots, mean


def untile_combine(
    o_BHPD: Tensor, oc_BHnD: Tensor, gate_BSHD: Tensor | None, layout: VSALayout, backend: str
) -> Tensor:
    """``o + gate oc`` of each token in raster order, the plain sum without a gate."""
    out: Tensor = _combine(o_BHPD, oc_BHnD, gate_BSHD, *_order(layout, o_BHPD), backend)
    return out


def _check_tokens(x: Tensor, layout: VSALayout) -> None:
    if x.dim() != 4 or x.size(1) != layout.num_tokens:
        raise ValueError(
            f"x must be [B, S, H, D] with the layout's {layout.num_tokens} tokens, found "
            f"{tuple(x.shape)}"
        )


def _order(layout: VSALayout, like: Tensor) -> tuple[Tensor, Tensor]:
    tables = layout.tables(like.device)
    return tables.slot_to_raster_P, tables.raster_to_slot_S


@torch.library.custom_op("megagen::vsa_tile", mutates_args=())
def _tile(x: Tensor, slot_to_raster: Tensor, raster_to_slot: Tensor) -> Tensor:
    return to_slots(x, slot_to_raster)


@_tile.register_fake
def _(x: Tensor, slot_to_raster: Tensor, raster_to_slot: Tensor) -> Tensor:
    return x.new_empty(x.size(0), x.size(2), slot_to_raster.numel(), x.size(3))


@torch.library.custom_op("megagen::vsa_untile", mutates_args=())
def _untile(x: Tensor, slot_to_raster: Tensor, raster_to_slot: Tensor) -> Tensor:
    return x.index_select(2, raster_to_slot).transpose(1, 2).contiguous()


@_untile.register_fake
def _(x: Tensor, slot_to_raster: Tensor, raster_to_slot: Tensor) -> Tensor:
    return x.new_empty(x.size(0), raster_to_slot.numel(), x.size(1), x.size(3))


def _save_order(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:3])


_tile.register_autograd(
    lambda ctx, grad: (_untile(grad, *ctx.saved_tensors), None, None), setup_context=_save_order
)
_untile.register_autograd(
    lambda ctx, grad: (_tile(grad, *ctx.saved_tensors), None, None), setup_context=_save_order
)


@torch.library.custom_op("megagen::vsa_tile_pool", mutates_args=())
def _tile_pool(
    x: Tensor, slot_to_raster: Tensor, raster_to_slot: Tensor, sizes: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    slots, mean = dispatch.function(backend, "tile_pool")(x, slot_to_raster, sizes)
    return slots, mean


@_tile_pool.register_fake
def _(
    x: Tensor, slot_to_raster: Tensor, raster_to_slot: Tensor, sizes: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = x.shape
    slots = x.new_empty(batch, heads, slot_to_raster.numel(), dim)
    return slots, x.new_empty(batch, heads, sizes.numel(), dim)


@torch.library.custom_op("megagen::vsa_tile_pool_backward", mutates_args=())
def _tile_pool_backward(
    dslots: Tensor, dmean: Tensor, raster_to_slot: Tensor, sizes: Tensor, backend: str
) -> Tensor:
    backward = dispatch.function(backend, "tile_pool_backward")
    grad: Tensor = backward(dslots.contiguous(), dmean.contiguous(), raster_to_slot, sizes)
    return grad


@_tile_pool_backward.register_fake
def _(dslots: Tensor, dmean: Tensor, raster_to_slot: Tensor, sizes: Tensor, backend: str) -> Tensor:
    batch, heads, _, dim = dslots.shape
    return dslots.new_empty(batch, raster_to_slot.numel(), heads, dim)


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, raster_to_slot, sizes, ctx.backend = inputs
    ctx.save_for_backward(raster_to_slot, sizes)


def _pool_backward(ctx: Any, dslots: Tensor, dmean: Tensor) -> tuple[Any, ...]:
    grad = _tile_pool_backward(dslots, dmean, *ctx.saved_tensors, ctx.backend)
    return grad, None, None, None, None


_tile_pool.register_autograd(_pool_backward, setup_context=_save_pool)


@torch.library.custom_op("megagen::vsa_combine", mutates_args=())
def _combine(
    o: Tensor,
    oc: Tensor,
    gate: Tensor | None,
    slot_to_raster: Tensor,
    raster_to_slot: Tensor,
    backend: str,
) -> Tensor:
    out: Tensor = dispatch.function(backend, "untile_combine")(o, oc, gate, raster_to_slot)
    return out


@_combine.register_fake
def _(
    o: Tensor,
    oc: Tensor,
    gate: Tensor | None,
    slot_to_raster: Tensor,
    raster_to_slot: Tensor,
    backend: str,
) -> Tensor:
    return o.new_empty(o.size(0), raster_to_slot.numel(), o.size(1), o.size(3))


@torch.library.custom_op("megagen::vsa_combine_backward", mutates_args=())
def combine_backward(
    dout: Tensor,
    oc: Tensor,
    gate: Tensor | None,
    slot_to_raster: Tensor,
    raster_to_slot: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``untile_combine``: of o, oc and the gate, empty without one."""
    backward = dispatch.function(backend, "untile_combine_backward")
    given = (dout.contiguous(), oc, gate, slot_to_raster, raster_to_slot)
    do, doc, dgate = backward(*given)
    return do, doc, dout.new_empty(0) if dgate is None else dgate


@combine_backward.register_fake
def _(
    dout: Tensor,
    oc: Tensor,
    gate: Tensor | None,
    slot_to_raster: Tensor,
    raster_to_slot: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, dim = dout.shape
    do = dout.new_empty(batch, heads, slot_to_raster.numel(), dim)
    dgate = dout.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return do, torch.empty_like(oc), dgate


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, oc, gate, slot_to_raster, raster_to_slot, ctx.backend = inputs
    ctx.save_for_backward(oc, gate, slot_to_raster, raster_to_slot)


def _combine_grads(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    oc, gate, slot_to_raster, raster_to_slot = ctx.saved_tensors
    given = (dout, oc, gate, slot_to_raster, raster_to_slot, ctx.backend)
    do, doc, dgate = combine_backward(*given)
    return do, doc, None if gate is None else dgate, None, None, None


_combine.register_autograd(_combine_grads, setup_context=_save_combine)
