"""Weights between the chunks of a network and the diffusers layout.

No rank ever holds more than its own shard and one tensor. Legend: tp and pp as in
``parallel/dims.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagen.checkpoint.fill import fill
from megagen.checkpoint.store import STEM, DiffusersStore, InitialStore, check_weights
from megagen.checkpoint.writer import DirectoryWriter
from megagen.core import process
from megagen.core.errors import CheckpointError
from megagen.models.base import ModelPlugin, WeightSource, WeightStore

__all__ = ["DiffusersStore", "InitialStore", "check_weights", "load_weights", "save_weights"]


def load_weights(
    plugin: ModelPlugin, chunks: Sequence[nn.Module], mesh: Any, store: WeightStore
) -> None:
    """Fill the chunks' parameters; each rank reads its own shards.

    Args:
        plugin: of the network.
        chunks: this rank's pipeline chunks, unwrapped.
        mesh: ``mesh.pg.tp`` is read.
        store: where from.

    Raises:
        CheckpointError: see ``check_weights``; nothing has been changed then.
    """
    check_weights(plugin, store)
    fill(plugin, chunks, mesh.pg.tp, store)


@dataclass(frozen=True)
class _Entry:
    """One parameter of one stage, as rank 0 must know it to receive what it is made of."""

    stage: int
    chunk: int
    parameter: str
    dtype: torch.dtype
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@torch.no_grad()
def save_weights(
    plugin: ModelPlugin,
    chunks: Sequence[nn.Module],
    mesh: Any,
    directory: str | Path,
    *,
    max_shard_bytes: int = 5 * 10**9,
    dtype: torch.dtype | None = None,
    base_dir: str | Path | None = None,
) -> None:
    """Write the network, adapters merged, as a diffusers directory. Collective over all ranks.

    Parameters are gathered over TP one at a time and sent to rank 0, which writes them. The
    directory appears whole (staged beside, then renamed); one that holds weights is replaced.

    Args:
        plugin: of the network.
        chunks: this rank's pipeline chunks, unwrapped, with current parameters.
        mesh: ``mesh.pg.tp``, ``.pp`` and ``.dp_cp`` are read.
        directory: to make.
        max_shard_bytes: largest file, unless one tensor is larger.
        dtype: of the files; None: of the parameters.
        base_dir: directory whose ``config.json`` is kept; None: the plugin's own config is written.

    Raises:
        CheckpointError: the directory holds other things, or cannot be written.
    """
    directory = Path(directory)
    failure = [_refusal(directory) if process.is_main() else None]
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise CheckpointError(failure[0], remedy="Choose another directory.", where=str(directory))
    if mesh.pg.dp_cp.rank() == 0:  # one replica writes
        entries = _entries(plugin, chunks, mesh)
        sources = [plugin.weights(chunk) for chunk in chunks]
        writer = None
        if process.is_main():
            dtypes = {n: dtype or entry.dtype for entry in entries for n in entry.names}
            writer = DirectoryWriter(plugin, directory, dtypes, max_shard_bytes)
        for entry in entries:
            _move(entry, sources, chunks, mesh, writer)
        if writer is not None:
            writer.finish(plugin, Path(base_dir) if base_dir is not None else None)
    dist.barrier()


def _refusal(directory: Path) -> str | None:
    if not directory.exists():
        return None
    if not directory.is_dir():
        return "is a file."
    other = [
        f.name
        for f in directory.iterdir()
        if not re.match(rf"config\.json|sampling\.json|{STEM}", f.name)
    ]
    return (
        f"holds {other[0]!r}, which is no part of the weights; it is left alone." if other else None
    )


def _entries(plugin: ModelPlugin, chunks: Sequence[nn.Module], mesh: Any) -> list[_Entry]:
    """Every parameter of all stages once, the same list on every rank of the replica."""
    own = []
    for number, chunk in enumerate(chunks):
        for name, source in plugin.weights(chunk).items():
            parameter = chunk.get_parameter(name)
            if getattr(parameter, "shared", False):
                continue  # the first stage's copy is written
            own.append(
                _Entry(
                    mesh.pg.pp.rank(), number, name, parameter.dtype, source.names, source.shapes
                )
            )
    stages: list[Any] = [None] * mesh.pg.pp.size()
    dist.all_gather_object(stages, own, group=mesh.pg.pp)
    return [entry for stage in stages for entry in stage]


def _move(
    entry: _Entry,
    sources: Sequence[dict[str, WeightSource]],
    chunks: Sequence[nn.Module],
    mesh: Any,
    writer: DirectoryWriter | None,
) -> None:
    """Gather a parameter on its stage's first TP rank, send its parts to rank 0, write them."""
    pg = mesh.pg
    parts: Sequence[Tensor] = ()
    if pg.pp.rank() == entry.stage:
        parameter = chunks[entry.chunk].get_parameter(entry.parameter)
        full = _gathered(parameter, _merged(chunks[entry.chunk], entry.parameter), pg.tp)
        if full is not None:
            parts = sources[entry.chunk][entry.parameter].split(full)
    if pg.tp.rank() != 0:
        return
    for number, (name, shape) in enumerate(zip(entry.names, entry.shapes, strict=True)):
        if pg.pp.rank() == entry.stage:
            tensor = parts[number].contiguous()
            if entry.stage != 0:
                dist.send(tensor, dist.get_global_rank(pg.pp, 0), group=pg.pp)
        elif pg.pp.rank() == 0:
            tensor = torch.empty(shape, dtype=entry.dtype, device=process.device())
            dist.recv(tensor, dist.get_global_rank(pg.pp, entry.stage), group=pg.pp)
        if writer is not None:
            writer.write(name, tensor)


def _merged(chunk: nn.Module, name: str) -> Tensor:
    """This rank's values of a parameter with what an adapter adds."""
    path, _, leaf = name.rpartition(".")
    value = chunk.get_parameter(name).detach()
    adapter: Any = getattr(chunk.get_submodule(path), "lora", None)
    if adapter is None or leaf != "weight":
        return value
    return (value.float() + adapter.delta_weight().detach()).to(value.dtype)


def _gathered(parameter: Tensor, value: Tensor, group: Any) -> Tensor | None:
    """The whole ``value`` of a parameter on the group's first rank, None on the others."""
    shard = value.contiguous()
    if group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return shard
    is_first = group.rank() == 0
    parts = [torch.empty_like(shard) for _ in range(group.size())] if is_first else None
    dist.gather(shard, parts, dst=dist.get_global_rank(group, 0), group=group)
    return torch.cat(parts, dim=parameter.partition_dim) if parts is not None else None  # type: ignore[attr-defined]
