"""The micro-batch that passes from the loader to a method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megagen.core.errors import DataError

LatentShape = tuple[int, int, int, int]
"""``(C, T, H, W)`` of one sample's latents."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch, the same on every rank that holds the same part of the data.

    Args:
        latents_BCTHW: raw codec output (not normalised), fp32, CPU or device; None where the
            dataset holds texts alone.
        condition: named tensors of the condition, first axis B: ``text_embeds_BLD`` fp32, padded
            with zeros to the dataset's text length; families add others.
        positions: global position of each sample in the run's sample order (``step * global batch +
            i``): the sample key of the seeded streams.
        ids: the samples' ids in the dataset.
        captions: their captions, in the same order ("" where dropped).
        shape_CTHW: of a sample's latents where there are none; None: that of ``latents_BCTHW``.
        keys: the samples' numbers in the dataset, which nothing else there has.
    """

    latents_BCTHW: Tensor | None
    condition: Mapping[str, Tensor]
    positions: tuple[int, ...]
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    shape_CTHW: LatentShape | None = None
    keys: tuple[int, ...] = ()

    def clean_latents(self) -> Tensor:
        """``latents_BCTHW``.

        Raises:
            DataError: the dataset holds texts alone.
        """
        if self.latents_BCTHW is None:
            raise DataError(
                "the batch has no latents.",
                remedy="Use a dataset with latents, or a method that needs texts alone.",
                where="training.data",
            )
        return self.latents_BCTHW

    @property
    def latent_shape(self) -> LatentShape:
        """``(C, T, H, W)`` of each sample, whether the latents are there or not."""
        if self.latents_BCTHW is None:
            assert self.shape_CTHW is not None, "a batch without latents needs their shape"
            return self.shape_CTHW
        _, C, T, H, W = self.latents_BCTHW.shape
        return C, T, H, W
