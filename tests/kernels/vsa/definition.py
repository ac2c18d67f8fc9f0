"""Video sparse attention token by token, in float64: what every backend is held to.

Written from the definition with Python loops over blocks; gradients come from autograd.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

BLOCK = 64


def fine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: list[list[list[list[int]]]],
    q_sizes: list[int],
    kv_sizes: list[int],
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE; ``lists[b][h][i]`` are the key blocks of query block i."""
    scale = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:-1], -math.inf)
    for b, h in itertools.product(range(q.size(0)), range(q.size(1))):
        for i, size in enumerate(q_sizes):
            keys = [BLOCK * j + u for j in lists[b][h][i] for u in range(kv_sizes[j])]
            if size == 0 or not keys:
                continue
            rows = slice(BLOCK * i, BLOCK * i + size)
            scores = scale * q[b, h, rows] @ k[b, h, keys].T
            out[b, h, rows] = scores.softmax(-1) @ v[b, h, keys]
            lse[b, h, rows] = scores.logsumexp(-1)
    return out, lse


def mean(x: Tensor, sizes: list[int]) -> Tensor:
    """Means of the real tokens of blocks; 0 for none."""
    parts = [x[:, :, BLOCK * i : BLOCK * i + max(s, 1)] for i, s in enumerate(sizes)]
    means = [
        p.mean(2) if s else torch.zeros_like(p[:, :, 0]) for p, s in zip(parts, sizes, strict=True)
    ]
    return torch.stack(means, 2)


def best(scores: Tensor, sizes: list[int], k: int) -> list[list[list[list[int]]]]:
    """The k best blocks of each row, ascending; ties go to the lower one, empty ones never win."""
    values = scores.tolist()
    real = [j for j, size in enumerate(sizes) if size]
    return [
        [
            [sorted(sorted(real, key=lambda j, row=row: (-row[j], j))[:k]) for row in head]
            for head in sample
        ]
        for sample in values
    ]


def tokens_of_blocks(
    grid: tuple[int, int, int], tile: tuple[int, int, int], prefix: int = 0
) -> list[list[int]]:
    """Raster numbers of the tokens of each block, in the order of its slots."""
    blocks = [list(range(prefix))[i : i + BLOCK] for i in range(0, prefix, BLOCK)]
    cuts = [
        [range(i, min(i + t, g)) for i in range(0, g, t)] for g, t in zip(grid, tile, strict=True)
    ]
    for box in itertools.product(*cuts):
        cells = itertools.product(*box)
        blocks.append([prefix + (t * grid[1] + y) * grid[2] + x for t, y, x in cells])
    return blocks


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    q_blocks: list[list[int]],
    kv_blocks: list[list[int]],
    chosen: list[list[list[list[int]]]],
) -> Tensor:
    """The whole of it on ``[B, S, H, D]`` without a prefix, with blocks already chosen."""
    heads_q, heads_k, heads_v = (x.transpose(1, 2) for x in (q, k, v))
    scale = 1 / math.sqrt(q.size(-1))
    vm = torch.stack([heads_v[:, :, block].mean(2) for block in kv_blocks], 2)
    coarse = block_scores(q, k, q_blocks, kv_blocks).softmax(-1) @ vm
    out = torch.zeros_like(q)
    for b, h in itertools.product(range(q.size(0)), range(q.size(2))):
        for i, rows in enumerate(q_blocks):
            keys = [token for j in chosen[b][h][i] for token in kv_blocks[j]]
            weights = (scale * heads_q[b, h, rows] @ heads_k[b, h, keys].T).softmax(-1)
            own = coarse[b, h, i] * (1 if gate is None else gate[b, rows, h])
            out[b, rows, h] = weights @ heads_v[b, h, keys] + own
    return out


def block_scores(
    q: Tensor, k: Tensor, q_blocks: list[list[int]], kv_blocks: list[list[int]]
) -> Tensor:
    """Scaled products ``[B, H, n_q, n_k]`` of the means of blocks of ``[B, S, H, D]``."""
    qm, km = (
        torch.stack([x.transpose(1, 2)[:, :, block].mean(2) for block in blocks], 2)
        for x, blocks in ((q, q_blocks), (k, kv_blocks))
    )
    return qm @ km.mT / math.sqrt(q.size(-1))
