"""How the tokens of a video are cut into blocks of neighbours.

A video of ``(T, H, W)`` tokens is cut into tiles ``(a, b, c)``; each tile is a block of 64 slots,
its tokens first and empty slots after them. Tiles at the far faces hold what is left. Tokens before
the video (text of a joint model) are cut into blocks of 64 in order and never share one with video.

Video sparse attention: Zhang et al. 2025 (arXiv 2505.13389), section 3.

Legend: S tokens in raster order (prefix, then frame, row, column), P slots (64 a block), n blocks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64
"""Slots of a block."""


@dataclass(frozen=True)
class Tables:
    """A layout's tables on one device; int32 where kernels read them, int64 where torch indexes.

    Args:
        sizes_n: int32, tokens of each block, 1..64.
        slot_to_raster_P: int64, token of each slot, -1 for an empty one.
        raster_to_slot_S: int64, slot of each token.
    """

    sizes_n: Tensor
    slot_to_raster_P: Tensor
    raster_to_slot_S: Tensor

    @property
    def blocks(self) -> Blocks:
        """What a kernel that reads raster order needs of them."""
        return Blocks(self.slot_to_raster_P, self.sizes_n)


@dataclass(frozen=True)
class Blocks:
    """Where the tokens of blocks stand in raster order.

    Args:
        slot_to_raster_P: see ``Tables``.
        sizes_n: see ``Tables``.
    """

    slot_to_raster_P: Tensor
    sizes_n: Tensor


@dataclass(frozen=True)
class VSALayout:
    """Blocks of a video of tokens.

    Args:
        grid: tokens ``(T, H, W)``, each at least 1.
        tile: tokens of a block ``(a, b, c)``, at most 64 together.
        prefix: tokens before the video, 0 or more.
        runs: frames of each run, T in all, whose borders no tile crosses (blocks of a causal
            network); empty: one run.

    Raises:
        ValueError: a size is out of its range.
    """

    grid: tuple[int, int, int]
    tile: tuple[int, int, int] = (4, 4, 4)
    prefix: int = 0
    runs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"grid must be (T, H, W) of at least 1 each, found {self.grid}")
        if len(self.tile) != 3 or min(self.tile) < 1 or math.prod(self.tile) > BLOCK:
            raise ValueError(
                f"tile must be three sizes of at least 1 and at most {BLOCK} tokens together, "
                f"found {self.tile}"
            )
        if self.prefix < 0:
            raise ValueError(f"prefix must be 0 or more, found {self.prefix}")
        if self.runs and (min(self.runs) < 1 or sum(self.runs) != self.grid[0]):
            raise ValueError(
                f"runs must be of at least 1 frame and {self.grid[0]} together, found {self.runs}"
            )

    @classmethod
    def fitted(cls, grid: tuple[int, int, int], prefix: int = 0) -> VSALayout:
        """A layout with ``best_tile``."""
        return cls(grid, best_tile(grid), prefix)

    @property
    def num_tokens(self) -> int:
        """S: prefix and video."""
        return self.prefix + math.prod(self.grid)

    @property
    def num_prefix_blocks(self) -> int:
        """Blocks of the prefix; they come first."""
        return -(-self.prefix // BLOCK)

    @property
    def num_video_blocks(self) -> int:
        """Blocks of the video."""
        return math.prod([_num_parts(r, t) for r, t in zip(self.axes, self.tile, strict=True)])

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """Lengths of the runs of frames, rows and columns, whose borders no tile crosses."""
        return self.runs or (self.grid[0],), (self.grid[1],), (self.grid[2],)

    @property
    def num_blocks(self) -> int:
        """n: all blocks."""
        return self.num_prefix_blocks + self.num_video_blocks

    @property
    def padded(self) -> int:
        """P: slots."""
        return BLOCK * self.num_blocks

    def topk(self, sparsity: float) -> int:
        """Video blocks that a query block attends to: ``ceil((1 - sparsity) n)``, at least 1.

        Args:
            sparsity: in [0, 1).

        Raises:
            ValueError: it is not.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), found {sparsity}")
        wanted = (1 - sparsity) * self.num_video_blocks
        return max(1, math.ceil(wanted - 1e-6))  # (1 - 0.7) * 10 is a little more than 3

    def tables(self, device: torch.device | str = "cpu") -> Tables:
        """The tables on a device; made once for each."""
        if torch.compiler.is_compiling():
            return Tables(
                *_traced_tables(
                    *map(list, (self.grid, self.tile, self.runs)), self.prefix, str(device)
                )
            )
        return _tables(self, torch.device(device))


