"""Supervised fine-tuning (and pre-training) by flow matching.

Lipman et al., arXiv 2210.02747: for ``u ~ p(u)``, ``s = shift(u)``, ``eps ~ N(0, I)`` and
``x_t = (1 - s) x0 + s eps`` minimise ``w(s) ||v(x_t, s) - (eps - x0)||^2``.
Timestep distributions: Esser et al., arXiv 2403.03206, section 3.1.

Legend: B batch, C channels, T frames, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megagen.core.options import StrictOptions
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.role import Role
from megagen.fastgen.flow_matching import add_noise, expand_like, shift_sigma, velocity_target
from megagen.methods.base import RunFacts, StepResult, TrainingMethod
from megagen.models.base import Request

Distribution = Literal["uniform", "logit_normal", "mode", "shifted"]
LossWeighting = Literal["none", "bell", "one_plus_sigma", "index_bell"]


class FineTuneOptions(StrictOptions):
    """Options of ``FineTuneMethod``.

    Attributes:
        weighting_scheme: distribution of the base time u in (0, 1) before the run's shift:
            ``uniform``; ``logit_normal`` sigmoid(N(logit_mean, logit_std)); ``mode``
            1 - u - mode_scale (cos^2(pi u / 2) - 1 + u); ``shifted`` uniform warped by
            ``timestep_shift`` in place of the role's ``flow_shift``.
        logit_mean: mean of the logit-normal.
        logit_std: its standard deviation, >= 0.
        mode_scale: strength of ``mode``, in [-1, 1.75] (monotone there).
        timestep_shift: shift of ``shifted``, > 0.
        loss_weighting: weight of a sample: ``none``; ``bell`` exp(-2 (s - 1/2)^2) scaled to mean 1
            over s in (0, 1); ``one_plus_sigma`` 1 + flow_shift s, scaled likewise; ``index_bell``
            exp(-2 (u - 1/2)^2) - exp(-1/2), scaled to mean 1 over the base time u (FastVideo's
            weight by the place on its grid of timesteps).
        min_timestep_ratio: lowest t / 1000 drawn.
        max_timestep_ratio: highest t / 1000 drawn.
    """

    weighting_scheme: Distribution = "uniform"
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, ge=0)
    mode_scale: float = Field(1.29, ge=-1, le=1.75)
    timestep_shift: float = Field(1.0, gt=0)
    loss_weighting: LossWeighting = "none"
    min_timestep_ratio: float = Field(0.0, ge=0, le=1)
    max_timestep_ratio: float = Field(1.0, ge=0, le=1)


class FineTuneMethod(TrainingMethod):
    """``v(x_t, t) -> eps - x0`` on data latents."""

    Options = FineTuneOptions

    def __init__(
        self,
        roles: Mapping[str, Role],
        options: FineTuneOptions,
        streams: Streams,
        facts: RunFacts | None = None,
    ) -> None:
        super().__init__(roles, options, streams, facts)
        self.options = options

    def train_step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Draw, forward and backward over the micro-batches, update the student."""
        return self.regress([self.draw(batch, step) for batch in batches], self.loss)

    def draw(self, batch: Batch, step: int) -> Request:
        """The micro-batch's noisy latents, timesteps and target: all random numbers of a step."""
        base_B = base_time(self.streams, step, batch.positions, self.options)
        return self.noised(batch, step, base_B)

    def noised(self, batch: Batch, step: int, base: Tensor) -> Request:
        """The micro-batch noised as ``base``, times u ``[B]`` or ``[B, T]``, says."""
        plugin = self.student.plugin
        x0_BCTHW = plugin.normalize(batch.clean_latents().float())
        noise_BCTHW = self.streams.normal("noise", step, batch.positions, x0_BCTHW.shape[1:])
        noise_BCTHW = noise_BCTHW.to(x0_BCTHW.device)
        sigma = self.sigma(base)
        weight = self.loss_weight(sigma, base).to(x0_BCTHW.device)
        sigma = sigma.to(x0_BCTHW.device)
        return Request(
            latents_BCTHW=add_noise(x0_BCTHW, noise_BCTHW, over_frames(sigma)),
            timestep=(1000 * sigma).float(),
            condition=batch.condition,
            extra={
                "target_BCTHW": velocity_target(x0_BCTHW, noise_BCTHW),
                "weight": over_frames(weight),
            },
        )

    def draw_sigma(self, step: int, positions: Sequence[int]) -> Tensor:
        """Noise levels ``[B]`` in (0, 1), float64, inside this expert's and the options' range."""
        return self.sigma(base_time(self.streams, step, positions, self.options))

    def sigma(self, base: Tensor) -> Tensor:
        """The noise levels of base times u."""
        o = self.options
        shift = (
            o.timestep_shift if o.weighting_scheme == "shifted" else self.student.plugin.flow_shift
        )
        low, high = self.student.plugin.timestep_range
        low = max(low / 1000, o.min_timestep_ratio)
        high = min(high / 1000, o.max_timestep_ratio)
        sigma = shift_sigma(base, shift)
        return low + (high - low) * sigma if (low, high) != (0.0, 1.0) else sigma

    def loss_weight(self, sigma: Tensor, base: Tensor) -> Tensor:
        """Weight of each noise level, mean 1 over sigma (``index_bell``: u) uniform in (0, 1)."""
        s, u = sigma.double(), base.double()
        mean = math.sqrt(math.pi / 2) * math.erf(1 / math.sqrt(2))  # of exp(-2 (s - 1/2)^2)
        if self.options.loss_weighting == "bell":
            return (torch.exp(-2 * (s - 0.5) ** 2) / mean).float()
        if self.options.loss_weighting == "index_bell":
            least = math.exp(-0.5)
            return ((torch.exp(-2 * (u - 0.5) ** 2) - least) / (mean - least)).float()
        if self.options.loss_weighting == "one_plus_sigma":
            shift = self.student.plugin.flow_shift
            return ((1 + shift * s) / (1 + shift / 2)).float()
        return torch.ones_like(s, dtype=torch.float32)

    def loss(self, velocity_BCTHW: Tensor, request: Request) -> dict[str, Tensor]:
        """``mean_B w ||v - (eps - x0)||^2`` over all latent elements, fp32."""
        error = velocity_BCTHW.float() - request.extra["target_BCTHW"].to(velocity_BCTHW.device)
        weight = expand_like(request.extra["weight"].to(error.device), error)
        return {"loss": (weight * error.square()).mean()}


def over_frames(x: Tensor) -> Tensor:
    """``[B]`` as it is, ``[B, T]`` as ``[B, 1, T, 1, 1]``."""
    return x if x.ndim == 1 else x[:, None, :, None, None]


def base_time(
    streams: Streams,
    step: int,
    positions: Sequence[int],
    options: FineTuneOptions,
    shape: Sequence[int] = (),
) -> Tensor:
    """The base times u of each sample before the shift, ``[B, *shape]`` float64 in (0, 1]."""
    if options.weighting_scheme == "logit_normal":
        z = streams.normal("timestep", step, positions, shape).double()
        return torch.sigmoid(options.logit_mean + options.logit_std * z)
    # u is in [0, 1), so both forms give (0, 1]: pure noise can be drawn, a clean latent cannot
    u = streams.uniform("timestep", step, positions, shape).double()
    if options.weighting_scheme == "mode":
        return 1 - u - options.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return 1 - u
