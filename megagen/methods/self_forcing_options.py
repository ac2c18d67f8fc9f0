"""Keys of self-forcing: DMD2's and those of the rollout, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from megagen.core.errors import ConfigError
from megagen.methods.diffusion_forcing import check_chunk
from megagen.methods.dmd2_options import DMD2Options
from megagen.methods.teacher_forcing import require_causal
from megagen.models.base import ModelPlugin, Passes


class SelfForcingOptions(DMD2Options):
    """Options of ``SelfForcingMethod``: ``DMD2Options`` and the following.

    ``student_step_per`` says what one choice of a block's exit step is for. Frames are latent ones.

    Attributes:
        rollout_mode: simulate, and nothing else: the student's samples are its own rollouts.
        chunk_size: frames of a block; must be the student's, which None means.
        same_step_across_blocks: one exit step for all blocks; false: each block has its own.
        last_step_only: the exit step is the last one.
        context_noise: timestep in 0..1000 to which a finished block is noised before it goes into
            the cache, and which the network is told of it; 0: it goes in clean.
        enable_gradient_in_rollout: true; without it nothing would be learned.
        start_gradient_frame: blocks that start before this frame of the scored ones get no
            gradient.
        num_training_frames: most frames of a rollout. A rollout has the sample's frames and a
            random number of blocks more, and its last frames, as many as the sample has, are scored
            and learned from. None: as many as the sample has.
        given_frames: so many of the sample's first frames are given (image to video); rollouts
            continue them. They are scored with the rest and get no gradient.
        micro_batches_at_once: micro-batches whose rollouts go side by side. A rank holds the caches
            of so many; pipeline stages are kept busy by several. None: all of a step.
        kv_grad: the gradient of a block stops at the cache of the blocks before it.
    """

    rollout_mode: Literal["simulate"] = "simulate"
    chunk_size: int | None = Field(None, ge=1)
    same_step_across_blocks: bool = False
    last_step_only: bool = False
    context_noise: float = Field(0.0, ge=0, le=1000)
    enable_gradient_in_rollout: bool = True
    start_gradient_frame: int = Field(0, ge=0)
    num_training_frames: int | None = Field(None, ge=1)
    given_frames: int = Field(0, ge=0)
    micro_batches_at_once: int | None = Field(None, ge=1)
    kv_grad: Literal["stop"] = "stop"

    @property
    def rollout_passes(self) -> float:
        """Passes beside those of the exit steps: steps before them, and one to write the caches."""
        if self.last_step_only:
            return float(len(self.dmd_denoising_steps or (self.t_list or [0.0])[:-1]))
        return super().rollout_passes + 1

    def passes(self) -> dict[str, Passes]:
        """DMD2's, block by block, and the caches that wait for the blocks' backward passes."""
        found = super().passes()
        found["student"] = found["student"]._replace(
            cached=self.micro_batches_at_once or math.inf,
            is_scored=False,  # the graphs are made when the scores are there
            by_block=True,
            video_frames=self.num_training_frames,
        )
        return found

    def check(self, plugins: Mapping[str, ModelPlugin]) -> None:
        """DMD2's checks, and those of the rollout.

        Raises:
            ConfigError: the student is not causal, or its blocks are of another size.
        """
        require_causal("SelfForcingMethod", plugins["student"])
        check_chunk(self.chunk_size, plugins["student"])
        if not self.enable_gradient_in_rollout:
            raise ConfigError(
                "is false: no block would have a gradient, and the student would not learn.",
                remedy="Drop it; start_gradient_frame limits the gradient to later frames.",
                where="method.enable_gradient_in_rollout",
            )
        super().check(plugins)
