"""Lists of key blocks: random, a window of neighbours with a random tail, or chosen by block means.

All lists of a row have the same number of entries, ascending. ``overlap`` says how much of a list
its neighbour shares, which decides what a kernel can gain by loading for two query blocks at once.

Legend: H heads, q k n blocks, M places of a list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagen.kernels.vsa import BlockIndex, VSALayout, map_from_index

KINDS = ("random", "local", "smooth")
NEAR = 0.6
"""Share of a local list that is its own neighbourhood."""


def random_lists(
    layout: VSALayout, heads: int, selected: int, generator: torch.Generator
) -> BlockIndex:
    """Every choice equally likely."""
    n = layout.num_blocks
    scores = torch.rand(1, heads, n, n, generator=generator, device=generator.device)
    return chosen(scores, selected)


def local_lists(
    layout: VSALayout, heads: int, selected: int, generator: torch.Generator
) -> BlockIndex:
    """The nearest blocks in the video for ``NEAR`` of a list, the rest random."""
    n = layout.num_blocks
    scores = torch.rand(1, heads, n, n, generator=generator, device=generator.device)
    distance = block_distances(layout).to(generator.device)
    nearest = distance.topk(max(1, round(NEAR * selected)), largest=False).indices
    return chosen(scores.scatter(-1, nearest.expand(1, heads, -1, -1), 2.0), selected)


def every_block(layout: VSALayout, heads: int, device: torch.device) -> BlockIndex:
    """All of them."""
    n = layout.num_blocks
    idx = torch.arange(n, dtype=torch.int32, device=device).expand(1, heads, n, n).contiguous()
    return BlockIndex(idx, torch.full((1, heads, n), n, dtype=torch.int32, device=device))


def chosen(scores_BHqk: Tensor, selected: int) -> BlockIndex:
    """Each row's largest scores as a list."""
    idx = scores_BHqk.topk(selected).indices.sort(-1).values.int().contiguous()
    return BlockIndex(idx, torch.full_like(idx[..., 0], selected).contiguous())


def block_distances(layout: VSALayout) -> Tensor:
    """``[n, n]``: distances of blocks in the video, in tiles; ties broken by number."""
    counts = [-(-g // t) for g, t in zip(layout.grid, layout.tile, strict=True)]
    places = torch.cartesian_prod(*(torch.arange(c, dtype=torch.float32) for c in counts))
    distance = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    return distance + 1e-6 * torch.arange(distance.size(-1))


def overlap(index: BlockIndex, num_key_blocks: int) -> float:
    """Mean share of a query block's list that the next block's has too, blocks taken in pairs."""
    shared, listed = 0, 0
    for head in range(index.idx_BHqM.size(1)):
        one = BlockIndex(index.idx_BHqM[:, head : head + 1], index.num_BHq[:, head : head + 1])
        is_listed = map_from_index(one, num_key_blocks)[0, 0]
        pairs = is_listed[: is_listed.size(0) // 2 * 2].view(-1, 2, num_key_blocks)
        shared += int(pairs.all(1).sum())
        listed += int(pairs[:, 0].sum())
    return shared / max(listed, 1)
