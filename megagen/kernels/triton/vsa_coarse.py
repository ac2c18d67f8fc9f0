"""The coarse stage in one kernel: scores of block means, softmax, P V, and the best blocks.

A program takes 64 query blocks at a time. Their scores pass by once as in flash attention and are
noted down; then the best are chosen from the notes (``vsa_select``). Only as many rows are noted as
programs run at once, a few for each multiprocessor: no map of all pairs of blocks exists.

Legend: B batch, H heads, S slots (64 a block), D head dim, n q k blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.triton.vsa_fine_forward import load_block
from megagen.kernels.triton.vsa_launch import BLOCK, num_processors, on_device_of
from megagen.kernels.triton.vsa_select import blocking, choose, num_chosen

_PROGRAMS = 2
"""Programs for each multiprocessor."""


@triton.jit
def _rows_of(means, first, count, D: tl.constexpr):
    """Up to 64 rows of ``[count, D]``, zeros after the last."""
    rows = first + tl.arange(0, 64)
    places = rows[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(means + places, mask=(rows < count)[:, None], other=0.0)


@triton.jit
def _attend(
    q, km, vm, sizes, notes, num_k, scale, D: tl.constexpr, WIDE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Output and LSE of 64 query blocks; their scores go to ``notes [64, WIDE]``."""
    rows = tl.arange(0, 64)
    acc = tl.zeros([64, D], tl.float32)
    top = tl.full([64], float("-inf"), tl.float32)
    total = tl.zeros([64], tl.float32)
    for first in tl.range(0, num_k, 64):
        columns = first + tl.arange(0, 64)
        size = tl.load(sizes + columns, mask=columns < num_k, other=0)
        k = _rows_of(km, first, num_k, D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if ROUND:  # what a product in bf16, then scaled in bf16, would give
            s = (s.to(tl.bfloat16).to(tl.float32) * scale).to(tl.bfloat16).to(tl.float32)
        else:
            s = s * scale
        tl.store(notes + rows[:, None] * WIDE + columns[None, :], s)
        s = tl.where((size > 0)[None, :], s * 1.4426950408889634, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        # nothing but empty blocks so far: -inf less -inf is no number
        level = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - level)
        p = tl.exp2(s - level[:, None])
        v = _rows_of(vm, first, num_k, D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    total = tl.where(total == 0, 1.0, total)
    return acc / total[:, None], (top + tl.log2(total)) * 0.6931471805599453


@triton.jit
def coarse_forward_kernel(
    qm, km, vm, sizes, oc, lse, idx, num, notes, num_q, num_k, width, tiles_per_head, num_tiles,
    scale, D: tl.constexpr, WIDE: tl.constexpr, ROUND: tl.constexpr,
    G: tl.constexpr, HELD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program: every so many tiles of 64 query blocks; ``WIDE`` is n_k up to a multiple of 64."""
    own = notes + tl.program_id(0).to(tl.int64) * 64 * WIDE
    wanted = num_chosen(sizes, num_k, width, CHUNK)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        head = (tile // tiles_per_head).to(tl.int64)
        first = tile % tiles_per_head * 64
        q_base = head * num_q
        k_base = head * num_k * D
        q = _rows_of(qm + q_base * D, first, num_q, D)
        out, natural = _attend(
            q, km + k_base, vm + k_base, sizes, own, num_k, scale, D, WIDE, ROUND
        )  # fmt: skip
        rows = first + tl.arange(0, 64)
        places = (q_base + rows)[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(oc + places, out.to(oc.dtype.element_ty), mask=(rows < num_q)[:, None])
        tl.store(lse + q_base + rows, natural, mask=rows < num_q)
        # what one thread noted another one reads
        tl.debug_barrier()
        for group in range(0, 64, G):
            noted = group + tl.arange(0, G)
            row = first + noted
            choose(
                own, noted * WIDE, sizes, idx, num, q_base + row, row < num_q, num_k, width, wanted,
                G, HELD, CHUNK,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def block_mean_kernel(x, sizes, mean, num_blocks, D: tl.constexpr):
    """Program (block, head): mean over the first ``size`` slots."""
    block = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64) * num_blocks + block
    size = tl.load(sizes + block)
    values = load_block(x, line * 64, D, False).to(tl.float32)
    values = tl.where((tl.arange(0, 64) < size)[:, None], values, 0.0)
    found = tl.sum(values, 0) / tl.maximum(size, 1).to(tl.float32)
    tl.store(mean + line * D + tl.arange(0, D), found.to(mean.dtype.element_ty))


def coarse_forward(
    qm_BHqD: Tensor,
    km_BHkD: Tensor,
    vm_BHkD: Tensor,
    sizes_k: Tensor,
    k: int,
    scale: float,
    score_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, natural LSE fp32, lists ``[B, H, n_q, k]`` and their lengths; see ``reference``."""
    B, H, num_q, D = qm_BHqD.shape
    num_k = km_BHkD.shape[2]
    width = min(k, num_k)
    lse = torch.empty(B, H, num_q, dtype=torch.float32, device=qm_BHqD.device)
    idx = torch.zeros(B, H, num_q, width, dtype=torch.int32, device=qm_BHqD.device)
    num = idx.new_empty(B, H, num_q)
    oc = torch.empty_like(qm_BHqD)
    tiles_per_head = triton.cdiv(num_q, 64)
    num_tiles = tiles_per_head * B * H
    programs = min(num_tiles, _PROGRAMS * num_processors(qm_BHqD))
    wide = 64 * triton.cdiv(num_k, 64)
    notes = lse.new_empty(programs, 64, wide)
    with on_device_of(qm_BHqD):
        coarse_forward_kernel[(programs,)](
            qm_BHqD, km_BHkD, vm_BHkD, sizes_k, oc, lse, idx, num, notes, num_q, num_k, width,
            tiles_per_head, num_tiles, scale, D=D, WIDE=wide, ROUND=score_dtype == torch.bfloat16,
            **blocking(num_k, 64), num_warps=8, num_stages=2,
        )  # fmt: skip
    return oc, lse, idx, num


def block_mean(x_BHSD: Tensor, sizes_n: Tensor) -> Tensor:
    """Mean over the real slots of each block ``[B, H, n, D]``, summed in fp32; 0 for none."""
    B, H, S, D = x_BHSD.shape
    num_blocks = S // BLOCK
    mean = x_BHSD.new_empty(B, H, num_blocks, D)
    with on_device_of(x_BHSD):
        block_mean_kernel[(num_blocks, B * H)](x_BHSD, sizes_n, mean, num_blocks, D=D, num_warps=4)
    return mean
