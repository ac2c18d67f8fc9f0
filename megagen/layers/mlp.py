"""The feed-forward of a block: column-parallel linear, GELU (tanh form), row-parallel linear."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from torch import Tensor, nn

from megagen import kernels
from megagen.layers.linear import column_linear, row_linear


def gelu_tanh(x: Tensor) -> Tensor:
    """``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``."""
    return kernels.bias_gelu_tanh(x)


class MLP(nn.Module):
    """``fc2(gelu(fc1(x)))``; hidden units are cut over TP.

    Args:
        config: TransformerConfig (``hidden_size``, ``ffn_hidden_size``); under selective recompute
            the activation is freed in the forward pass and made again in the backward.
        tp_group: process group.
    """

    def __init__(self, config: Any, tp_group: Any) -> None:
        super().__init__()
        self.fc1 = column_linear(
            config, tp_group, config.hidden_size, config.ffn_hidden_size, name="fc1"
        )
        self.fc2 = row_linear(
            config, tp_group, config.ffn_hidden_size, config.hidden_size, name="fc2"
        )
        self.recompute = config.recompute_granularity == "selective"

    def forward(self, hidden_SBD: Tensor) -> Tensor:
        """``[S_local, B, D]`` to the same."""
        units = self.fc1(hidden_SBD)
        if not (self.recompute and units.requires_grad):
            return self.fc2(gelu_tanh(units))
        activation = CheckpointWithoutOutput(fp8=None)  # False would mean fp8 in megatron-core 0.16
        out = self.fc2(activation.checkpoint(gelu_tanh, units))
        activation.discard_output_and_register_recompute(out)
        return out
