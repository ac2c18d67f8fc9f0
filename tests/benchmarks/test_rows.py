"""The rows' sizes and work against published numbers and against counting."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import lists
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.rows import (
    CPU_ROWS,
    GPU_ROWS,
    HEAD_DIM,
    LENGTH_ROWS,
    SUITES,
    Row,
    dense_work,
    sparse_work,
)
from megagen.kernels.vsa import BlockIndex, VSALayout

# tokens, slots, blocks, sparsity, TFLOP of a forward: from the models' shapes, by hand
PUBLISHED = {
    "R1_wan1.3b_480p-k125": (32_760, 39_936, 624, 0.8, 1.96),
    "R1_wan1.3b_480p-k63": (32_760, 39_936, 624, 0.9, 0.99),
    "R2_wan14b_480p-k63": (32_760, 39_936, 624, 0.9, 3.30),
    "R3_wan14b_720p-k288": (75_600, 92_160, 1440, 0.8, 34.8),
    "R3_wan14b_720p-k180": (75_600, 92_160, 1440, 0.875, 21.7),
    "R3_wan14b_720p-k144": (75_600, 92_160, 1440, 0.9, 17.4),
    "R4_wan14b_720p_sp8-k144": (75_600, 92_160, 1440, 0.9, 2.17),
    "R5_hunyuan_30x48x80-k240": (115_200, 122_880, 1920, 0.875, 23.2),
    "R5_hunyuan_30x48x80-k192": (115_200, 122_880, 1920, 0.9, 18.6),
    "R6_hunyuan_720p129f-k216": (118_800, 138_240, 2160, 0.9, 23.5),
    "R7_paper_16x28x52-k32": (23_296, 23_296, 364, 0.9125, 0.29),
    "R8_wan14b_720p_354-k126": (75_600, 80_640, 1260, 0.9, 13.3),
    "R9_wan1.3b_480p_354-k55": (32_760, 34_944, 546, 0.9, 0.76),
}
LENGTHS = {32_768: 1.65, 49_152: 3.71, 65_536: 6.60, 81_920: 10.31, 98_304: 14.84, 114_688: 20.20}


def test_every_published_row_is_there() -> None:
    assert {row.label for row in GPU_ROWS} == set(PUBLISHED)


@pytest.mark.parametrize("row", GPU_ROWS, ids=lambda r: r.label)
def test_sizes_and_flop_are_the_published_ones(row: Row) -> None:
    tokens, slots, blocks, sparsity, tflop = PUBLISHED[row.label]
    layout = row.layout
    assert (layout.num_tokens, layout.padded, layout.num_blocks) == (tokens, slots, blocks)
    assert layout.topk(sparsity) == row.selected
    assert row.flop / 1e12 == pytest.approx(tflop, rel=0.02)


@pytest.mark.parametrize("row", LENGTH_ROWS, ids=lambda r: r.label)
def test_the_sweep_of_lengths_keeps_its_density(row: Row) -> None:
    assert row.flop / 1e12 == pytest.approx(LENGTHS[row.layout.padded], rel=0.005)
    assert row.layout.padded == row.layout.num_tokens


@pytest.mark.parametrize("name", SUITES)
def test_rows_of_a_suite_have_different_labels(name: str) -> None:
    labels = [row.label for row in SUITES[name]]
    assert len(set(labels)) == len(labels)


def test_the_cpu_rows_are_sparse_by_an_eighth() -> None:
    for row in CPU_ROWS:
        assert row.selected == row.layout.num_blocks // 8


def test_fewer_heads() -> None:
    row = GPU_ROWS[0]
    assert row.with_heads(0) == row
    assert row.with_heads(4).heads == 4
    assert row.with_heads(999).heads == row.heads


def test_work_is_what_counting_gives(seeded: torch.Generator) -> None:
    layout = VSALayout((5, 6, 10))
    index = lists.random_lists(layout, 3, 4, seeded)
    sizes = layout.tables().sizes_n
    pairs = tokens = 0
    for head in index.idx_BHqM[0].tolist():
        for query, keys in enumerate(head):
            for key in keys:
                pairs += 64 * 64
                tokens += int(sizes[query]) * int(sizes[key])
    work = sparse_work(index, sizes)
    assert work.blocks == 4 * HEAD_DIM * pairs
    assert work.tokens == 4 * HEAD_DIM * tokens


def test_all_blocks_do_the_dense_work_on_real_tokens() -> None:
    row = Row("ragged", (5, 6, 10), 3, 4)
    every = lists.every_block(row.layout, row.heads, torch.device("cpu"))
    assert sparse_work(every, row.layout.tables().sizes_n).tokens == dense_work(row).tokens


@pytest.mark.parametrize("draw", [lists.random_lists, lists.local_lists])
def test_lists_are_ascending_and_full(draw, seeded: torch.Generator) -> None:  # type: ignore[no-untyped-def]
    layout = VSALayout((9, 12, 16))
    index = draw(layout, 2, 7, seeded)
    assert index.idx_BHqM.shape == (1, 2, layout.num_blocks, 7)
    assert (index.idx_BHqM.diff(dim=-1) > 0).all()
    assert 0 <= int(index.idx_BHqM.min()) <= int(index.idx_BHqM.max()) < layout.num_blocks
    assert (index.num_BHq == 7).all()
    assert index.idx_BHqM.dtype == index.num_BHq.dtype == torch.int32


def test_a_local_list_has_its_neighbours(seeded: torch.Generator) -> None:
    layout = VSALayout((12, 12, 12))  # 3 x 3 x 3 blocks
    index = lists.local_lists(layout, 1, 12, seeded)
    middle = set(index.idx_BHqM[0, 0, 13].tolist())
    assert {13, 4, 10, 12, 14, 16, 22} <= middle  # itself and the six that share a face


def test_overlap_is_what_counting_gives(seeded: torch.Generator) -> None:
    layout = VSALayout((4, 12, 20))  # 15 blocks: the last has no partner
    index = lists.random_lists(layout, 2, 5, seeded)
    shared = listed = 0
    for head in index.idx_BHqM[0].tolist():
        for first in range(0, 14, 2):
            shared += len(set(head[first]) & set(head[first + 1]))
            listed += 5
    assert lists.overlap(index, 15) == pytest.approx(shared / listed)
    same = BlockIndex(index.idx_BHqM[:, :, :1].expand(-1, -1, 15, -1), index.num_BHq)
    assert lists.overlap(same, 15) == 1


def test_orders_of_tokens_come_back(seeded: torch.Generator) -> None:
    row = Row("ragged", (5, 6, 10), 2, 3)
    x = torch.randn(1, 300, 2, HEAD_DIM, generator=seeded)
    index = lists.random_lists(row.layout, 2, 3, seeded)
    problem = Problem(row, "random", index, x, x, x, x, x)
    for order in ("slots", "bhsd", "bshd"):
        tiled = problem.ordered(x, order)
        for head in range(2):
            assert torch.equal(problem.head(tiled, order, head), x[0, :, head])
        assert all(leaf.requires_grad for leaf in problem.leaves(order, has_gate=True))
        assert not x.requires_grad