def best_tile(grid: tuple[int, int, int], volume: int = BLOCK) -> tuple[int, int, int]:
    """A compact tile that leaves few slots empty.

    The one with the least surface over all blocks, since what is near in a video belongs together:
    (3, 5, 4) for Wan's 21 x 30 x 52 and 21 x 45 x 80, whose blocks are then all equal; (4, 4, 4)
    where it fits.

    Args:
        grid: tokens ``(T, H, W)``.
        volume: most tokens of a tile, 1..64.
    """
    sizes = [range(1, min(volume, g) + 1) for g in grid]
    tiles = [tile for tile in itertools.product(*sizes) if math.prod(tile) <= volume]

    def rank(tile: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        a, b, c = tile
        return _num_tiles(grid, tile) * (a * b + b * c + c * a), tile

    a, b, c = min(tiles, key=rank)
    return a, b, c


def _num_tiles(grid: tuple[int, ...], tile: tuple[int, ...]) -> int:
    return math.prod(-(-g // t) for g, t in zip(grid, tile, strict=True))


@lru_cache(maxsize=64)
def _tables(layout: VSALayout, device: torch.device) -> Tables:
    with torch.inference_mode(False):  # kept beyond the call, so usable under autograd too
        block_S, rank_S = _places(layout)
        raster_to_slot_S = BLOCK * block_S + rank_S
        slot_to_raster_P = torch.full((layout.padded,), -1, dtype=torch.int64)
        slot_to_raster_P[raster_to_slot_S] = torch.arange(layout.num_tokens)
        sizes_n = block_S.bincount(minlength=layout.num_blocks).int()
        return Tables(*(x.to(device) for x in (sizes_n, slot_to_raster_P, raster_to_slot_S)))


@torch.library.custom_op("megagen::vsa_tables", mutates_args=())
def _traced_tables(
    grid: list[int], tile: list[int], runs: list[int], prefix: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    # copies: a compiler may reuse what an operator returned
    tables = _tables(_layout(grid, tile, runs, prefix), torch.device(device))
    order = (tables.slot_to_raster_P.clone(), tables.raster_to_slot_S.clone())
    return tables.sizes_n.clone(), *order


@_traced_tables.register_fake
def _(
    grid: list[int], tile: list[int], runs: list[int], prefix: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(grid, tile, runs, prefix)
    return (
        torch.empty(layout.num_blocks, dtype=torch.int32, device=device),
        torch.empty(layout.padded, dtype=torch.int64, device=device),
        torch.empty(layout.num_tokens, dtype=torch.int64, device=device),
    )


def _layout(grid: list[int], tile: list[int], runs: list[int], prefix: int) -> VSALayout:
    shape, size = (grid[0], grid[1], grid[2]), (tile[0], tile[1], tile[2])
    return VSALayout(shape, size, prefix, tuple(runs))


def _places(layout: VSALayout) -> tuple[Tensor, Tensor]:
    """Block of each token and its rank in the block, both int64 ``[S]``."""
    prefix = torch.arange(layout.prefix)
    places = torch.meshgrid(*(torch.arange(g) for g in layout.grid), indexing="ij")
    block = torch.zeros(layout.grid, dtype=torch.int64)
    rank = torch.zeros(layout.grid, dtype=torch.int64)
    for place, runs, tile in zip(places, layout.axes, layout.tile, strict=True):
        number, width, offset = (x[place] for x in _cuts(runs, tile))
        block = block * _num_parts(runs, tile) + number
        rank = rank * width + offset
    block = torch.cat([prefix // BLOCK, layout.num_prefix_blocks + block.flatten()])
    return block, torch.cat([prefix % BLOCK, rank.flatten()])


def _num_parts(runs: tuple[int, ...], tile: int) -> int:
    return sum(-(-run // tile) for run in runs)


def _cuts(runs: tuple[int, ...], tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each place along an axis: its tile's number and width, and its offset in the tile."""
    widths = [min(tile, run - first) for run in runs for first in range(0, run, tile)]
    width = torch.tensor(widths)
    number = torch.arange(len(widths)).repeat_interleave(width)
    first = width.cumsum(0) - width
    return number, width[number], torch.arange(sum(runs)) - first[number]
