"""Puts the tensors of a weight store into a role's chunks, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megagen.models.base import ModelPlugin, WeightSource, WeightStore


@torch.no_grad()
def fill(
    plugin: ModelPlugin, chunks: Sequence[nn.Module], tp_group: ProcessGroup, store: WeightStore
) -> None:
    """Read every parameter of ``chunks``; a rank holds its shard and the tensor being read."""
    for chunk in chunks:
        fill_parameters(chunk, plugin.weights(chunk), tp_group, store)


@torch.no_grad()
def fill_parameters(
    chunk: nn.Module,
    sources: Mapping[str, WeightSource],
    tp_group: ProcessGroup,
    store: WeightStore,
) -> None:
    """Read the parameters of one chunk that ``sources`` names."""
    part, num_parts = tp_group.rank(), tp_group.size()
    for name, source in sources.items():
        shards = [
            store.read(tensor, source.tp_dim, part, num_parts)
            if source.tp_dim is not None
            else store.read(tensor, None, 0, 1)
            for tensor in source.names
        ]
        chunk.get_parameter(name).copy_(source.assemble(shards))
