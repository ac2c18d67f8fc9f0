"""The micro-batch that passes from the loader to a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch, the same on every rank that holds the same part of the data.

    Args:
        latents_BCTHW: raw codec output (not normalised), fp32, CPU or device.
        condition: named tensors of the condition, first axis B: ``text_embeds_BLD`` fp32, padded
            with zeros to the dataset's text length; families add others.
        positions: global position of each sample in the run's sample order (``step * global batch +
            i``): the sample key of the seeded streams.
        ids: the samples' ids in the dataset.
        captions: their captions, in the same order ("" where dropped).
    """

    latents_BCTHW: Tensor
    condition: Mapping[str, Tensor]
    positions: tuple[int, ...]
    ids: tuple[str, ...]
    captions: tuple[str, ...]
