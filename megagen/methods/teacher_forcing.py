"""Teacher forcing: diffusion forcing whose context is clean.

A causal network gets the clean video and a noisy one side by side. A noisy block sees itself and
the clean blocks before it, as it will in sampling; the loss is that of the noisy half alone. As in
Huang et al., arXiv 2506.08009, which compares it with diffusion forcing and self-forcing.

Legend: B batch, C channels, T latent frames, H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from megagen.core.errors import ConfigError
from megagen.data.batch import Batch
from megagen.fastgen.flow_matching import add_noise
from megagen.methods.diffusion_forcing import DiffusionForcingSFTMethod, DiffusionForcingSFTOptions
from megagen.models.base import ModelPlugin, Passes, Request


class TeacherForcingSFTOptions(DiffusionForcingSFTOptions):
    """Options of ``TeacherForcingSFTMethod``: those of diffusion forcing and one more.

    Attributes:
        context_noise: timestep in 0..1000 to which the clean half is noised, and which the network
            is told of it; as ``stream.context_noise`` in sampling. 0: clean.
    """

    context_noise: float = Field(0.0, ge=0, le=1000)


class TeacherForcingSFTMethod(DiffusionForcingSFTMethod):
    """Diffusion forcing on clean context."""

    Options = TeacherForcingSFTOptions
    options: TeacherForcingSFTOptions

    @classmethod
    def check(cls, options: Any, plugins: Mapping[str, ModelPlugin]) -> None:
        """The student is causal: it alone can tell the halves apart."""
        super().check(options, plugins)
        require_causal(cls.__name__, plugins["student"])

    @classmethod
    def passes(cls, options: Any) -> dict[str, Passes]:
        """Each sample goes through twice, clean and noisy."""
        return {"student": Passes(training=2.0)}

    def draw(self, batch: Batch, step: int) -> Request:
        """Diffusion forcing's request with the clean half as a condition."""
        request = super().draw(batch, step)
        clean_BCTHW = self.student.plugin.normalize(batch.clean_latents().float())
        t_B = clean_BCTHW.new_full((len(clean_BCTHW),), self.options.context_noise)
        if self.options.context_noise > 0:
            shape = clean_BCTHW.shape[1:]
            eps = self.streams.normal("context_noise", step, batch.positions, shape)
            clean_BCTHW = add_noise(clean_BCTHW, eps.to(clean_BCTHW), t_B.double() / 1000)
        clean = {"clean_latents_BCTHW": clean_BCTHW, "clean_timestep": t_B}
        return request.with_(condition={**request.condition, **clean})


def require_causal(method: str, plugin: ModelPlugin) -> None:
    """Raise ``ConfigError`` where a network sees all frames at once."""
    if not plugin.is_causal:
        raise ConfigError(
            f"is of the family {plugin.family!r}, which sees all frames at once; {method} makes a "
            "video block by block.",
            remedy="Take a causal family (wan_causal) for the student.",
            where="models.student._target_",
        )
