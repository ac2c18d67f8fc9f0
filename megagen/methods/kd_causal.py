"""Knowledge distillation of a causal student: every block of frames at a timestep of its own.

The initialisation of CausVid (Yin et al., arXiv 2412.07772, section 4.3) and of self-forcing. The
paths are those of a bidirectional teacher; the student sees each block's frames as they were at the
block's own state of the path, and learns where the path ends:

    x_t[f] = path(t_b)[f] for the frames f of block b,   minimise 1/2 ||x0(x_t, t) - x_0||^2.

Legend: B batch, T latent frames, K timesteps of the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from megagen.data.batch import Batch
from megagen.methods.diffusion_forcing import check_chunk, frame_chunks
from megagen.methods.kd import KDMethod, KDOptions
from megagen.models.base import ModelPlugin


class KDCausalOptions(KDOptions):
    """Options of ``KDCausalMethod``: ``KDOptions``, drawn for each chunk of frames.

    Attributes:
        chunk_size: latent frames that share a timestep; a causal network's blocks are the chunks,
            and it must be their size. None: theirs, or 3.
    """

    chunk_size: int | None = Field(None, ge=1)


class KDCausalMethod(KDMethod):
    """Knowledge distillation with one timestep a chunk of frames."""

    Options = KDCausalOptions
    options: KDCausalOptions

    @classmethod
    def check(cls, options: Any, plugins: Mapping[str, ModelPlugin]) -> None:
        """A causal network's blocks are the chunks."""
        super().check(options, plugins)
        check_chunk(options.chunk_size, plugins["student"])

    def draw_step(self, batch: Batch, step: int) -> Tensor:
        """Which of the student's timesteps each frame is trained at, ``[B, T]`` in 0..K-1."""
        plugin = self.student.plugin
        chunks = frame_chunks(plugin, self.options.chunk_size, batch.latent_shape[1])
        lengths = torch.tensor([len(chunk) for chunk in chunks])
        place_BT: Tensor = self.integers(batch, step, [len(chunks)]).repeat_interleave(lengths, 1)
        return place_BT
