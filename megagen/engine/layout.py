"""Which layers sit on which (virtual) pipeline stage."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megagen.core.errors import ConfigError
from megagen.parallel.dims import ParallelDims


@dataclass(frozen=True)
class Chunk:
    """One piece of the network on one rank.

    Args:
        layers: global numbers of its layers.
        pre_process: it begins the network.
        post_process: it ends the network.
        vp_stage: its number on this rank; None where a rank has one chunk.
    """

    layers: range
    pre_process: bool
    post_process: bool
    vp_stage: int | None


def stage_layers(
    num_layers: int, dims: ParallelDims, where: str = "training.distributed"
) -> list[range]:
    """The layers of every virtual stage in pipeline order.

    Raises:
        ConfigError: ``pipeline_layers`` does not fit, or there are more stages than layers.
    """
    num_stages = dims.pp_size * dims.num_chunks
    sizes = dims.pipeline_layers
    if sizes is None:
        if num_layers < num_stages:
            raise ConfigError(
                f"pp_size {dims.pp_size} x virtual_pp_size {dims.num_chunks} = {num_stages} stages "
                f"for {num_layers} layers.",
                remedy="Lower pp_size or virtual_pp_size.",
                where=f"{where}.pp_size",
            )
        base, rest = divmod(num_layers, num_stages)
        sizes = tuple(base + (stage < rest) for stage in range(num_stages))
    if len(sizes) != num_stages or sum(sizes) != num_layers or min(sizes) < 1:
        raise ConfigError(
            f"found {list(sizes)}: {len(sizes)} stages of {sum(sizes)} layers.",
            remedy=f"Give {num_stages} numbers from 1 up that sum to {num_layers}.",
            where=f"{where}.pipeline_layers",
        )
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def layer_stage(num_layers: int, dims: ParallelDims, layer: int) -> int:
    """The pipeline rank that holds ``layer``."""
    stages = stage_layers(num_layers, dims)
    return next(s for s, layers in enumerate(stages) if layer in layers) % dims.pp_size


def rank_chunks(num_layers: int, dims: ParallelDims, pp_rank: int) -> list[Chunk]:
    """The chunks of one pipeline rank: virtual stages ``pp_rank``, ``pp_size + pp_rank``..."""
    stages = stage_layers(num_layers, dims)
    return [
        Chunk(
            layers=stages[stage],
            pre_process=stage == 0,
            post_process=stage == len(stages) - 1,
            vp_stage=number if dims.num_chunks > 1 else None,
        )
        for number, stage in enumerate(range(pp_rank, len(stages), dims.pp_size))
    ]
