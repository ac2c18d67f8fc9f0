"""Diffusion forcing: fine-tuning in which each chunk of frames has a noise level of its own.

Chen et al., arXiv 2407.01392, algorithm 1. Fine-tuning's loss with, for every chunk c of latent
frames, its own ``u_c ~ p(u)``, ``s_c = shift(u_c)``:

    x_t = (1 - s_c) x0 + s_c eps   for the frames of c,   minimise  w ||v(x_t, s) - (eps - x0)||^2.

A causal network learns so to continue context of any noise level; a clean one is the end of them.

Legend: B batch, C channels, T latent frames, H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.data.batch import Batch
from megagen.methods.finetune import FineTuneMethod, FineTuneOptions, LossWeighting, base_time
from megagen.models.base import ModelPlugin, Request

DEFAULT_CHUNK = 3


class DiffusionForcingSFTOptions(FineTuneOptions):
    """Options of ``DiffusionForcingSFTMethod``: ``FineTuneOptions``, drawn for each chunk.

    ``min_timestep_ratio`` and ``max_timestep_ratio`` bound t / 1000, not places on a grid that goes
    down (FastVideo's do, so that its lowest ratio bounds the noisiest end).

    Attributes:
        chunk_size: latent frames that share a timestep; a causal network's blocks are the chunks,
            and it must be their size. None: theirs, or 3.
        loss_weighting: as ``FineTuneOptions`` has it.
    """

    chunk_size: int | None = Field(None, ge=1)
    loss_weighting: LossWeighting = "index_bell"


class DiffusionForcingSFTMethod(FineTuneMethod):
    """Fine-tuning with one timestep a chunk of frames."""

    Options = DiffusionForcingSFTOptions
    options: DiffusionForcingSFTOptions

    @classmethod
    def check(cls, options: Any, plugins: Mapping[str, ModelPlugin]) -> None:
        """A causal network's blocks are the chunks."""
        super().check(options, plugins)
        check_chunk(options.chunk_size, plugins["student"])

    def draw(self, batch: Batch, step: int) -> Request:
        """As fine-tuning's, with timesteps ``[B, T]``."""
        plugin = self.student.plugin
        chunks = frame_chunks(plugin, self.options.chunk_size, batch.latent_shape[1])
        base = base_time(self.streams, step, batch.positions, self.options, [len(chunks)])
        lengths = torch.tensor([len(chunk) for chunk in chunks])
        base_BT: Tensor = base.repeat_interleave(lengths, dim=1)
        return self.noised(batch, step, base_BT)


def frame_chunks(plugin: ModelPlugin, chunk_size: int | None, num_frames: int) -> list[range]:
    """The frames that share a timestep; the last chunk may be shorter."""
    if plugin.is_causal:
        return list(plugin.blocks(num_frames))
    size = chunk_size or DEFAULT_CHUNK
    return [range(a, min(a + size, num_frames)) for a in range(0, num_frames, size)]


def check_chunk(chunk_size: int | None, plugin: ModelPlugin) -> None:
    """Raise ``ConfigError`` where a causal network's blocks have another size."""
    if chunk_size is None or not plugin.is_causal:
        return
    size = block_size(plugin)
    if size != chunk_size:
        raise ConfigError(
            f"is {chunk_size}, but the student makes blocks of {size} frames.",
            remedy=f"Drop it, or set models.student.num_frames_per_block to {chunk_size}.",
            where="method.chunk_size",
        )


def block_size(plugin: ModelPlugin) -> int:
    """Latent frames that a causal network makes together."""
    return len(plugin.blocks(1000, start=1)[0])
