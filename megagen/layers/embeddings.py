"""Embedders of the conditions: timestep, text, image. Replicated over TP, CP and pipeline stages.

Legend: R timestep rows, B batch, D hidden, L text or image tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagen.core import process
from megagen.core.errors import DataError
from megagen.layers.linear import ReplicatedLinear
from megagen.layers.mlp import gelu_tanh
from megagen.layers.norm import LayerNorm


def timestep_sinusoid(timestep: Tensor, size: int) -> Tensor:
    """``[cos(t f_i), sin(t f_i)]`` with ``f_i = 10000^(-i / (size/2))``, fp32 ``[..., size]``."""
    half = size // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angle = timestep.float()[..., None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedder(nn.Module):
    """Sinusoid, two linears with SiLU, in fp32.

    Args:
        frequencies: size of the sinusoid.
        size: D.
    """

    def __init__(self, frequencies: int, size: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.linear_1 = ReplicatedLinear(frequencies, size, dtype=torch.float32)
        self.linear_2 = ReplicatedLinear(size, size, dtype=torch.float32)

    def forward(self, timestep: Tensor) -> Tensor:
        """``[...]`` in 0..1000 to ``[..., D]`` fp32."""
        return self.linear_2(F.silu(self.linear_1(timestep_sinusoid(timestep, self.frequencies))))


class TextEmbedder(nn.Module):
    """Two linears with GELU (tanh form) between: ``[L, B, text]`` to ``[L, B, D]``."""

    def __init__(self, text_size: int, size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = ReplicatedLinear(text_size, size, dtype=dtype)
        self.linear_2 = ReplicatedLinear(size, size, dtype=dtype)

    def forward(self, text_LBD: Tensor) -> Tensor:
        """Text encoder states to keys' input."""
        return self.linear_2(gelu_tanh(self.linear_1(text_LBD)))


class ImageEmbedder(nn.Module):
    """Norm, two linears with exact GELU between, norm; first a learned position where there is one.

    Args:
        image_size: features of the image encoder.
        size: D.
        num_positions: L of the position embedding (first and last frame together); None: none.
    """

    def __init__(
        self, image_size: int, size: int, *, num_positions: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(image_size, eps=1e-5)
        self.linear_1 = ReplicatedLinear(image_size, image_size, dtype=dtype)
        self.linear_2 = ReplicatedLinear(image_size, size, dtype=dtype)
        self.norm2 = LayerNorm(size, eps=1e-5)
        self.pos_embed: nn.Parameter | None = None
        if num_positions is not None:
            shape = (1, num_positions, image_size)
            self.pos_embed = nn.Parameter(torch.empty(shape, dtype=dtype, device=process.device()))

    def forward(self, image_BLD: Tensor) -> Tensor:
        """``[B, L, image]`` to ``[L, B, D]``."""
        if self.pos_embed is not None:
            if image_BLD.size(1) != self.pos_embed.size(1):
                raise DataError(
                    f"image_embeds_BLD has {image_BLD.size(1)} tokens, the network's position "
                    f"embedding {self.pos_embed.size(1)}.",
                    remedy="Give the tokens of the first and the last frame, one after the other.",
                )
            image_BLD = image_BLD + self.pos_embed
        hidden = self.linear_2(F.gelu(self.linear_1(self.norm1(image_BLD.transpose(0, 1)))))
        return self.norm2(hidden)
