"""Outputs of a network's blocks under any layout, and losses on them.

A tap goes with a pass through the pipeline, one a micro-batch, and sees each wanted block's output
on the rank that has computed it, outside of what is recomputed in the backward. It makes the tokens
whole over SP and CP. A loss on them is differentiated there and then; its gradient waits for the
backward to reach the block and is added to what comes from behind. So no stage needs a second
output, and a head that judges features needs no pipeline of its own.

Legend: B batch, D hidden size, T H W the token grid, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megagen.core import process
from megagen.core.errors import ConfigError
from megagen.engine.layout import layer_stage
from megagen.engine.schedule import Pipeline
from megagen.models.base import ModelPlugin, Request
from megagen.parallel.comm import gather_tokens
from megagen.parallel.mesh import Mesh

FeatureFn = Callable[[int, Tensor, Request], Tensor]
"""(place among the blocks in order, feature ``[B, D, T, H, W]``, request) -> scalar loss."""


@dataclass(eq=False)
class FeatureLoss:
    """A loss on the outputs of some blocks: the sum of ``fn`` over them.

    Args:
        blocks: numbers from 0; their order and repetitions do not matter.
        fn: runs on the ranks of the stage that holds the block, on each with the whole fp32 feature
            (so it must not talk to other ranks, nor draw what these would draw differently);
            parameters that it uses get no gradient.
        losses: filled by the pass: for each request ``[blocks]``, fp32, the same on every rank of
            a data rank.
    """

    blocks: Sequence[int]
    fn: FeatureFn
    losses: list[Tensor] = field(default_factory=list, init=False)


def in_order(plugin: ModelPlugin, blocks: Sequence[int]) -> list[int]:
    """``blocks`` sorted, each once.

    Raises:
        ConfigError: there are none, or one is not of the network.
    """
    if not blocks or not all(0 <= block < plugin.num_layers for block in blocks):
        raise ConfigError(
            f"features of blocks {list(blocks)} of a network of {plugin.num_layers} blocks.",
            remedy=f"Give one or more numbers from 0 to {plugin.num_layers - 1}.",
        )
    return sorted(set(blocks))


def templates(plugin: ModelPlugin, requests: Sequence[Request]) -> list[Tensor]:
    """Tensors without memory in the shape of each request's features ``[B, D, T, H, W]``, fp32."""
    one = torch.empty(1, device=process.device())
    shapes = [request.latents_BCTHW.shape for request in requests]
    return [one.expand(shape[0], plugin.hidden_size, *plugin.token_grid(shape)) for shape in shapes]


def whole_feature(hidden_SBD: Tensor, grid: tuple[int, int, int], mesh: Mesh) -> Tensor:
    """``[B, D, T, H, W]`` in fp32 of all ranks' tokens; the gradient is this rank's, once."""
    tokens = hidden_SBD
    if mesh.dims.sequence_parallel:
        tokens = gather_tokens(tokens, mesh.pg.tp)
    tokens = gather_tokens(tokens, mesh.pg.cp)
    frames, rows, columns = grid
    split = tokens[: frames * rows * columns].unflatten(0, grid)
    return split.permute(3, 4, 0, 1, 2).float()


class Tap:
    """Hands the outputs of some blocks on.

    Args:
        blocks: in order.
        take: (place among ``blocks``, this rank's ``[S_local, B, D]``).
        stops: the pass may end behind the last of them.
    """

    def __init__(
        self, blocks: Sequence[int], take: Callable[[int, Tensor], None], *, stops: bool
    ) -> None:
        self._place = {block: place for place, block in enumerate(blocks)}
        self._take, self._end = take, blocks[-1] + 1 if stops else None

    def __call__(self, block: int, hidden_SBD: Tensor) -> None:
        """Called by the network with each block's output."""
        if block in self._place:
            self._take(self._place[block], hidden_SBD)

    def is_over(self, block: int) -> bool:
        """Whether ``block`` and all behind it need not run; the head counts as a block."""
        return self._end is not None and block >= self._end


def capture(
    pipeline: Pipeline, work: Sequence[Request], blocks: Sequence[int]
) -> list[list[Tensor]]:
    """Features ``[B, D, T, H, W]`` by block, then request, on every rank; no gradient.

    Args:
        pipeline: of the network.
        work: its inputs.
        blocks: in order; what lies behind them is not run.
    """
    plugin, mesh = pipeline.plugin, pipeline.mesh
    found: dict[tuple[int, int], Tensor] = {}

    def tap(index: int) -> Tap:
        def take(place: int, hidden: Tensor) -> None:
            if index < len(work):  # those put behind the end repeat the last
                grid = plugin.token_grid(work[index].latents_BCTHW.shape)
                found[place, index] = whole_feature(hidden, grid, mesh)

        return Tap(blocks, take, stops=True)

    pipeline.forward(work, lambda output, index: None, tap)
    features = []
    for place, block in enumerate(blocks):
        whole = [
            found.get((place, index), template).contiguous()
            for index, template in enumerate(templates(plugin, work))
        ]
        pipeline.from_stage(whole, layer_stage(plugin.num_layers, mesh.dims, block))
        features.append(whole)
    return features


class LossTaps:
    """Puts the gradient of a ``FeatureLoss`` into the backward of one pass.

    Args:
        loss: what is added to the pass's own loss.
        pipeline: of the network.
        given: the requests as ``loss.fn`` sees them; micro-batches behind them are padding.
        stops: there is no other loss, so what lies behind the last block need not run.
    """

    def __init__(
        self,
        loss: FeatureLoss,
        pipeline: Pipeline,
        given: Sequence[Request],
        *,
        stops: bool,
    ) -> None:
        self._loss, self._given, self._stops = loss, given, stops
        self._plugin, self._mesh = pipeline.plugin, pipeline.mesh
        self._blocks = in_order(self._plugin, loss.blocks)
        self._losses = torch.zeros(len(given), len(self._blocks), device=process.device())

    def __call__(self, index: int) -> Tap:
        """The tap of a micro-batch."""

        def take(place: int, hidden: Tensor) -> None:
            if index < len(self._given):
                self._add(index, place, hidden)

        return Tap(self._blocks, take, stops=self._stops)

    def losses(self) -> list[Tensor]:
        """Of each request ``[blocks]``, on every rank of the replica; once, after the pass."""
        if self._mesh.dims.pp_size > 1:
            dist.all_reduce(self._losses, group=self._mesh.pg.pp)
        return [row.clone() for row in self._losses.cpu()]

    def _add(self, index: int, place: int, hidden_SBD: Tensor) -> None:
        request = self._given[index]
        grid = self._plugin.token_grid(request.latents_BCTHW.shape)
        leaf = hidden_SBD.detach().requires_grad_()
        with torch.enable_grad():
            loss = self._loss.fn(place, whole_feature(leaf, grid, self._mesh), request)
        (own,) = torch.autograd.grad(loss, leaf)
        self._losses[index, place] = loss.detach()
        hidden_SBD.register_hook(lambda gradient: gradient + own)


def loss_taps(
    loss: FeatureLoss | None, pipeline: Pipeline, given: Sequence[Request], *, stops: bool
) -> LossTaps | None:
    """``LossTaps`` of a loss, if there is one."""
    return None if loss is None else LossTaps(loss, pipeline, given, stops=stops)
