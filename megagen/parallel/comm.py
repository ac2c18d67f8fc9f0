"""Differentiable collectives of our own: exact gradients, contiguous buffers, any device.

Each is a function of a tensor and a process group, and the identity on a group of one.
Legend: S tokens (sharded), B batch, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of ``x`` over ``group`` in a new contiguous tensor; not differentiable."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """The ranks' ``x`` concatenated along dim 0; not differentiable."""
    x = x.contiguous()
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x, group=group)
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's slice along dim 0 of the sum of ``x`` over ``group``; not differentiable."""
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def own_slice(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's equal part of ``x`` along dim 0."""
    size = x.shape[0] // group.size()
    return x[group.rank() * size : (group.rank() + 1) * size]


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad, ctx.group), None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return own_slice(grad, ctx.group).contiguous(), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return own_slice(x, group).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_gather(grad, ctx.group), None


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return reduce_scatter(grad, ctx.group), None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_gather(grad, ctx.group), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllToAll.apply(grad, ctx.group), None


def copy_to_tp(x: Tensor, group: ProcessGroup) -> Tensor:
    """Identity; the gradient is summed over ``group``.

    For what is replicated over TP and used on other heads, columns or token shards by each rank.
    megatron-core 0.16.1's own version drops the sum where the gradient is not contiguous.
    """
    return x if group.size() == 1 else _CopyToTP.apply(x, group)


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over ``group``; the gradient passes unchanged.

    ``copy_to_tp(sum_over(x, group), group)`` sums in both directions, as a statistic over all heads
    that every rank uses for its own heads needs.
    """
    return x if group.size() == 1 else _SumOver.apply(x, group)


def gather_tokens(x_SBD: Tensor, group: ProcessGroup) -> Tensor:
    """Token shards made whole; the gradient is this rank's slice, counted once.

    For a result that all ranks of ``group`` use in the same way (a loss on the whole prediction).
    """
    return x_SBD if group.size() == 1 else _GatherTokens.apply(x_SBD, group)


def scatter_tokens(x_SBD: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's token shard of a whole tensor; the gradient is the ranks' gradients gathered."""
    return x_SBD if group.size() == 1 else _ScatterTokens.apply(x_SBD, group)


def gather_keys(x_SBD: Tensor, group: ProcessGroup) -> Tensor:
    """Token shards made whole; the gradient is this rank's slice of the sum over ``group``.

    For a result that each rank uses differently (keys that meet each rank's own queries).
    """
    return x_SBD if group.size() == 1 else _GatherKeys.apply(x_SBD, group)


def sum_scatter(x_SBD: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's token shard of the sum over ``group``; the gradient is the shards' gathered."""
    return x_SBD if group.size() == 1 else _SumScatter.apply(x_SBD, group)


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """Part ``i`` along dim 0 goes to rank ``i``; part ``i`` of the result came from rank ``i``."""
    return x if group.size() == 1 else _AllToAll.apply(x, group)
