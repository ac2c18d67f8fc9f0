"""Forward pass of block-sparse attention: softmax(scale Q K^T) V over listed key blocks.

One program owns one block of 64 queries and walks its list: full key blocks first, without a mask
and two a step where that is asked for, then the ragged ones. Scores are scaled in fp32 after the
dot and kept in base 2; the log-sum-exp that is written is natural.

Legend: B batch, H heads, S slots (64 a block), D head dim; kernels fold (B, H).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.triton.vsa_index import Segments
from megagen.kernels.triton.vsa_launch import BLOCK, LOG2E, Config, on_device_of, source


@triton.jit
def load_block(source, row, D: tl.constexpr, TMA: tl.constexpr):
    """Rows row..row+63 of a [rows, D] matrix given as a tensor descriptor or as a pointer."""
    if TMA:
        block = source.load([row.to(tl.int32), 0])
    else:
        places = tl.arange(0, 64)[:, None] * D + tl.arange(0, D)[None, :]
        block = tl.load(source + row * D + places)
    return block


@triton.jit
def store_block(target, row, x, D: tl.constexpr):
    """Writes [64, D] to rows row..row+63, in the target's type."""
    places = tl.arange(0, 64)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(target + row * D + places, x.to(target.dtype.element_ty))


@triton.jit
def _rescale(acc, top, total, highest):
    """Moves the running sums from the maximum ``top`` to the maximum of both."""
    new_top = tl.maximum(top, highest)
    shrink = tl.exp2(top - new_top)
    return acc * shrink[:, None], new_top, total * shrink


@triton.jit
def _one_block(
    acc, top, total, q, k_source, v_source, row, size, scale_log2e,
    D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    k = load_block(k_source, row, D, TMA)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        s = tl.where(tl.arange(0, 64)[None, :] < size, s, float("-inf"))
    acc, top, total = _rescale(acc, top, total, tl.max(s, 1) * scale_log2e)
    p = tl.exp2(s * scale_log2e - top[:, None])
    v = load_block(v_source, row, D, TMA)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, top, total + tl.sum(p, 1)


@triton.jit
def _two_blocks(
    acc, top, total, q, k_source, v_source, row0, row1, scale_log2e,
    D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A step of 128 keys from two places: one maximum and one rescaling for both."""
    s0 = tl.dot(q, tl.trans(load_block(k_source, row0, D, TMA)), input_precision="ieee")
    s1 = tl.dot(q, tl.trans(load_block(k_source, row1, D, TMA)), input_precision="ieee")
    highest = tl.maximum(tl.max(s0, 1), tl.max(s1, 1)) * scale_log2e
    acc, top, total = _rescale(acc, top, total, highest)
    p0 = tl.exp2(s0 * scale_log2e - top[:, None])
    p1 = tl.exp2(s1 * scale_log2e - top[:, None])
    v0 = load_block(v_source, row0, D, TMA)
    acc = tl.dot(p0.to(v0.dtype), v0, acc, input_precision="ieee")
    v1 = load_block(v_source, row1, D, TMA)
    acc = tl.dot(p1.to(v1.dtype), v1, acc, input_precision="ieee")
    return acc, top, total + (tl.sum(p0, 1) + tl.sum(p1, 1))


@triton.jit
def fine_forward_kernel(
    q_source, k_source, v_source, o, lse, blocks, starts, full, kept, q_sizes, kv_sizes,
    num_q, num_k, scale_log2e,
    D: tl.constexpr, TMA: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Program (query block, batch and head)."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    q_row = (head * num_q + block) * 64
    k_base = head * num_k * 64
    q_size = tl.load(q_sizes + block)
    segment = head * num_q + block
    names = blocks + tl.load(starts + segment)
    num_full = tl.load(full + segment)
    num_kept = tl.load(kept + segment)
    q = load_block(q_source, q_row, D, TMA)
    acc = tl.zeros([64, D], tl.float32)
    top = tl.full([64], float("-inf"), tl.float32)
    total = tl.zeros([64], tl.float32)
    if PAIRS:
        for j in tl.range(0, num_full // 2):
            row0 = k_base + tl.load(names + 2 * j) * 64
            row1 = k_base + tl.load(names + 2 * j + 1) * 64
            acc, top, total = _two_blocks(
                acc, top, total, q, k_source, v_source, row0, row1, scale_log2e, D, TMA
            )
        single_from = num_full // 2 * 2
    else:
        for j in tl.range(0, num_full):
            row = k_base + tl.load(names + j) * 64
            acc, top, total = _one_block(
                acc, top, total, q, k_source, v_source, row, 64, scale_log2e, D, TMA, False
            )
        single_from = num_full
    for j in tl.range(single_from, num_kept):
        key_block = tl.load(names + j)
        acc, top, total = _one_block(
            acc, top, total, q, k_source, v_source, k_base + key_block * 64,
            tl.load(kv_sizes + key_block), scale_log2e, D, TMA, True,
        )  # fmt: skip
    slots = tl.arange(0, 64)
    real = slots < q_size
    # a row without keys: 0 / 1, and top is -inf still
    total = tl.where(total == 0, 1.0, total)
    store_block(o, q_row, tl.where(real[:, None], acc / total[:, None], 0.0), D)
    natural = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + q_row + slots, tl.where(real, natural, float("-inf")))


def fine_forward(
    q_BHSD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    segments: Segments,
    q_sizes: Tensor,
    kv_sizes: Tensor,
    scale: float,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, S, D]`` and natural log-sum-exp fp32 ``[B, H, S]``; 0 and -inf at pads.

    Args:
        segments: for each query block its key blocks, full ones first.
        q_sizes, kv_sizes: real slots of each block, 0 to 64.
    """
    B, H, S, D = q_BHSD.shape
    o = torch.empty_like(q_BHSD)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q_BHSD.device)
    num_q, num_k = S // BLOCK, k_BHSD.shape[2] // BLOCK
    with on_device_of(q_BHSD):
        fine_forward_kernel[(num_q, B * H)](
            *(source(x, config.tma) for x in (q_BHSD, k_BHSD, v_BHSD)),
            o, lse, segments.blocks, segments.starts, segments.full, segments.kept,
            q_sizes, kv_sizes, num_q, num_k, scale * LOG2E,
            D=D, TMA=config.tma, PAIRS=config.pairs,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return o, lse
