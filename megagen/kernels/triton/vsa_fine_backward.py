"""Backward pass of block-sparse attention in two passes, each output block owned by one program.

With P = exp(scale S - lse), dP = dO V^T and delta = rowsum(O dO) - dlse::

    dV = P^T dO,  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q

``fine_dq`` walks a query block's key blocks, ``fine_dkv`` a key block's query blocks (the
transposed lists). Scores are computed twice; in return nothing is added atomically, nothing is
kept in fp32, and the result is the same in every run. Full blocks come first and need no mask.

Legend: B batch, H heads, S slots (64 a block), D head dim; kernels fold (B, H).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.triton.vsa_fine_forward import load_block, store_block
from megagen.kernels.triton.vsa_index import Segments
from megagen.kernels.triton.vsa_launch import BLOCK, Config, on_device_of, source


@triton.jit
def fine_delta_kernel(o, do, lse, dlse, lse2, delta, q_sizes, num_q, D: tl.constexpr):
    """Program (query block, head): delta, and lse in base 2; 0 and inf where nothing is seen."""
    block = tl.program_id(0)
    row = (tl.program_id(1).to(tl.int64) * num_q + block) * 64
    slots = tl.arange(0, 64)
    natural = tl.load(lse + row + slots)
    sees = (slots < tl.load(q_sizes + block)) & (natural > float("-inf"))
    product = load_block(o, row, D, False).to(tl.float32)
    product *= load_block(do, row, D, False).to(tl.float32)
    found = tl.sum(product, 1)
    if dlse is not None:
        found -= tl.load(dlse + row + slots).to(tl.float32)
    tl.store(delta + row + slots, tl.where(sees, found, 0.0))
    tl.store(lse2 + row + slots, tl.where(sees, natural * 1.4426950408889634, float("inf")))


@triton.jit
def _dq_step(
    dq, q, do, lse2, delta, k_source, v_source, row, size, scale_log2e,
    D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    k = load_block(k_source, row, D, TMA)
    v = load_block(v_source, row, D, TMA)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p = tl.exp2(s * scale_log2e - lse2[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(tl.arange(0, 64)[None, :] < size, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def fine_dq_kernel(
    q_source, k_source, v_source, do_source, dq, lse2, delta,
    blocks, starts, full, kept, q_sizes, kv_sizes, num_q, num_k, scale,
    D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Program (query block, head)."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    segment = head * num_q + block
    q_row = segment * 64
    k_base = head * num_k * 64
    slots = tl.arange(0, 64)
    names = blocks + tl.load(starts + segment)
    num_full = tl.load(full + segment)
    num_kept = tl.load(kept + segment)
    q = load_block(q_source, q_row, D, TMA)
    do = load_block(do_source, q_row, D, TMA)
    lse2_q = tl.load(lse2 + q_row + slots)
    delta_q = tl.load(delta + q_row + slots)
    scale_log2e = scale * 1.4426950408889634
    acc = tl.zeros([64, D], tl.float32)
    for j in tl.range(0, num_full):
        row = k_base + tl.load(names + j) * 64
        acc = _dq_step(
            acc, q, do, lse2_q, delta_q, k_source, v_source, row, 64, scale_log2e, D, TMA, False
        )
    for j in tl.range(num_full, num_kept):
        key_block = tl.load(names + j)
        acc = _dq_step(
            acc, q, do, lse2_q, delta_q, k_source, v_source, k_base + key_block * 64,
            tl.load(kv_sizes + key_block), scale_log2e, D, TMA, True,
        )  # fmt: skip
    real = slots < tl.load(q_sizes + block)
    store_block(dq, q_row, tl.where(real[:, None], acc * scale, 0.0), D)


@triton.jit
def _dkv_step(
    dk, dv, k, v, q_source, do_source, lse2, delta, row, size, scale_log2e,
    D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores are computed transposed: P^T and dS^T are left operands as they come."""
    slots = tl.arange(0, 64)
    q = load_block(q_source, row, D, TMA)
    do = load_block(do_source, row, D, TMA)
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.exp2(s * scale_log2e - tl.load(lse2 + row + slots)[None, :])
    if MASKED:
        p = tl.where(slots[None, :] < size, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = p * (dp - tl.load(delta + row + slots)[None, :])
    if MASKED:  # 0 times what overflowed in an empty slot is not 0
        ds = tl.where(slots[None, :] < size, ds, 0.0)
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit
def fine_dkv_kernel(
    q_source, k_source, v_source, do_source, dk, dv, lse2, delta,
    order, blocks, starts, full, kept, q_sizes, kv_sizes, num_q, num_k, scale,
    D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Program (place in ``order``, head): the key block that stands there."""
    head = tl.program_id(1).to(tl.int64)
    block = tl.load(order + head * num_k + tl.program_id(0))
    segment = head * num_k + block
    k_row = segment * 64
    q_base = head * num_q * 64
    names = blocks + tl.load(starts + segment)
    num_full = tl.load(full + segment)
    num_kept = tl.load(kept + segment)
    size = tl.load(kv_sizes + block)
    k = load_block(k_source, k_row, D, TMA)
    v = load_block(v_source, k_row, D, TMA)
    scale_log2e = scale * 1.4426950408889634
    dk_acc = tl.zeros([64, D], tl.float32)
    dv_acc = tl.zeros([64, D], tl.float32)
    for j in tl.range(0, num_full):
        row = q_base + tl.load(names + j) * 64
        dk_acc, dv_acc = _dkv_step(
            dk_acc, dv_acc, k, v, q_source, do_source, lse2, delta, row, 64,
            scale_log2e, D, TMA, False,
        )  # fmt: skip
    for j in tl.range(num_full, num_kept):
        query_block = tl.load(names + j)
        dk_acc, dv_acc = _dkv_step(
            dk_acc, dv_acc, k, v, q_source, do_source, lse2, delta, q_base + query_block * 64,
            tl.load(q_sizes + query_block), scale_log2e, D, TMA, True,
        )  # fmt: skip
    # what empty key slots gathered stays in their own rows
    real = (tl.arange(0, 64) < size)[:, None]
    store_block(dk, k_row, tl.where(real, dk_acc * scale, 0.0), D)
    store_block(dv, k_row, tl.where(real, dv_acc, 0.0), D)


def fine_delta(
    o_BHSD: Tensor, do_BHSD: Tensor, lse_BHS: Tensor, dlse_BHS: Tensor | None, q_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """``lse`` in base 2 and ``delta = rowsum(o do) - dlse``, fp32 ``[B, H, S]``."""
    B, H, S, D = o_BHSD.shape
    lse2, delta = torch.empty_like(lse_BHS), torch.empty_like(lse_BHS)
    with on_device_of(o_BHSD):
        fine_delta_kernel[(S // BLOCK, B * H)](
            o_BHSD, do_BHSD, lse_BHS, dlse_BHS, lse2, delta, q_sizes, S // BLOCK, D=D, num_warps=4
        )
    return lse2, delta


def fine_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse2: Tensor, delta: Tensor,
    segments: Segments, q_sizes: Tensor, kv_sizes: Tensor, scale: float, config: Config,
) -> Tensor:  # fmt: skip
    """Gradient of the queries; ``segments``: the key blocks of each query block."""
    B, H, S, D = q.shape
    dq = torch.empty_like(q)
    num_q, num_k = S // BLOCK, k.shape[2] // BLOCK
    with on_device_of(q):
        fine_dq_kernel[(num_q, B * H)](
            *(source(x, config.tma) for x in (q, k, v, do)), dq, lse2, delta,
            segments.blocks, segments.starts, segments.full, segments.kept,
            q_sizes, kv_sizes, num_q, num_k, scale, D=D, TMA=config.tma,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return dq


def fine_dkv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse2: Tensor, delta: Tensor,
    segments: Segments, q_sizes: Tensor, kv_sizes: Tensor, scale: float, config: Config,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of keys and values; ``segments``: the query blocks of each key block."""
    B, H, S, D = k.shape
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    num_q, num_k = q.shape[2] // BLOCK, S // BLOCK
    # popular key blocks have long lists: begun first, they do not end last
    kept = segments.kept.view(B * H, num_k)
    order = torch.argsort(kept, dim=-1, descending=True, stable=True).int()
    with on_device_of(q):
        fine_dkv_kernel[(num_k, B * H)](
            *(source(x, config.tma) for x in (q, k, v, do)), dk, dv, lse2, delta, order,
            segments.blocks, segments.starts, segments.full, segments.kept,
            q_sizes, kv_sizes, num_q, num_k, scale, D=D, TMA=config.tma,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return dk, dv
