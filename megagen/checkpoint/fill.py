"""Puts the tensors of a weight store into a role's chunks, one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megagen.models.base import ModelPlugin, WeightStore


@torch.no_grad()
def fill(
    plugin: ModelPlugin, chunks: Sequence[nn.Module], tp_group: ProcessGroup, store: WeightStore
) -> None:
    """Read every parameter of ``chunks``; a rank holds its shard and the tensor being read."""
    part, num_parts = tp_group.rank(), tp_group.size()
    for chunk in chunks:
        sources = plugin.weights(chunk)
        for name, parameter in chunk.named_parameters():
            source = sources[name]
            shards = [
                store.read(tensor, source.tp_dim, part, num_parts)
                if source.tp_dim is not None
                else store.read(tensor, None, 0, 1)
                for tensor in source.names
            ]
            parameter.copy_(source.assemble(shards))
