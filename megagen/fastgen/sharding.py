"""Tensors that may be shards: read, gathered and written without caring which.

FSDP2 (``torch.distributed.fsdp.fully_shard``) makes a module's parameters DTensors: each rank holds
its part ("local") of the whole. They are told apart by a callable ``full_tensor``, so that nothing
of ``torch.distributed.tensor`` is imported where nothing is sharded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

_CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."


def clean_name(name: str) -> str:
    """``name`` without what torch's activation checkpoint wrapper puts into it."""
    return name.replace(_CHECKPOINT_PREFIX, "")


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a DTensor."""
    return callable(getattr(tensor, "full_tensor", None))


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; ``tensor`` itself where it is not sharded.

    What has a ``full_tensor`` and no ``to_local`` (another library's shards) is its own part.
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather(tensor: Tensor) -> Tensor:
    """The whole of ``tensor`` on every rank, where the mesh communicates; itself if not sharded.

    A collective of the tensor's mesh. Shards that FSDP2 keeps on the CPU (``CPUOffloadPolicy``) go
    through the mesh's device; a mesh of CPUs needs no other device.
    """
    if not is_sharded(tensor):
        return tensor
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is not None and mesh.device_type != tensor.device.type:
        tensor = cast("DTensor", tensor.to(mesh.device_type))
    return tensor.full_tensor()


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put its sharded parameters back in place of gathered ones.

    After a forward pass without backward the root's own parameters are left gathered: they would be
    read as plain tensors, and what is written into them is lost. No communication.
    """
    for module in model.modules():
        if hasattr(type(module), "unshard") and hasattr(type(module), "reshard"):
            cast("FSDPModule", module).reshard()


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor, name: str) -> None:
    """Write ``source`` into ``target``, in target's dtype, device and sharding.

    Equally sharded: each rank copies its own part. A plain source into a sharded target: each rank
    cuts out its part; no communication. A sharded source that is placed otherwise, or whose target
    is plain: a collective of the source's mesh.

    Args:
        target: any shape; a leaf that requires a gradient is allowed.
        source: target's (whole) shape.
        name: for the message.

    Raises:
        RuntimeError: the shapes differ.
    """
    if target.shape != source.shape:
        raise RuntimeError(
            f"{name}: cannot copy shape {tuple(source.shape)} into {tuple(target.shape)}."
        )
    if not is_sharded(target) or not hasattr(target, "placements"):
        target.copy_(gather(source))
        return
    local(target).copy_(_part_for(target, source))


def _part_for(target: DTensor, source: Tensor) -> Tensor:
    """This rank's part of ``source``, cut as ``target`` is."""
    mesh, placements = target.device_mesh, target.placements
    if is_sharded(source):
        if getattr(source, "device_mesh", None) == mesh:
            if source.placements != placements:
                source = source.redistribute(mesh, placements)
            return source.to_local()
        source = gather(source)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(source.detach(), mesh, placements, src_data_rank=None).to_local()
