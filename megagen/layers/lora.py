"""Low-rank adapters (LoRA, arXiv 2106.09685) beside a linear that is cut over TP.

``y = W x + (alpha / rank) B A x``. Only the ``rank`` numbers of a token are ever exchanged between
ranks. Where TP cuts the linear's outputs, A is whole on every rank and B cut; where it cuts the
inputs, A is cut and B whole. Under sequence parallelism the whole one acts on token shards, and its
gradient is summed over TP after the backward as a norm's is.

Legend: S tokens, B batch, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagen.core import process
from megagen.layers.linear import mark_sequence_parallel, mark_tensor_parallel
from megagen.parallel.comm import copy_to_tp, gather_keys, sum_over, sum_scatter

Cut = Literal["outputs", "inputs", "none"]
ATTRIBUTE = "lora"
"""Name under which a linear holds its adapter."""


class LowRankAdapter(nn.Module):
    """The adapters of one linear, which may be several projections fused in one weight.

    Args:
        weight: of the linear; its dtype, device and marks are taken.
        out_features: outputs of each fused projection on this rank.
        wanted: which of the projections have an adapter.
        rank: R.
        scale: ``alpha / rank``.
        cut: what TP cuts of the linear.
        tp_group: process group.
        sequence_parallel: the linear's tokens are sharded over ``tp_group`` (at its input where
            the outputs are cut, at its output where the inputs are, at both where nothing is).
        assemble: from one matrix ``[out, ...]`` for each projection to the linear's own order of
            outputs.
    """

    def __init__(
        self,
        weight: Tensor,
        out_features: Sequence[int],
        wanted: Sequence[int],
        *,
        rank: int,
        scale: float,
        cut: Cut,
        tp_group: ProcessGroup,
        sequence_parallel: bool,
        assemble: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        super().__init__()
        self.out_features, self.wanted, self.rank = list(out_features), list(wanted), rank
        self.scale, self.cut, self.tp_group = scale, cut, tp_group
        self.sequence_parallel, self._assemble = sequence_parallel, assemble
        # a weight that another network will lend has no memory of its own yet
        self.dtype = weight.dtype
        self.device = process.device() if weight.is_meta else weight.device
        for i in wanted:
            # in this module itself: under overlap_param_gather its forward waits for its parameters
            self.register_parameter(f"A{i}", self._empty(rank, weight.size(1)))
            self.register_parameter(f"B{i}", self._empty(out_features[i], rank))
        for dim, parameters in ((1, self._all("A")), (0, self._all("B"))):
            for parameter in parameters:
                _copy_marks(weight, parameter, ("pipeline_parallel", "shared"))
                if cut == ("inputs" if dim == 1 else "outputs"):
                    mark_tensor_parallel(parameter, dim)
                else:
                    mark_sequence_parallel([parameter], sequence_parallel)

    def _empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))

    def _all(self, letter: str) -> list[nn.Parameter]:
        return [self.get_parameter(f"{letter}{i}") for i in self.wanted]

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the linear's output: ``[S, B, in]`` to ``[S', B, out]``."""
        low = self._exchange(F.linear(x, self._down()))
        return F.linear(low * self.scale, self._up())

    def delta_weight(self) -> Tensor:
        """``(alpha / rank) B A`` in fp32, of the shape and order of this rank's weight."""
        return self.scale * (self._up().float() @ self._down().float())

    def _down(self) -> Tensor:
        """All A ``[n R, in]``."""
        matrices = self._all("A")
        return matrices[0] if len(matrices) == 1 else torch.cat([*matrices])

    def _up(self) -> Tensor:
        """All B in the linear's order of outputs ``[out, n R]``, zero where they do not meet."""
        if len(self.out_features) == 1:
            return self.get_parameter("B0")
        total = len(self.wanted) * self.rank
        blocks = []
        for number, size in enumerate(self.out_features):
            if number not in self.wanted:
                blocks.append(torch.zeros(size, total, dtype=self.dtype, device=self.device))
                continue
            before = self.wanted.index(number) * self.rank
            b = self.get_parameter(f"B{number}")
            blocks.append(F.pad(b, (before, total - before - self.rank)))
        return self._assemble(blocks)

    def _exchange(self, low: Tensor) -> Tensor:
        """``A x`` as B needs it."""
        if self.cut == "outputs":
            exchange = gather_keys if self.sequence_parallel else copy_to_tp
            return exchange(low, self.tp_group)
        if self.cut == "inputs":
            exchange = sum_scatter if self.sequence_parallel else sum_over
            return exchange(low, self.tp_group)
        return low


def add_adapter(linear: nn.Module, adapter: LowRankAdapter) -> None:
    """Let ``linear`` (which returns its output alone) add what ``adapter`` says to its output."""
    setattr(linear, ATTRIBUTE, adapter)

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + adapter(inputs[0])

    linear.register_forward_hook(add)


def adapters(module: nn.Module) -> Mapping[str, LowRankAdapter]:
    """The adapters in a module tree by the name of their linear."""
    found = module.named_modules()
    return {n.rpartition(".")[0]: m for n, m in found if isinstance(m, LowRankAdapter)}


def _copy_marks(source: Tensor, target: Tensor, names: Sequence[str]) -> None:
    for name in names:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
