"""Sharded state of a pipeline chunk for megatron-core's distributed checkpoints.

Built from the parameters' own marks (``tensor_model_parallel``, ``partition_dim``,
``pipeline_parallel``), so that a chunk need not be a tree of ``MegatronModule``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from torch import nn


def sharded_parameters(
    chunk: nn.Module, prefix: str, pg: Any, *, dp_cp_group: Any, replica_stage: int
) -> dict[str, Any]:
    """``prefix + name`` to megatron-core's ``ShardedTensor`` for each parameter and buffer.

    Args:
        chunk: parameter names carry the global layer number, so keys do not depend on the layout.
        prefix: of the keys.
        pg: process groups of the network.
        dp_cp_group: ranks that hold the same shard.
        replica_stage: number of this chunk among those that hold a copy of the condition embedders,
            0 the owner.
    """
    groups = {"tp_group": pg.tp, "dp_cp_group": dp_cp_group}
    sharded: dict[str, Any] = {}
    for name, value in chunk.state_dict(keep_vars=True).items():
        key = prefix + name
        if name.endswith("_extra_state"):  # Transformer Engine's fp8 scales; megatron-core's: None
            if isinstance(value, torch.Tensor) and value.numel() > 0:
                ranks = (0, pg.tp.rank(), dp_cp_group.rank())
                sharded[key] = make_sharded_object_for_checkpoint(value, key, replica_id=ranks)
        elif getattr(value, "tensor_model_parallel", False):
            sharded[key] = make_tp_sharded_tensor_for_checkpoint(
                value,
                key,
                value.partition_dim,
                **groups,
            )
        else:
            stage = replica_stage if getattr(value, "pipeline_parallel", False) else 0
            sharded[key] = make_sharded_tensor_for_checkpoint(
                value, key, replica_id=(stage, pg.tp.rank(), dp_cp_group.rank()), **groups
            )
    return sharded
