"""Process groups of one layout.

Ranks are laid out with tp fastest, then cp, dp, pp. A group is a set of axes: the ranks that differ
in these axes only. Axes of size 1 do not count, so equal groups are made once.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megagen.core.errors import ConfigError
from megagen.parallel.dims import ParallelDims

AXES = ("pp", "dp", "cp", "tp")
"""The axes from slowest to fastest."""
RNG_SEED = 1234
"""Seed of megatron-core's own generators, from which megagen draws nothing."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """A layout over all ranks of the run, with its process groups.

    Args:
        dims: the degrees.
        pg: megatron-core's ``ProcessGroupCollection`` with every field that it reads. ``pg.hcp`` is
            ``[a2a group, ring group]`` for ``a2a+p2p``, else None.
        replica: the ranks that hold one replica of the network (tp x cp x pp).
        tp_rank: this rank's place along tp.
        cp_rank: this rank's place along cp.
        dp_rank: this rank's place along dp: which part of the data it holds.
        pp_rank: this rank's pipeline stage.
        dp_size: data-parallel replicas.
    """

    dims: ParallelDims
    pg: Any
    replica: ProcessGroup
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    dp_size: int

    @staticmethod
    def build(dims: ParallelDims) -> Mesh:
        """The mesh of ``dims`` over all ranks; collective. Equal layouts of one run share it.

        Raises:
            ConfigError: the ranks of the run do not divide, or ``cp_a2a_size`` does not fit.
        """
        return _build(dims, dist.group.WORLD)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first pipeline stage."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage."""
        return self.pp_rank == self.dims.pp_size - 1

    def data_ranks(self) -> list[int]:
        """The data-parallel rank of every global rank."""
        sizes = _sizes(self.dims, dist.get_world_size())
        grid = torch.arange(dist.get_world_size()).view(sizes)
        data = torch.arange(self.dp_size).view(1, -1, 1, 1).expand_as(grid)
        return [int(rank) for rank in data.flatten()]


def _sizes(dims: ParallelDims, world_size: int) -> tuple[int, int, int, int]:
    return dims.pp_size, dims.dp_size(world_size), dims.cp_size, dims.tp_size


class _Groups:
    """Makes the groups of one grid, each set of ranks once."""

    def __init__(self, sizes: tuple[int, int, int, int], world: ProcessGroup) -> None:
        self._grid = torch.arange(world.size()).view(sizes)
        self._made: dict[frozenset[str], ProcessGroup] = {
            frozenset(a for a, n in zip(AXES, sizes, strict=True) if n > 1): world
        }

    def over(self, axes: Collection[str]) -> ProcessGroup:
        """This rank's group over ``axes``."""
        sizes = dict(zip(AXES, self._grid.shape, strict=True))
        key = frozenset(axis for axis in axes if sizes[axis] > 1)
        if key not in self._made:
            inner = [i for i, axis in enumerate(AXES) if axis in key]
            outer = [i for i, axis in enumerate(AXES) if axis not in key]
            count = torch.Size(self._grid.shape[i] for i in inner).numel()
            rows = self._grid.permute(*outer, *inner).reshape(-1, count)
            self._made[key] = make_group(rows.tolist())
        return self._made[key]

    def split_cp(self, a2a_size: int) -> list[ProcessGroup]:
        """cp cut into runs of ``a2a_size`` ranks and the ranks with one place in each run."""
        rows = self._grid.transpose(2, 3).reshape(-1, self._grid.shape[2])
        runs = rows.view(rows.shape[0], -1, a2a_size)
        rings = runs.transpose(1, 2)
        return [make_group(part.reshape(-1, part.shape[2]).tolist()) for part in (runs, rings)]


def make_group(partition: list[list[int]]) -> ProcessGroup:
    """This rank's group of a partition of all ranks; collective."""
    group, _ = dist.new_subgroups_by_enumeration(partition)
    assert group is not None, "the partition does not hold every rank"
    return group


@functools.cache
def _build(dims: ParallelDims, world: ProcessGroup) -> Mesh:
    from megatron.core.process_groups_config import ProcessGroupCollection

    sizes = _sizes(dims, world.size())
    _initialize_megatron()
    groups = _Groups(sizes, world)
    alone = groups.over(()) if world.size() > 1 else world
    pg = ProcessGroupCollection(
        **{axis: groups.over((axis,)) for axis in AXES},
        mp=groups.over(("tp", "pp")),
        tp_cp=groups.over(("tp", "cp")),
        dp_cp=groups.over(("dp", "cp")),
        tp_dp_cp=groups.over(("tp", "dp", "cp")),
        # the distributed optimizer shards over dp x cp; with tp and pp its norm is over all ranks
        intra_dp_cp=groups.over(("dp", "cp")),
        intra_dist_opt=world,
        inter_dist_opt=None,
        # None would fall back to megatron-core's global groups
        embd=alone,
        pos_embd=alone,
        ep=alone,
        expt_tp=alone,
        tp_ep=alone,
        tp_ep_pp=groups.over(("tp", "pp")),
        expt_dp=groups.over(("dp", "cp")),
        intra_expt_dp=groups.over(("dp", "cp")),
        hcp=_hierarchical(groups, dims),
    )
    return Mesh(
        dims=dims,
        pg=pg,
        replica=groups.over(("tp", "cp", "pp")),
        tp_rank=pg.tp.rank(),
        cp_rank=pg.cp.rank(),
        dp_rank=pg.dp.rank(),
        pp_rank=pg.pp.rank(),
        dp_size=sizes[1],
    )


def _hierarchical(groups: _Groups, dims: ParallelDims) -> list[ProcessGroup] | None:
    if dims.cp_comm_type != "a2a+p2p":
        return None
    if dims.cp_size == 1:
        return [groups.over(())] * 2
    size = dims.cp_a2a_size
    if size is None or size < 1 or dims.cp_size % size:
        raise ConfigError(
            f"cp_a2a_size is {size} and cp_size {dims.cp_size}, but a2a+p2p cuts cp into runs of "
            "cp_a2a_size ranks.",
            remedy="Set cp_a2a_size to a divisor of cp_size.",
            where="training.distributed.cp_a2a_size",
        )
    return groups.split_cp(size)


def _initialize_megatron() -> None:
    """What megatron-core keeps globally and needs beside the groups that it is given.

    The global groups are those of plain data parallelism: code that fell back to them instead of
    the role's would miss its reductions, and every test with TP would show it.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(RNG_SEED)
