"""Linear layers: column and row parallel from megatron-core or Transformer Engine, and replicated.

Every one takes ``[S, B, in]`` and returns the output tensor alone (megatron-core's return a pair
with a deferred bias). Parameters are left uninitialised: weights always come from a weight store.

The tensor-parallel group is bound at construction, since a run holds several networks with groups
of their own and megatron-core's fallback is the global group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from megagen.core import process
from megagen.core.errors import SetupError

_TE_REMEDY = "Install transformer-engine[pytorch] on a machine with CUDA, or set it to 'local'."


def mark_sequence_parallel(parameters: Iterable[nn.Parameter], enabled: bool) -> None:
    """Have gradients of parameters that act on token shards summed over TP after the backward."""
    for parameter in parameters:
        parameter.sequence_parallel = enabled  # type: ignore[attr-defined]


def mark_tensor_parallel(parameter: nn.Parameter, dim: int) -> None:
    """Declare that TP cuts ``parameter`` along ``dim`` (the gradient norm counts each shard)."""
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, True, dim, 1)


class ReplicatedLinear(nn.Module):
    """``x W^T + b`` with the whole weight on every rank."""

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, bias: bool = True
    ) -> None:
        super().__init__()
        device = process.device()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device)
        )
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return F.linear(x, self.weight, self.bias)


class _ColumnLinear(ColumnParallelLinear):
    """megatron-core's column-parallel linear; one fused kernel where the group has one rank."""

    def forward(self, x: Tensor) -> Tensor:
        if self.tp_group.size() == 1 and not self.gradient_accumulation_fusion:
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)[0]


class _RowLinear(RowParallelLinear):
    """megatron-core's row-parallel linear; one fused kernel where the group has one rank."""

    def forward(self, x: Tensor) -> Tensor:
        if self.tp_group.size() == 1 and not self.gradient_accumulation_fusion:
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)[0]


def column_linear(
    config: Any,
    tp_group: Any,
    in_features: int,
    out_features: int,
    *,
    replicated_input: bool = False,
    name: str = "fc1",
) -> nn.Module:
    """A linear whose outputs TP cuts: ``[S or S/tp, B, in]`` to ``[S, B, out/tp]``.

    Args:
        config: the network's TransformerConfig; ``transformer_impl`` chooses the class.
        tp_group: process group.
        in_features: whole input size.
        out_features: whole output size, divisible by the group's size.
        replicated_input: the input is whole on every TP rank even under sequence parallelism
            (text); its gradient is summed over TP here.
        name: ``qkv`` | ``proj`` | ``fc1`` | ``fc2``, for Transformer Engine's communication
            overlap.
    """
    if replicated_input and config.sequence_parallel:
        config = copy.copy(config)
        config.sequence_parallel = False
    if config.transformer_impl == "transformer_engine":
        return _transformer_engine("TEColumnParallelLinear")(
            in_features,
            out_features,
            config=config,
            init_method=_no_init,
            gather_output=False,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=name,
            tp_group=tp_group,
        )
    linear = _ColumnLinear(
        in_features, out_features, config=config, init_method=_no_init, bias=True, tp_group=tp_group
    )
    mark_tensor_parallel(linear.weight, 0)
    return linear


def row_linear(
    config: Any, tp_group: Any, in_features: int, out_features: int, *, name: str = "proj"
) -> nn.Module:
    """A linear whose inputs TP cuts: ``[S, B, in/tp]`` to ``[S or S/tp, B, out]``, summed."""
    if config.transformer_impl == "transformer_engine":
        return _transformer_engine("TERowParallelLinear")(
            in_features,
            out_features,
            config=config,
            init_method=_no_init,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=name,
            tp_group=tp_group,
        )
    linear = _RowLinear(
        in_features,
        out_features,
        config=config,
        init_method=_no_init,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=tp_group,
    )
    mark_tensor_parallel(linear.weight, 1)
    return linear


@cache
def _transformer_engine(name: str) -> Any:
    """Transformer Engine's class of that name, returning the output alone."""
    try:
        import megatron.core.extensions.transformer_engine as extension
    except ImportError as error:
        raise SetupError(
            f"transformer_impl is 'transformer_engine', which cannot be imported ({error}).",
            remedy=_TE_REMEDY,
            where="models.<role>.transformer_impl",
        ) from None
    if not extension.HAVE_TE:
        raise SetupError(
            "transformer_impl is 'transformer_engine', which is not installed.",
            remedy=_TE_REMEDY,
            where="models.<role>.transformer_impl",
        )
    base = getattr(extension, name)

    def forward(self: Any, x: Tensor) -> Tensor:
        return base.forward(self, x)[0]

    return type(name, (base,), {"forward": forward})


def _no_init(weight: Tensor) -> None:
    """Weights come from a store."""
