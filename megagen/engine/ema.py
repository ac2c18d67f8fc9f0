"""Moving average of a role's weights, in fp32, sharded as the optimizer's masters are.

``a <- d a + (1 - d) w`` after each update, from the fp32 masters: with bf16 weights the
increments of a slow average would be lost to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagen.engine.optimizer import Optimizer
from megagen.engine.settings import EMASettings
from megagen.parallel.mesh import Mesh


class EMA:
    """The average of the trainable parameters of one role.

    Args:
        settings: decay and start.
        chunks: the role's unwrapped chunks.
        optimizer: whose masters are averaged.
        mesh: the role's layout.
        sync_weights: makes the chunks' parameters current.
    """

    def __init__(
        self,
        settings: EMASettings,
        chunks: Sequence[nn.Module],
        optimizer: Optimizer,
        mesh: Mesh,
        sync_weights: Callable[[], None],
    ) -> None:
        self.settings, self._chunks, self._mesh = settings, list(chunks), mesh
        self._optimizer, self._sync_weights = optimizer, sync_weights
        self._masters = list(optimizer.masters())
        self._shards = [master.values.clone() for master in self._masters]
        is_sharded = optimizer.settings.use_distributed_optimizer
        self._group = mesh.pg.dp_cp if is_sharded and mesh.pg.dp_cp.size() > 1 else None

    @torch.no_grad()
    def reset(self) -> None:
        """The average becomes the weights."""
        for shard, master in zip(self._shards, self._masters, strict=True):
            shard.copy_(master.values)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights; called after each update that was not skipped."""
        if self._optimizer.num_updates <= self.settings.start_step:
            self.reset()
        elif self._shards:
            values = [master.values for master in self._masters]
            torch._foreach_lerp_(self._shards, values, 1 - self.settings.decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The chunks' parameters are the average inside, and what they were after it."""
        self._sync_weights()
        parameters = [p for chunk in self._chunks for _, p in _trainable(chunk)]
        with torch.no_grad():
            before = [p.detach().clone() for p in parameters]
            for chunk in self._chunks:
                for _, parameter, average in self._whole(chunk):
                    parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)

    def _whole(self, chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """(name, parameter, its whole average in fp32) of a chunk; collective over dp x cp."""
        own = {
            master.parameter: (master.start, shard)
            for master, shard in zip(self._masters, self._shards, strict=True)
        }
        for name, parameter in _trainable(chunk):
            whole = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter in own:
                start, shard = own[parameter]
                whole.view(-1)[start : start + shard.numel()] = shard
            if self._group is not None:
                dist.all_reduce(whole, group=self._group)
            yield name, parameter, whole

    @torch.no_grad()
    def sharded_state(
        self, index: int, chunk_state: dict[str, Any], prefix: str, *, is_loading: bool
    ) -> dict[str, Any]:
        """The average of chunk ``index`` as sharded tensors.

        Args:
            index: of the chunk.
            chunk_state: the chunk's own sharded state, whose keys begin with ``prefix``.
            prefix: the role's, with its dot; ``ema.`` is put behind it.
            is_loading: the values do not matter yet.
        """
        chunk = self._chunks[index]
        wholes = _empty(chunk) if is_loading else self._whole(chunk)
        return {
            name: replace(
                chunk_state[prefix + name],
                key=f"{prefix}ema.{name}",
                data=whole,
                dtype=torch.float32,
            )
            for name, _, whole in wholes
        }

    @torch.no_grad()
    def load_state(self, index: int, state: dict[str, Tensor]) -> None:
        """What ``sharded_state`` gave for chunk ``index``, filled."""
        names = {p: name for name, p in _trainable(self._chunks[index])}
        for master, shard in zip(self._masters, self._shards, strict=True):
            if master.parameter in names:
                whole = state[names[master.parameter]].view(-1)
                shard.copy_(whole[master.start : master.start + shard.numel()])


def _empty(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    for name, parameter in _trainable(chunk):
        yield name, parameter, torch.empty_like(parameter, dtype=torch.float32)


def _trainable(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in chunk.named_parameters() if p.requires_grad)
