"""Consistency distillation of a causal student: each block of frames at a noise level of its own.

Teacher and student are causal, and both see clean frames before a block, as teacher forcing has it
(``teacher_forcing``; what a teacher trained so knows). With x_m,b the frames of block b at their
level and x0_<b the clean ones before them, consistency distillation's loss is that of

    f(x_m,b, s_m,b | x0_<b)   against   f'(x'_b, s_n,b | x0_<b).

It takes the place of knowledge distillation before self-forcing (``kd_causal``): no paths are
kept, and the paths are those of videos that are made block by block.

Legend: B batch, C channels, T latent frames, H W latent size, K blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.data.batch import Batch
from megagen.methods.consistency import ConsistencyMethod, ConsistencyOptions
from megagen.methods.diffusion_forcing import check_chunk
from megagen.methods.few_step import noised
from megagen.methods.teacher_forcing import require_causal
from megagen.models.base import ModelPlugin, Passes, Request

CLEAN = ("clean_latents_BCTHW", "clean_timestep")
"""The conditions that make a request teacher-forced."""


class ConsistencyCausalOptions(ConsistencyOptions):
    """Options of ``ConsistencyCausalMethod``: ``ConsistencyOptions``, drawn for each block.

    Attributes:
        chunk_size: frames of a block; must be the student's, which None means.
        same_step_across_blocks: one timestep for all blocks of a sample (FastVideo); false: each
            block has its own.
        context_noise: timestep in 0..1000 to which the clean frames are noised, and which the
            networks are told of them; 0: clean.
    """

    chunk_size: int | None = Field(None, ge=1)
    same_step_across_blocks: bool = False
    context_noise: float = Field(0.0, ge=0, le=1000)


class ConsistencyCausalMethod(ConsistencyMethod):
    """Consistency distillation on clean context, one timestep a block."""

    Options = ConsistencyCausalOptions
    options: ConsistencyCausalOptions

    @classmethod
    def check(cls, options: Any, plugins: Mapping[str, ModelPlugin]) -> None:
        """Both networks make the same blocks.

        Raises:
            ConfigError: one is not causal, or the blocks differ.
        """
        super().check(options, plugins)
        student, teacher = plugins["student"], plugins["teacher"]
        require_causal(cls.__name__, student)
        check_chunk(options.chunk_size, student)
        if not teacher.is_causal:
            raise ConfigError(
                f"is of the family {teacher.family!r}, which sees all frames at once; the teacher "
                "goes from block to block beside the student.",
                remedy="Take one that teacher_forcing made causal, or consistency, which has one "
                "timestep a sample.",
                where="models.teacher._target_",
            )
        if teacher.blocks(1000) != student.blocks(1000):
            own, others = ([len(b) for b in p.blocks(1000)[:2]] for p in (student, teacher))
            raise ConfigError(
                f"makes blocks of {others} frames and so on, the student of {own}.",
                remedy="Give both the same num_frames_per_block and independent_first_frame.",
                where="models.teacher.num_frames_per_block",
            )

    @classmethod
    def passes(cls, options: Any) -> dict[str, Passes]:
        """Each sample goes through twice, clean and noisy."""
        return {
            name: Passes(2 * passes.forward, 2 * passes.training)
            for name, passes in super().passes(options).items()
        }

    def draw_place(self, batch: Batch, step: int, num_chunks: int) -> Tensor:
        """Of each block, or one for all of them."""
        drawn = 1 if self.options.same_step_across_blocks else num_chunks
        return super().draw_place(batch, step, drawn).expand(-1, num_chunks)

    def chunks(self, num_frames: int) -> list[range]:
        """The student's blocks."""
        return self.student.plugin.blocks(num_frames)

    def condition(self, batch: Batch, step: int, x0_BCTHW: Tensor) -> Mapping[str, Tensor]:
        """With the clean frames."""
        shape = x0_BCTHW.shape[1:]
        eps = self.streams.normal("context_noise", step, batch.positions, shape)
        timestep_B = x0_BCTHW.new_full((len(x0_BCTHW),), self.options.context_noise)
        clean = noised(x0_BCTHW, eps.to(x0_BCTHW), timestep_B, {})
        return {
            **batch.condition,
            **dict(zip(CLEAN, (clean.latents_BCTHW, clean.timestep), strict=True)),
        }

    def without_prompt(self, request: Request) -> Request:
        """The clean frames stay."""
        kept = {name: request.condition[name] for name in CLEAN}
        found = super().without_prompt(request)
        return found.with_(condition={**found.condition, **kept})
