"""The k largest scores of each row as an ascending list; ties go to the lower index.

Scores become integers of the same order. The k-th largest is built from its highest bit down: a
bit stays where at least k numbers are not below it. What is above it is taken, and of its equals as
many from the left as are missing; a running count puts each at its place.

Legend: B batch, H heads, q k query and key blocks, M places of a list, G rows at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagen.kernels.triton.vsa_launch import on_device_of

_HELD = 8192
"""Scores that a program holds in registers at a time, 32 a thread."""

_CHUNK = 256


@triton.jit
def _ordered(scores, at, sizes, columns, num_k):
    """Scores as integers of the same order; blocks without tokens lowest, and below all scores."""
    is_there = columns < num_k
    score = tl.load(scores + at[:, None] + columns[None, :], mask=is_there[None, :], other=0.0)
    score = tl.where(score == 0, 0.0, score)  # -0 is 0
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    size = tl.load(sizes + columns, mask=is_there, other=0)
    return tl.where((size > 0)[None, :], key, -2147483648)


@triton.jit
def num_chosen(sizes, num_k, width, CHUNK: tl.constexpr):
    """``min(width, blocks that have tokens)``."""
    places = tl.arange(0, CHUNK)
    found = tl.sum(tl.zeros([CHUNK], tl.int32))
    for first in range(0, num_k, CHUNK):
        size = tl.load(sizes + first + places, mask=first + places < num_k, other=0)
        found += tl.sum((size > 0).to(tl.int32))
    return tl.minimum(found, width)


@triton.jit
def choose(
    scores, at, sizes, idx, num, row, is_row, num_k, width, wanted,
    G: tl.constexpr, HELD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the lists of ``G`` rows.

    ``at`` are the rows' places in ``scores``, ``row`` those in the lists; ``HELD >= num_k`` and
    ``CHUNK`` are powers of 2.
    """
    keys = _ordered(scores, at, sizes, tl.arange(0, HELD), num_k)
    threshold = tl.full([G], -2147483648, tl.int32)
    for step in range(0, 32):
        candidate = threshold ^ (tl.full([G], 1, tl.int32) << (31 - step))
        reached = tl.sum((keys >= candidate[:, None]).to(tl.int32), 1)
        threshold = tl.where(reached >= wanted, candidate, threshold)
    missing = wanted - tl.sum((keys > threshold[:, None]).to(tl.int32), 1)
    taken = tl.zeros([G], tl.int32)
    equal = tl.zeros([G], tl.int32)
    for first in range(0, num_k, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        key = _ordered(scores, at, sizes, columns, num_k)
        is_equal = ((key == threshold[:, None]) & (key > -2147483648)).to(tl.int32)
        rank = equal[:, None] + tl.cumsum(is_equal, 1)
        take = (key > threshold[:, None]) | ((is_equal == 1) & (rank <= missing[:, None]))
        counted = take.to(tl.int32)
        place = taken[:, None] + tl.cumsum(counted, 1) - 1
        names = tl.broadcast_to(columns[None, :], [G, CHUNK])
        tl.store(idx + row[:, None] * width + place, names, mask=take & is_row[:, None])
        taken += tl.sum(counted, 1)
        equal += tl.sum(is_equal, 1)
    tl.store(num + row, taken, mask=is_row)


@triton.jit
def select_kernel(
    scores, sizes, idx, num, num_rows, num_k, width,
    G: tl.constexpr, HELD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (G rows)."""
    row = tl.program_id(0).to(tl.int64) * G + tl.arange(0, G)
    is_row = row < num_rows
    at = tl.where(is_row, row, 0) * num_k
    wanted = num_chosen(sizes, num_k, width, CHUNK)
    choose(scores, at, sizes, idx, num, row, is_row, num_k, width, wanted, G, HELD, CHUNK)


def blocking(num_k: int, most_rows: int) -> dict[str, int]:
    """The constants of ``choose``: rows at a time, and powers of 2 that hold the columns."""
    held = max(16, triton.next_power_of_2(num_k))
    return {
        "G": max(1, min(most_rows, _HELD // held)),
        "HELD": held,
        "CHUNK": min(_CHUNK, held),
    }


def select_topk(scores_BHqk: Tensor, sizes_k: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Lists ``[B, H, n_q, k]`` and their lengths ``[B, H, n_q]``, int32; see ``reference``."""
    num_rows, num_k = scores_BHqk[..., 0].numel(), scores_BHqk.shape[-1]
    width = min(k, num_k)
    idx = torch.zeros(*scores_BHqk.shape[:-1], width, dtype=torch.int32, device=scores_BHqk.device)
    num = idx.new_empty(scores_BHqk.shape[:-1])
    constants = blocking(num_k, 64)
    with on_device_of(scores_BHqk):
        select_kernel[(triton.cdiv(num_rows, constants["G"]),)](
            scores_BHqk.float(), sizes_k, idx, num, num_rows, num_k, width, **constants, num_warps=8
        )
    return idx, num
