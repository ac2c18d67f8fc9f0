"""Discriminators on the features of a frozen video diffusion transformer.

DMD2 (arXiv 2405.14867, section 4.3) and LADD (arXiv 2403.12015) put heads on a frozen network's
features; here they look along time as well. A head first maps the D channels to a few (``width``),
so that its size grows with D and not with its square.

Legend: B batch, D hidden size of the transformer, W width of a head, T H W token grid.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megagen.fastgen.discriminator_base import PerFeatureDiscriminator, num_groups, seeded

__all__ = ["HEADS", "Discriminator_VideoDiT"]

SPATIAL, TEMPORAL, BOTH = (1, 3, 3), (3, 1, 1), (3, 3, 3)


def _layer(inputs: int, outputs: int, kernel: tuple[int, int, int]) -> nn.Sequential:
    """Convolution, GroupNorm, LeakyReLU; kernels that look around halve H and W, rounding up.

    Kernels of 3 with padding 1 take any size, a single frame and a single token too.
    """
    stride = (1, 2, 2) if kernel[1] == 3 else (1, 1, 1)
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel, stride, padding),
        nn.GroupNorm(num_groups(outputs), outputs),
        nn.LeakyReLU(0.2),
    )


class _MeanLogit(nn.Module):
    """``[B, W, T, H, W]`` to ``[B, 1]``: the mean over the grid of a linear map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logit = nn.Linear(width, 1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.logit(feature.mean(dim=(2, 3, 4)))


class FactorizedHead(nn.Sequential):
    """Space, then time: a 1 x 3 x 3 and a 3 x 1 x 1 convolution; logits ``[B, 1]``.

    Tran et al., "A Closer Look at Spatiotemporal Convolutions" (R(2+1)D), arXiv 1711.11248. About
    ``D W + 12 W**2`` parameters: 2.1 M at D = 5120, W = 256.
    """

    logits = 1

    def __init__(self, inner_dim: int, width: int) -> None:
        super().__init__(
            nn.Conv3d(inner_dim, width, kernel_size=1),
            _layer(width, width, SPATIAL),
            _layer(width, width, TEMPORAL),
            _MeanLogit(width),
        )


class Conv3dHead(nn.Sequential):
    """Space and time at once: a 3 x 3 x 3 convolution; logits ``[B, 1]``.

    About ``D W + 27 W**2`` parameters: 3.1 M at D = 5120, W = 256.
    """

    logits = 1

    def __init__(self, inner_dim: int, width: int) -> None:
        super().__init__(
            nn.Conv3d(inner_dim, width, kernel_size=1),
            _layer(width, width, BOTH),
            _MeanLogit(width),
        )


class BranchesHead(nn.Module):
    """Space and time apart: logits ``[B, 2]``, of the frames (1 x 3 x 3) and of motion (3 x 1 x 1).

    About ``D W + 12 W**2`` parameters. Two critics of a video, one of frames and one of their
    course, as in Clark et al., "Adversarial Video Generation on Complex Datasets" (DVD-GAN), arXiv
    1907.06571.
    """

    logits = 2

    def __init__(self, inner_dim: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(inner_dim, width, kernel_size=1)
        self.space = nn.Sequential(_layer(width, width, SPATIAL), _MeanLogit(width))
        self.time = nn.Sequential(_layer(width, width, TEMPORAL), _MeanLogit(width))

    def forward(self, feature: Tensor) -> Tensor:
        reduced = self.reduce(feature)
        return torch.cat([self.space(reduced), self.time(reduced)], dim=1)


class AttentionHead(nn.Module):
    """A learned query attends to all tokens: logits ``[B, 1]``; takes tokens ``[B, N, D]`` as well.

    Keys and values are linear maps of the normed tokens to W channels, with W/64 attention heads
    (at least one); the logit is a two-layer network of what the query gathers. No positions: they
    are in the features. As the cross-attention heads of Lin et al., "Diffusion Adversarial
    Post-Training for One-Step Video Generation", arXiv 2501.08316. About ``2 D W + W**2``
    parameters.
    """

    logits = 1

    def __init__(self, inner_dim: int, width: int) -> None:
        super().__init__()
        self.num_heads = max(1, width // 64)
        if width % self.num_heads:
            raise ValueError(f"width {width} does not go into {self.num_heads} attention heads")
        self.norm = nn.LayerNorm(inner_dim)
        self.query = nn.Linear(1, width, bias=False)  # of a constant: the learned query itself
        self.key = nn.Linear(inner_dim, width, bias=False)  # which a softmax would not see
        self.value = nn.Linear(inner_dim, width)
        self.judge = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )

    def forward(self, feature: Tensor) -> Tensor:
        tokens_BND = feature if feature.ndim == 3 else feature.flatten(2).transpose(1, 2)
        tokens_BND = self.norm(tokens_BND)
        query = self.query(tokens_BND.new_ones(len(tokens_BND), 1, 1))
        gathered = nn.functional.scaled_dot_product_attention(
            self._split(query),
            self._split(self.key(tokens_BND)),
            self._split(self.value(tokens_BND)),
        )
        return self.judge(gathered.transpose(1, 2).flatten(1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


HEADS: dict[str, type[FactorizedHead | Conv3dHead | BranchesHead | AttentionHead]] = {
    "factorized": FactorizedHead,
    "conv3d": Conv3dHead,
    "branches": BranchesHead,
    "attention": AttentionHead,
}


class Discriminator_VideoDiT(PerFeatureDiscriminator):
    """Logits of features ``[B, inner_dim, T, H, W]``, any T, H, W: ``[B, sum(heads_per_feature)]``.

    Features come on the token grid, as ``plugins.wan22.attach_feature_capture(..., grid="auto")``
    gives them, in the order of the blocks; they are cast to the dtype of the weights.

    Args:
        feature_indices: of blocks. None: the middle one.
        num_blocks: of the transformer.
        inner_dim: D, hidden size of the transformer: 1536 in Wan 1.3B, 3072 in 5B, 5120 in 14B.
        head: ``factorized`` (space, then time), ``conv3d``, ``branches`` (a logit of space and one
            of time) or ``attention`` (pooling; also of tokens ``[B, N, inner_dim]``).
        width: channels inside a head, best a multiple of 64.
        generator: initialise from this instead of torch's default generator.

    Raises:
        ValueError: an index outside the blocks, none at all, an unknown head, ``width`` < 1, or for
            ``attention`` one that its heads do not divide; in ``forward``, features of another
            number or shape.
    """

    def __init__(
        self,
        feature_indices: Iterable[int] | None = None,
        num_blocks: int = 30,
        inner_dim: int = 1536,
        *,
        head: str = "factorized",
        width: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        wanted = {num_blocks // 2} if feature_indices is None else set(feature_indices)
        outside = sorted(index for index in wanted if not 0 <= index < num_blocks)
        if outside or not wanted:
            raise ValueError(
                f"feature_indices must lie in [0, {num_blocks}), found {outside or 'none at all'}"
            )
        if head not in HEADS:
            raise ValueError(f"unknown head {head!r}; take one of {', '.join(HEADS)}")
        if width < 1:
            raise ValueError(f"width must be >= 1, found {width}")
        kind = HEADS[head]
        super().__init__(
            wanted, lambda: seeded(lambda: kind(inner_dim, width), generator), kind.logits
        )
        self.inner_dim, self.head = inner_dim, head

    def forward_head(self, position: int, feature: Tensor) -> Tensor:
        """As the base's; raises ``ValueError`` for a feature of another shape."""
        as_tokens = self.head == "attention" and feature.ndim == 3
        channels = feature.shape[-1 if as_tokens else 1] if feature.ndim > 1 else 0
        if channels != self.inner_dim or not (as_tokens or feature.ndim == 5):
            raise ValueError(
                f"feature {position} is to be [B, {self.inner_dim}, T, H, W], found "
                f"{list(feature.shape)}; attach_feature_capture(..., grid=...) makes such of tokens"
            )
        weight = next(self.parameters())
        return super().forward_head(position, feature.to(weight.dtype))
