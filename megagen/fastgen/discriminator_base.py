"""What discriminators share: one head per captured feature, and its initialisation.

Yin et al., "Improved Distribution Matching Distillation" (DMD2), arXiv 2405.14867, section 4.3, and
Sauer et al., "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation"
(LADD), arXiv 2403.12015: the discriminator is a frozen diffusion network with small trained heads
on its features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Discriminator", "PerFeatureDiscriminator", "num_groups", "seeded"]


class Discriminator(nn.Module):
    """Base class; as with any module, a subclass brings the ``forward``: features -> logits.

    Args:
        feature_indices: blocks of the frozen network whose outputs it judges.
    """

    def __init__(self, feature_indices: set[int] | None = None) -> None:
        super().__init__()
        self.feature_indices = feature_indices


class PerFeatureDiscriminator(Discriminator):
    """One head for each captured feature, their logits side by side.

    Args:
        feature_indices: of blocks; one head each, in rising order.
        make_head: makes one head: feature -> logits ``[B, logits_per_head]``.
        logits_per_head: of each head.
    """

    def __init__(
        self,
        feature_indices: set[int],
        make_head: Callable[[], nn.Module],
        logits_per_head: int = 1,
    ) -> None:
        super().__init__(feature_indices)
        self.num_features = len(feature_indices)
        self.heads_per_feature = (logits_per_head,) * self.num_features
        """Number of logits of each feature, by position."""
        self.cls_pred_heads = nn.ModuleList([make_head() for _ in range(self.num_features)])

    @property
    def heads(self) -> nn.ModuleList:
        """The heads by position: the feature of the k-th captured block goes into ``heads[k]``."""
        return self.cls_pred_heads

    def forward_head(self, position: int, feature: Tensor) -> Tensor:
        """Logits ``[B, heads_per_feature[position]]`` of one feature alone.

        Where blocks lie on several pipeline stages, each judges its own: ``forward`` of all
        features is these, concatenated.

        Raises:
            IndexError: no such position.
        """
        if not 0 <= position < self.num_features:
            raise IndexError(f"{self.num_features} features, and no position {position}")
        return self.cls_pred_heads[position](feature)

    def forward(self, feats: list[Tensor]) -> Tensor:
        """Logits ``[B, sum of heads_per_feature]`` of the features, one of each captured block.

        Raises:
            ValueError: not a list, or not one feature a head.
        """
        if not isinstance(feats, list) or len(feats) != self.num_features:
            found = f"{len(feats)} in a list" if isinstance(feats, list) else type(feats).__name__
            raise ValueError(f"a list of {self.num_features} features is needed, found {found}")
        return torch.cat([self.forward_head(k, feature) for k, feature in enumerate(feats)], dim=1)


def num_groups(channels: int) -> int:
    """Groups of a GroupNorm: the most that divide the channels, up to 32.

    Of 32 channels or less, up to a quarter of them, so that a group is never a single channel.
    """
    most = 32 if channels > 32 else max(1, channels // 4)
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def seeded(make: Callable[[], nn.Module], generator: torch.Generator | None) -> nn.Module:
    """A module as torch initialises it, or with the same distributions drawn from a generator.

    Weights of linear and convolution layers and their biases are U(-b, b) with b = 1/sqrt(fan_in),
    norms begin as the identity. torch's default generator is not touched where another is given,
    and the weights are made on the generator's device.

    Raises:
        TypeError: parameters of a layer of another kind.
    """
    if generator is None:
        return make()
    with torch.device("meta"):
        module = make()
    module.to_empty(device=generator.device)
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        weight = own.get("weight")
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.reset_parameters()
        elif weight is not None:
            bound = 1 / math.sqrt(weight[0].numel())
            for parameter in own.values():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        elif own:
            raise TypeError(f"no initialisation is known for {type(part).__name__}")
    return module
