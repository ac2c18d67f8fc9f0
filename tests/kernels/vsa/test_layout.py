"""Blocks of a video against loops over tokens, and against the counts of known grids."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from megagen.kernels import VSALayout, tile, untile
from megagen.kernels.vsa import BLOCK, best_tile
from tests.kernels.vsa.definition import tokens_of_blocks

CASES = [
    ((4, 4, 4), (4, 4, 4), 0),
    ((5, 7, 6), (4, 4, 4), 0),
    ((3, 5, 9), (3, 5, 4), 70),
    ((1, 1, 3), (2, 2, 2), 64),
    ((2, 9, 4), (1, 8, 8), 1),
]


@pytest.mark.parametrize(("grid", "shape", "prefix"), CASES)
def test_every_token_has_its_slot(
    grid: tuple[int, int, int], shape: tuple[int, int, int], prefix: int
) -> None:
    layout = VSALayout(grid, shape, prefix)
    blocks = tokens_of_blocks(grid, shape, prefix)
    tables = layout.tables()
    assert layout.num_blocks == len(blocks) and layout.padded == BLOCK * len(blocks)
    assert layout.num_tokens == prefix + math.prod(grid)
    assert tables.sizes_n.tolist() == [len(block) for block in blocks]
    assert tables.sizes_n.dtype == torch.int32
    padded = [token for b in blocks for token in (*b, *[-1] * (BLOCK - len(b)))]
    assert tables.slot_to_raster_P.tolist() == padded
    slots = [padded.index(token) for token in range(layout.num_tokens)]
    assert tables.raster_to_slot_S.tolist() == slots


@pytest.mark.parametrize(
    ("grid", "shape", "sizes"),
    [
        ((21, 30, 52), (4, 4, 4), {64: 455, 32: 65, 16: 91, 8: 13}),
        ((21, 45, 80), (4, 4, 4), {64: 1100, 16: 320, 4: 20}),
        ((33, 45, 80), (4, 4, 4), {64: 1760, 16: 380, 4: 20}),
        ((30, 48, 80), (4, 4, 4), {64: 1680, 32: 240}),
        ((16, 28, 52), (4, 4, 4), {64: 364}),
        ((21, 30, 52), (3, 5, 4), {60: 546}),
        ((21, 45, 80), (3, 5, 4), {60: 1260}),
        ((33, 45, 80), (3, 5, 4), {60: 1980}),
    ],
)
def test_sizes_of_known_grids(
    grid: tuple[int, int, int], shape: tuple[int, int, int], sizes: dict[int, int]
) -> None:
    assert Counter(VSALayout(grid, shape).tables().sizes_n.tolist()) == sizes


@pytest.mark.parametrize(
    ("grid", "shape"),
    [
        ((21, 30, 52), (3, 5, 4)),
        ((21, 45, 80), (3, 5, 4)),
        ((33, 45, 80), (3, 5, 4)),
        ((16, 28, 52), (4, 4, 4)),
        ((20, 48, 80), (4, 4, 4)),
        ((1, 1, 1), (1, 1, 1)),
    ],
)
def test_the_best_tile_is_compact_and_full(
    grid: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    assert best_tile(grid) == shape
    assert VSALayout.fitted(grid).tile == shape


def test_topk_counts_video_blocks() -> None:
    layout = VSALayout((4, 4, 40), prefix=100)  # ten video blocks
    found = [layout.topk(s) for s in (0, 0.05, 0.1, 0.7, 0.75, 0.9, 0.99)]
    assert found == [10, 10, 9, 3, 3, 1, 1]


def test_tiling_is_undone(seeded: torch.Generator) -> None:
    layout = VSALayout((3, 5, 9), (2, 3, 4), prefix=5)
    x = torch.randn(layout.num_tokens, 2, 3, 8, generator=seeded).transpose(0, 1)
    slots = tile(x, layout)
    blocks = tokens_of_blocks(layout.grid, layout.tile, layout.prefix)
    for i, block in enumerate(blocks):
        part = slots[:, :, BLOCK * i : BLOCK * (i + 1)]
        assert torch.equal(part[:, :, : len(block)], x[:, block].transpose(1, 2))
        assert not part[:, :, len(block) :].any()
    assert torch.equal(untile(slots, layout), x)


def test_tiling_has_the_gradient_of_a_permutation(seeded: torch.Generator) -> None:
    layout = VSALayout((2, 3, 3), (2, 2, 2))
    x = torch.randn(1, 18, 1, 2, generator=seeded, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tile(x, layout), x)
    slots = torch.randn(1, 1, layout.padded, 1, generator=seeded, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: untile(x, layout), slots.requires_grad_())


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 64 tokens"):
        VSALayout((4, 4, 4), (4, 5, 4))
    with pytest.raises(ValueError, match="grid must be"):
        VSALayout((4, 0, 4))
    with pytest.raises(ValueError, match="prefix must be 0"):
        VSALayout((4, 4, 4), prefix=-1)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        VSALayout((4, 4, 4)).topk(1.0)
    with pytest.raises(ValueError, match="layout's 64 tokens"):
        tile(torch.zeros(1, 63, 1, 8), VSALayout((4, 4, 4)))
    with pytest.raises(ValueError, match="must be"):
        untile(torch.zeros(1, 1, 63, 8), VSALayout((4, 4, 4)))
