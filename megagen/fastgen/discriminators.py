"""Discriminators on the features of a frozen diffusion transformer, of images and of videos.

DMD2 (arXiv 2405.14867, section 4.3), LADD (arXiv 2403.12015).

Legend: B batch, D hidden size of the transformer, H W token grid.
"""

from __future__ import annotations

import torch
from torch import nn

from megagen.fastgen.discriminator_base import (
    Discriminator,
    PerFeatureDiscriminator,
    num_groups,
    seeded,
)
from megagen.fastgen.video_discriminators import Discriminator_VideoDiT

__all__ = ["Discriminator", "Discriminator_ImageDiT", "Discriminator_VideoDiT"]


def _image_head(inner_dim: int) -> nn.Sequential:
    hidden = inner_dim // 2
    return nn.Sequential(
        nn.Conv2d(inner_dim, hidden, kernel_size=4, stride=2, padding=1),
        nn.GroupNorm(num_groups(hidden), hidden),
        nn.LeakyReLU(0.2),
        nn.Conv2d(hidden, 1, kernel_size=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Discriminator_ImageDiT(PerFeatureDiscriminator):
    """One logit for each feature ``[B, inner_dim, H, W]``, H and W at least 2: ``[B, features]``.

    A head is a 4 x 4 convolution of stride 2 to half the channels, GroupNorm, LeakyReLU(0.2), and
    the mean of a linear map. It has ``8 inner_dim**2`` parameters: 75 M at 3072.

    Args:
        feature_indices: of blocks; those of ``num_blocks`` or more are left out. None: the middle.
        num_blocks: of the transformer.
        inner_dim: D, hidden size of the transformer.
        generator: initialise from this instead of torch's default generator.
    """

    feature_indices: set[int]

    def __init__(
        self,
        feature_indices: set[int] | None = None,
        num_blocks: int = 57,
        inner_dim: int = 3072,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        wanted = {num_blocks // 2} if feature_indices is None else feature_indices
        super().__init__(
            {index for index in wanted if index < num_blocks},
            lambda: seeded(lambda: _image_head(inner_dim), generator),
        )
        self.inner_dim = inner_dim
