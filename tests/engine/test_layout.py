"""Which layers sit on which stage."""

from __future__ import annotations

import pytest

from megagen.core.errors import ConfigError
from megagen.engine.layout import rank_chunks, stage_layers
from megagen.parallel.dims import ParallelDims


@pytest.mark.parametrize("num_layers", [6, 7, 30])
@pytest.mark.parametrize("stages", [(1, None), (2, None), (3, 2), (2, 3)])
def test_every_layer_once_in_order(num_layers: int, stages: tuple[int, int | None]) -> None:
    dims = ParallelDims(pp_size=stages[0], virtual_pp_size=stages[1])
    chunks = [rank_chunks(num_layers, dims, rank) for rank in range(dims.pp_size)]
    in_order = [chunks[i % dims.pp_size][i // dims.pp_size] for i in range(sum(map(len, chunks)))]
    assert [layer for chunk in in_order for layer in chunk.layers] == list(range(num_layers))
    assert [chunk.pre_process for chunk in in_order] == [True] + [False] * (len(in_order) - 1)
    assert [chunk.post_process for chunk in in_order] == [False] * (len(in_order) - 1) + [True]
    sizes = [len(chunk.layers) for chunk in in_order]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_uneven_stages_are_taken_as_given() -> None:
    dims = ParallelDims(pp_size=2, virtual_pp_size=2, pipeline_layers=(1, 3, 2, 1))
    assert [c.layers for c in rank_chunks(7, dims, 1)] == [range(1, 4), range(6, 7)]
    assert [c.vp_stage for c in rank_chunks(7, dims, 1)] == [0, 1]


@pytest.mark.parametrize("layers", [(3, 3), (7,), (7, 0), (4, 4, -1)])
def test_a_split_that_does_not_fit_names_its_key(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"pipeline_layers.*sum to 7"):
        stage_layers(7, ParallelDims(pp_size=2, pipeline_layers=layers))
    with pytest.raises(ConfigError, match="8 stages for 7 layers"):
        stage_layers(7, ParallelDims(pp_size=4, virtual_pp_size=2))
