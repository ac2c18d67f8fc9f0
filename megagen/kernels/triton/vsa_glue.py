"""Between raster order and blocks: tokens to slots with means, slots to tokens with the gate.

Each kernel reads and writes every tensor once. Tokens are gathered 64 at a time, one head at a
time; heads are neighbouring programs, so that what lies side by side in memory is read at one time.

Legend: B batch, S tokens, H heads, D head dim, P slots (64 a block), n blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.triton.vsa_fine_forward import store_block
from megagen.kernels.triton.vsa_launch import BLOCK, on_device_of


@triton.jit
def _token_places(batch, head, tokens, strides_b, strides_s, strides_h, D: tl.constexpr):
    """Where ``[64, D]`` of one head stand, ``tokens`` int64."""
    base = batch.to(tl.int64) * strides_b + head * strides_h
    return base + tokens[:, None] * strides_s + tl.arange(0, D)[None, :]


@triton.jit
def _packed_places(batch, head, tokens, num_tokens, heads, D: tl.constexpr):
    """The same in a contiguous ``[B, S, H, D]``."""
    rows = (batch.to(tl.int64) * num_tokens + tokens) * heads + head
    return rows[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def tile_pool_kernel(
    x, slots, mean, slot_to_raster, sizes, num_blocks, heads, stride_b, stride_s, stride_h,
    D: tl.constexpr,
):  # fmt: skip
    """Program (batch and head, block)."""
    line, block = tl.program_id(0), tl.program_id(1)
    tokens = tl.load(slot_to_raster + block * 64 + tl.arange(0, 64))
    places = _token_places(line // heads, line % heads, tokens, stride_b, stride_s, stride_h, D)
    values = tl.load(x + places, mask=(tokens >= 0)[:, None], other=0.0).to(tl.float32)
    at = line.to(tl.int64) * num_blocks + block
    store_block(slots, at * 64, values, D)
    size = tl.maximum(tl.load(sizes + block), 1).to(tl.float32)
    found = tl.sum(values, 0) / size
    tl.store(mean + at * D + tl.arange(0, D), found.to(mean.dtype.element_ty))


@triton.jit
def tile_pool_backward_kernel(
    dslots, dmean, dx, raster_to_slot, sizes, num_tokens, num_blocks, heads, D: tl.constexpr
):
    """Program (batch and head, 64 tokens): a slot's gradient and its share of the mean's."""
    line = tl.program_id(0)
    tokens = (tl.program_id(1) * 64 + tl.arange(0, 64)).to(tl.int64)
    is_token = tokens < num_tokens
    slot = tl.load(raster_to_slot + tokens, mask=is_token, other=0)
    dims = tl.arange(0, D)[None, :]
    first = line.to(tl.int64) * num_blocks
    share = tl.load(dmean + ((first + slot // 64) * D)[:, None] + dims).to(tl.float32)
    size = tl.maximum(tl.load(sizes + slot // 64), 1).to(tl.float32)
    own = tl.load(dslots + ((first * 64 + slot) * D)[:, None] + dims).to(tl.float32)
    places = _packed_places(line // heads, line % heads, tokens, num_tokens, heads, D)
    found = (own + share / size[:, None]).to(dx.dtype.element_ty)
    tl.store(dx + places, found, mask=is_token[:, None])


@triton.jit
def untile_combine_kernel(
    o, oc, gate, out, raster_to_slot, num_tokens, num_blocks, heads, stride_b, stride_s, stride_h,
    D: tl.constexpr,
):  # fmt: skip
    """Program (batch and head, 64 tokens): ``o + gate oc``, strides are the gate's."""
    line = tl.program_id(0)
    batch, head = line // heads, line % heads
    tokens = (tl.program_id(1) * 64 + tl.arange(0, 64)).to(tl.int64)
    is_token = tokens < num_tokens
    slot = tl.load(raster_to_slot + tokens, mask=is_token, other=0)
    dims = tl.arange(0, D)[None, :]
    first = line.to(tl.int64) * num_blocks
    coarse = tl.load(oc + ((first + slot // 64) * D)[:, None] + dims).to(tl.float32)
    if gate is not None:
        places = _token_places(batch, head, tokens, stride_b, stride_s, stride_h, D)
        coarse *= tl.load(gate + places, mask=is_token[:, None], other=0.0).to(tl.float32)
    found = coarse + tl.load(o + ((first * 64 + slot) * D)[:, None] + dims).to(tl.float32)
    places = _packed_places(batch, head, tokens, num_tokens, heads, D)
    tl.store(out + places, found.to(out.dtype.element_ty), mask=is_token[:, None])


@triton.jit
def untile_combine_backward_kernel(
    dout, oc, gate, do, doc, dgate, slot_to_raster, num_tokens, num_blocks, heads,
    stride_b, stride_s, stride_h, D: tl.constexpr,
):  # fmt: skip
    """Program (batch and head, block): one pass over the gradient for all three."""
    line, block = tl.program_id(0), tl.program_id(1)
    batch, head = line // heads, line % heads
    tokens = tl.load(slot_to_raster + block * 64 + tl.arange(0, 64))
    is_token = (tokens >= 0)[:, None]
    places = _packed_places(batch, head, tokens, num_tokens, heads, D)
    grad = tl.load(dout + places, mask=is_token, other=0.0).to(tl.float32)
    at = line.to(tl.int64) * num_blocks + block
    store_block(do, at * 64, grad, D)
    row = at * D + tl.arange(0, D)
    if gate is not None:
        coarse = tl.load(oc + row).to(tl.float32)
        found = (grad * coarse[None, :]).to(dgate.dtype.element_ty)
        tl.store(dgate + places, found, mask=is_token)
        strided = _token_places(batch, head, tokens, stride_b, stride_s, stride_h, D)
        grad *= tl.load(gate + strided, mask=is_token, other=0.0).to(tl.float32)
    tl.store(doc + row, tl.sum(grad, 0).to(doc.dtype.element_ty))


def tile_pool(x_BSHD: Tensor, slot_to_raster_P: Tensor, sizes_n: Tensor) -> tuple[Tensor, Tensor]:
    """Slots ``[B, H, P, D]``, zeros in empty ones, and means ``[B, H, n, D]``."""
    x = _lines(x_BSHD)
    B, _, H, D = x.shape
    num_blocks = len(sizes_n)
    slots, mean = x.new_empty(B, H, num_blocks * BLOCK, D), x.new_empty(B, H, num_blocks, D)
    with on_device_of(x):
        tile_pool_kernel[(B * H, num_blocks)](
            x, slots, mean, slot_to_raster_P, sizes_n, num_blocks, H, *x.stride()[:3], D=D
        )
    return slots, mean


def tile_pool_backward(
    dx_BHPD: Tensor, dmean_BHnD: Tensor, raster_to_slot_S: Tensor, sizes_n: Tensor
) -> Tensor:
    """Gradient of the tokens ``[B, S, H, D]``."""
    B, H, _, D = dx_BHPD.shape
    S, num_blocks = len(raster_to_slot_S), len(sizes_n)
    dx = dx_BHPD.new_empty(B, S, H, D)
    with on_device_of(dx):
        tile_pool_backward_kernel[(B * H, triton.cdiv(S, 64))](
            dx_BHPD, dmean_BHnD, dx, raster_to_slot_S, sizes_n, S, num_blocks, H, D=D
        )
    return dx


def untile_combine(
    o_BHPD: Tensor, oc_BHnD: Tensor, gate_BSHD: Tensor | None, raster_to_slot_S: Tensor
) -> Tensor:
    """``o + gate oc`` of each token ``[B, S, H, D]``; without a gate the plain sum."""
    B, H, P, D = o_BHPD.shape
    S = len(raster_to_slot_S)
    out = o_BHPD.new_empty(B, S, H, D)
    gate = None if gate_BSHD is None else _lines(gate_BSHD)
    strides = (out if gate is None else gate).stride()[:3]
    with on_device_of(out):
        untile_combine_kernel[(B * H, triton.cdiv(S, 64))](
            o_BHPD.contiguous(), oc_BHnD.contiguous(), gate, out, raster_to_slot_S,
            S, P // BLOCK, H, *strides, D=D,
        )  # fmt: skip
    return out


def untile_combine_backward(
    do_BSHD: Tensor, oc_BHnD: Tensor, gate_BSHD: Tensor | None, slot_to_raster_P: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``o`` (slots), ``oc`` (blocks) and the gate (tokens; None without one)."""
    B, S, H, D = do_BSHD.shape
    num_blocks = len(slot_to_raster_P) // BLOCK
    do, doc = do_BSHD.new_empty(B, H, num_blocks * BLOCK, D), oc_BHnD.new_empty(oc_BHnD.shape)
    gate = None if gate_BSHD is None else _lines(gate_BSHD)
    dgate = None if gate is None else gate.new_empty(B, S, H, D)
    strides = (do_BSHD if gate is None else gate).stride()[:3]
    with on_device_of(do):
        untile_combine_backward_kernel[(B * H, num_blocks)](
            do_BSHD, oc_BHnD.contiguous(), gate, do, doc, dgate, slot_to_raster_P,
            S, num_blocks, H, *strides, D=D,
        )  # fmt: skip
    return do, doc, dgate


def _lines(x: Tensor) -> Tensor:
    """Head dims side by side; the other strides stay as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()
