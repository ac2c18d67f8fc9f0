"""Lists of blocks and their transpose against loops."""

from __future__ import annotations

import pytest
import torch

from megagen.kernels import BlockIndex, index_from_map, map_from_index, transpose_index
from megagen.kernels.vsa import dispatch


def drawn(generator: torch.Generator, n_q: int = 7, n_k: int = 11) -> torch.Tensor:
    """A map with an empty row, a full one, and a key block that nobody lists."""
    chosen = torch.rand(2, 3, n_q, n_k, generator=generator) < 0.4
    chosen[0, 1, 2], chosen[1, 2, 0] = False, True
    chosen[..., n_k - 2] = False
    return chosen


def test_a_map_becomes_lists_and_comes_back(seeded: torch.Generator) -> None:
    chosen = drawn(seeded)
    index = index_from_map(chosen)
    assert index.idx_BHqM.dtype == index.num_BHq.dtype == torch.int32
    assert torch.equal(map_from_index(index, chosen.size(-1)), chosen)
    for row, num, wanted in zip(
        index.idx_BHqM.flatten(0, 2).tolist(),
        index.num_BHq.flatten().tolist(),
        chosen.flatten(0, 2).tolist(),
        strict=True,
    ):
        assert row[:num] == [j for j, is_chosen in enumerate(wanted) if is_chosen]
        assert not any(row[num:])


def test_an_index_may_be_narrower_than_the_keys() -> None:
    idx = torch.tensor([[[[1, 4], [3, 0]]]], dtype=torch.int32)
    index = BlockIndex(idx, torch.tensor([[[2, 1]]], dtype=torch.int32))
    found = map_from_index(index, 5)[0, 0].int().tolist()
    assert found == [[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_transpose_lists_queries_in_order(backend: str, seeded: torch.Generator) -> None:
    if dispatch.backend(backend).serves(torch.zeros(64)) is not None:
        pytest.skip(f"no {backend} backend here")
    chosen = drawn(seeded)
    index = index_from_map(chosen)
    transpose = dispatch.function(backend, "transpose_index")
    indptr, rows = transpose(index.idx_BHqM.contiguous(), index.num_BHq, chosen.size(-1))
    assert indptr.dtype == rows.dtype == torch.int32
    for b in range(2):
        for h in range(3):
            for j in range(chosen.size(-1)):
                part = rows[b, h, indptr[b, h, j] : indptr[b, h, j + 1]].tolist()
                assert part == chosen[b, h, :, j].nonzero().flatten().tolist()
    assert torch.equal(indptr[..., -1], index.num_BHq.sum(-1).int())


def test_the_public_transpose_is_the_same(seeded: torch.Generator) -> None:
    index = index_from_map(drawn(seeded))
    found = transpose_index(index, 11)
    reference = dispatch.function("reference", "transpose_index")
    expected = reference(index.idx_BHqM, index.num_BHq, 11)
    assert all(map(torch.equal, found, expected))
