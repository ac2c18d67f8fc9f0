"""Norms with parameters; all compute in fp32 whatever the dtype of the hidden states.

Legend: S tokens, B batch, D hidden, N heads on this rank, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagen import kernels
from megagen.core import process
from megagen.layers.linear import mark_sequence_parallel, mark_tensor_parallel
from megagen.parallel.comm import copy_to_tp, sum_over


class _Affine(nn.Module):
    """Weight and bias of a norm, fp32.

    Args:
        size: of the last axis.
        eps: added to the variance.
        sequence_parallel: it acts on token shards.
    """

    def __init__(self, size: int, *, eps: float, sequence_parallel: bool = False) -> None:
        super().__init__()
        device = process.device()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))
        self.eps = eps
        mark_sequence_parallel(self.parameters(), sequence_parallel)


class LayerNorm(_Affine):
    """LayerNorm with weight and bias in fp32; the output has the input's dtype."""

    def forward(self, x_SBD: Tensor) -> Tensor:
        """``[S, B, D]`` to the same."""
        return kernels.layernorm_affine(x_SBD, self.weight, self.bias, eps=self.eps)


class ResidualLayerNorm(_Affine):
    """A gated residual and the LayerNorm behind it, one kernel on a GPU."""

    def forward(
        self, x_SBD: Tensor, y_SBD: Tensor, gate_RBD: Tensor, rows_S: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``x + gate y`` and its norm, both like ``x``; a row of the gate a token by ``rows_S``."""
        return kernels.gated_residual_layernorm_affine(
            x_SBD, y_SBD, gate_RBD, self.weight, self.bias, rows_S, eps=self.eps
        )


class HeadsRMSNorm(nn.Module):
    """The weight of an RMSNorm over all heads at once; TP holds its own heads' part."""

    def __init__(self, config: Any, tp_group: Any) -> None:
        super().__init__()
        size = config.num_attention_heads * config.kv_channels // tp_group.size()
        self.weight = nn.Parameter(
            torch.empty(size, dtype=config.params_dtype, device=process.device())
        )
        mark_tensor_parallel(self.weight, 0)

    def forward(self) -> Tensor:
        """The weight; megatron-core waits for a gathered parameter where its module is called."""
        return self.weight


def norm_heads(
    xs_SBNK: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    eps: float,
    tp_group: Any,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> list[Tensor]:
    """RMSNorm over the heads of all TP ranks, then the rotation where one is given.

    Heads are never gathered: the ranks exchange one sum of squares a token, for all of ``xs`` at
    once.

    Args:
        xs_SBNK: own heads' queries and keys, or one of them; views into a fused projection are
            fine.
        weights: ``[N K]`` for each.
        eps: added to the mean square.
        tp_group: ranks that hold the other heads.
        cos: ``[S, K/2]`` fp32.
        sin: the same.
    """
    sums = sum_squares_of_heads(xs_SBNK, tp_group)
    features = xs_SBNK[0].shape[-2:].numel() * tp_group.size()
    return [
        kernels.rmsnorm_rope(
            x, weight, cos, sin, eps=eps, sum_squares_SB1=total, num_features=features
        )
        for x, weight, total in zip(xs_SBNK, weights, sums, strict=True)
    ]


def sum_squares_of_heads(xs_SBNK: Sequence[Tensor], tp_group: Any) -> Sequence[Tensor | None]:
    """Of each tensor its sum of squares over the heads of all TP ranks, ``[S, B, 1]``.

    None where a rank has all heads: the norm finds it itself.
    """
    if tp_group.size() == 1:
        return [None] * len(xs_SBNK)
    own = torch.cat([kernels.sum_squares(x) for x in xs_SBNK], dim=-1)
    return copy_to_tp(sum_over(own, tp_group), tp_group).split(1, dim=-1)
