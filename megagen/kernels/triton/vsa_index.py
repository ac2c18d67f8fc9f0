"""Lists of blocks on the GPU: transposed, and parted into full and ragged blocks.

The transpose goes over a bitmap: every listed (key block, query block) sets one bit, and each key
block reads its bits in order. Setting bits commutes, so the result does not depend on who came
first, and nothing is read back by the host.

Legend: B batch, H heads, q k query and key blocks, M places of a list, R rows (lists) of all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.triton.vsa_launch import on_device_of

_WORDS = 32
"""Words of the bitmap, 32 query blocks each, that a program reads at a time."""


@dataclass(frozen=True)
class Segments:
    """Lists that lie anywhere in one array, blocks of size 0 left out.

    Attributes:
        blocks: int32; list r is ``blocks[starts[r] : starts[r] + kept[r]]``: its full blocks (64
            real slots), ascending, then its ragged ones, ascending.
        starts: int64 ``[R]``.
        full: int32 ``[R]``, full blocks of each list.
        kept: int32 ``[R]``, blocks of each list.
    """

    blocks: Tensor
    starts: Tensor
    full: Tensor
    kept: Tensor


@triton.jit
def part_kernel(blocks, parted, starts, counts, sizes, full, kept, CHUNK: tl.constexpr):
    """Program (list): writes full blocks first; ``CHUNK`` entries at a time."""
    row = tl.program_id(0)
    start = tl.load(starts + row)
    count = tl.load(counts + row)
    places = tl.arange(0, CHUNK)
    num_full = tl.sum(tl.zeros([CHUNK], tl.int32))
    for first in range(0, count, CHUNK):
        is_listed = first + places < count
        block = tl.load(blocks + start + first + places, mask=is_listed, other=0)
        size = tl.load(sizes + block, mask=is_listed, other=0)
        num_full += tl.sum((size == 64).to(tl.int32))
    next_full = start
    next_ragged = start + num_full
    for first in range(0, count, CHUNK):
        is_listed = first + places < count
        block = tl.load(blocks + start + first + places, mask=is_listed, other=0)
        size = tl.load(sizes + block, mask=is_listed, other=0)
        is_full = (size == 64).to(tl.int32)
        is_ragged = ((size > 0) & (size < 64)).to(tl.int32)
        at_full = next_full + tl.cumsum(is_full, 0) - 1
        at_ragged = next_ragged + tl.cumsum(is_ragged, 0) - 1
        tl.store(parted + at_full, block, mask=is_full == 1)
        tl.store(parted + at_ragged, block, mask=is_ragged == 1)
        next_full += tl.sum(is_full)
        next_ragged += tl.sum(is_ragged)
    tl.store(full + row, num_full)
    tl.store(kept + row, (next_ragged - start).to(tl.int32))


@triton.jit
def mark_kernel(idx, num, bitmap, num_q, num_k, width, words, CHUNK: tl.constexpr):
    """Program (query block, head): sets its bit at every key block of its list."""
    query = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    count = tl.load(num + head * num_q + query)
    bit = tl.full([CHUNK], 1, tl.int32) << (query % 32)
    listed = idx + (head * num_q + query) * width
    places = tl.arange(0, CHUNK)
    for first in range(0, count, CHUNK):
        is_listed = first + places < count
        key = tl.load(listed + first + places, mask=is_listed, other=0)
        word = bitmap + (head * num_k + key) * words + query // 32
        tl.atomic_or(word, bit, mask=is_listed, sem="relaxed")


@triton.jit
def read_kernel(
    bitmap, counts, indptr, rows, num_k, words, storage, WORDS: tl.constexpr, FILL: tl.constexpr
):
    """Program (key block, head): counts its bits or, where ``FILL``, writes their places."""
    key = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    line = head * num_k + key
    places = tl.arange(0, WORDS)
    shifts = tl.arange(0, 32)
    found = tl.sum(tl.zeros([WORDS], tl.int32))
    begin = 0
    if FILL:
        begin = tl.load(indptr + head * (num_k + 1) + key)
    for first in range(0, words, WORDS):
        held = tl.load(bitmap + line * words + first + places, mask=first + places < words, other=0)
        bits = tl.reshape((held[:, None] >> shifts[None, :]) & 1, [WORDS * 32])
        if FILL:
            at = rows + head * storage + begin + found + tl.cumsum(bits, 0) - 1
            tl.store(at, first * 32 + tl.arange(0, WORDS * 32), mask=bits == 1)
        found += tl.sum(bits)
    if not FILL:
        tl.store(counts + line, found)


def part(blocks: Tensor, starts_R: Tensor, counts_R: Tensor, sizes: Tensor) -> Segments:
    """Lists with full blocks first and without empty ones.

    Args:
        blocks: int32, all lists in one array.
        starts_R: int64, first place of each list.
        counts_R: int32, its length.
        sizes: int32, real slots of each block.
    """
    parted = torch.empty_like(blocks)
    full, kept = torch.empty_like(counts_R), torch.empty_like(counts_R)
    with on_device_of(blocks):
        part_kernel[(len(starts_R),)](
            blocks, parted, starts_R, counts_R, sizes, full, kept, CHUNK=256, num_warps=1
        )
    return Segments(parted, starts_R, full, kept)


def key_blocks_of_queries(idx_BHqM: Tensor, num_BHq: Tensor, kv_sizes: Tensor) -> Segments:
    """A list for each query block of each head."""
    rows, width = num_BHq.numel(), idx_BHqM.shape[-1]
    starts = torch.arange(rows, dtype=torch.int64, device=num_BHq.device) * width
    return part(idx_BHqM.view(-1), starts, num_BHq.view(-1), kv_sizes)


def query_blocks_of_keys(indptr_BHk: Tensor, rows_BHn: Tensor, q_sizes: Tensor) -> Segments:
    """A list for each key block of each head, from a transposed index."""
    heads, storage = rows_BHn.shape[0] * rows_BHn.shape[1], rows_BHn.shape[2]
    indptr = indptr_BHk.view(heads, -1)
    first = torch.arange(heads, dtype=torch.int64, device=indptr.device)[:, None] * storage
    starts = (first + indptr[:, :-1]).view(-1)
    counts = (indptr[:, 1:] - indptr[:, :-1]).reshape(-1)
    return part(rows_BHn.view(-1), starts, counts, q_sizes)


def transpose_index(
    idx_BHqM: Tensor, num_BHq: Tensor, num_key_blocks: int
) -> tuple[Tensor, Tensor]:
    """For each key block the query blocks that list it.

    Returns:
        ``indptr [B, H, n_k + 1]`` and ``rows [B, H, n_q M]``, int32: block j is listed by
        ``rows[indptr[j] : indptr[j + 1]]``, ascending; what follows the last is 0.
    """
    B, H, num_q, width = idx_BHqM.shape
    words = (num_q + 31) // 32
    bitmap = idx_BHqM.new_zeros(B * H, num_key_blocks, words)
    counts = idx_BHqM.new_empty(B, H, num_key_blocks)
    rows = idx_BHqM.new_zeros(B, H, num_q * width)
    indptr = idx_BHqM.new_zeros(B, H, num_key_blocks + 1)
    grid, sizes = (num_key_blocks, B * H), (num_key_blocks, words, num_q * width)
    with on_device_of(idx_BHqM):
        mark_kernel[(num_q, B * H)](
            idx_BHqM, num_BHq, bitmap, num_q, num_key_blocks, width, words, CHUNK=128, num_warps=1
        )
        read_kernel[grid](bitmap, counts, indptr, rows, *sizes, WORDS=_WORDS, FILL=False)
        indptr[..., 1:] = counts.cumsum(-1)
        read_kernel[grid](bitmap, counts, indptr, rows, *sizes, WORDS=_WORDS, FILL=True)
    return indptr, rows
