"""What few-step students share: their list of timesteps, their draws, their rollout.

A K-step student is trained at the timesteps t_1 > ... > t_K of its list and sampled by walking
down it: an estimate of x0 at t_k is noised again to t_{k+1}, with fresh noise (``sde``) or with the
noise that the estimate implies (``ode``). Timesteps are in 0..1000, ``sigma = t / 1000``.

Legend: B batch, C channels, T frames, H W latent size, K steps of the student.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megagen.core import process
from megagen.core.errors import ConfigError
from megagen.core.streams import Streams
from megagen.data.batch import LatentShape
from megagen.engine.role import Role
from megagen.fastgen.flow_matching import add_noise, pred_x0_from_flow, shift_sigma, x0_to_eps
from megagen.fastgen.utils import expand_like
from megagen.models.base import Request

Share = Literal["sample", "micro_batch", "step"]
"""What one draw is for: a sample, a micro-batch, or the whole step over all data ranks."""
SampleType = Literal["sde", "ode"]


# -- timesteps -----------------------------------------------------------------------------------
def step_list(
    t_list: Sequence[float] | None,
    dmd_denoising_steps: Sequence[float] | None,
    student_sample_steps: int | None,
    *,
    warp: bool,
    shift: float,
) -> tuple[float, ...]:
    """The student's timesteps t_1 > ... > t_K, in (0, 1000].

    Args:
        t_list: K timesteps and a final 0.
        dmd_denoising_steps: the same K timesteps without the 0; one of the two is given.
        student_sample_steps: K, where it is given too.
        warp: the numbers are places on the unshifted grid: t becomes ``1000 shift(t / 1000)``.
        shift: of ``warp``.

    Raises:
        ConfigError: none or both lists, or a list that does not go down from at most 1000.
    """
    if (t_list is None) == (dmd_denoising_steps is None):
        raise ConfigError(
            "give one of t_list and dmd_denoising_steps.",
            remedy="For instance dmd_denoising_steps: [1000, 750, 500, 250].",
            where="method",
        )
    where = "method.t_list" if t_list is not None else "method.dmd_denoising_steps"
    steps = [float(t) for t in (t_list if t_list is not None else dmd_denoising_steps or ())]
    if t_list is not None and (not steps or steps.pop() != 0):
        raise ConfigError(f"found {t_list}.", remedy="It ends with 0.", where=where)
    falls = all(a > b for a, b in itertools.pairwise(steps))
    if not steps or not falls or steps[0] > 1000 or steps[-1] <= 0:
        raise ConfigError(
            f"found {steps}.", remedy="Timesteps go down, from at most 1000, above 0.", where=where
        )
    if student_sample_steps is not None and student_sample_steps != len(steps):
        raise ConfigError(
            f"is {student_sample_steps}, but {where} has {len(steps)} steps.",
            remedy="Drop it, or change the list.",
            where="method.student_sample_steps",
        )
    if not warp:
        return tuple(steps)
    places = torch.tensor(steps, dtype=torch.float64) / 1000
    return tuple((1000 * shift_sigma(places, shift)).tolist())


def check_in_range(
    steps: Sequence[float], timestep_range: tuple[float, float], *, from_noise: bool
) -> None:
    """Raise ``ConfigError`` where an expert does not serve the student's timesteps.

    Args:
        steps: the student's timesteps.
        timestep_range: (low, high] that its network serves.
        from_noise: rollouts start from pure noise.
    """
    low, high = timestep_range
    outside = [t for t in steps if not low < t <= high]
    if outside:
        raise ConfigError(
            f"{outside} of the student's timesteps are outside ({low:g}, {high:g}], which its "
            "expert serves.",
            remedy="Give each expert a list on its own side of the boundary.",
            where="method",
        )
    if from_noise and high < 1000:
        raise ConfigError(
            "is simulate: rollouts start from pure noise, which the low-noise expert never sees.",
            remedy="Distil this expert with rollout_mode: data_latent.",
            where="method.rollout_mode",
        )


def draw_keys(share: Share, positions: Sequence[int]) -> list[int]:
    """The sample keys under which a draw is the same for all that ``share`` it."""
    if share == "sample":
        return list(positions)
    return [-1 if share == "step" else positions[0]] * len(positions)


# -- requests ------------------------------------------------------------------------------------
def sigma_of(request: Request) -> Tensor:
    """The request's noise level in float64, ready to broadcast: ``[B]`` or ``[B, 1, T, 1, 1]``."""
    sigma = request.timestep.double() / 1000
    return sigma if sigma.ndim == 1 else sigma[:, None, :, None, None]


def noised(
    x0: Tensor,
    eps: Tensor,
    timestep: Tensor,
    condition: Mapping[str, Tensor],
    extra: Mapping[str, Tensor] | None = None,
) -> Request:
    """A network's input ``(1 - sigma) x0 + sigma eps``.

    Args:
        x0: ``[B, C, T, H, W]``.
        eps: like ``x0``.
        timestep: ``[B]`` or ``[B, T]``, in 0..1000.
        condition: of the request.
        extra: of the request.
    """
    request = Request(x0, timestep.float(), condition, extra or {})
    return request.with_(latents_BCTHW=add_noise(x0, eps, sigma_of(request)))


def x0_of(velocity: Tensor, request: Request) -> Tensor:
    """``x_t - sigma v``: the x0 that a velocity at the request's input means; differentiable."""
    return pred_x0_from_flow(velocity, request.latents_BCTHW.to(velocity), sigma_of(request))


def predict_x0(role: Role, requests: Sequence[Request]) -> list[Tensor]:
    """``x0_of`` the role's predictions, without gradient."""
    pairs = zip(role.predict(requests), requests, strict=True)
    return [x0_of(velocity, request) for velocity, request in pairs]


# -- rollout -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RolloutDraw:
    """All random numbers of one micro-batch's rollout, and what it starts from.

    Args:
        condition: of the micro-batch.
        x0: clean latents, normalised; None where the student starts from noise.
        step_B: which of the student's timesteps it is trained at, 0..K-1.
        noises: of the last input (data), or of the start and of each step down (simulation).
    """

    condition: Mapping[str, Tensor]
    x0: Tensor | None
    step_B: Tensor
    noises: tuple[Tensor, ...]


@dataclass(frozen=True)
class Rollout:
    """How the student's training inputs are made.

    Args:
        timesteps: t_1 > ... > t_K.
        sample_type: ``sde`` or ``ode``.
        share: what one choice of the trained step is for.
    """

    timesteps: tuple[float, ...]
    sample_type: SampleType
    share: Share

    def draw(
        self,
        streams: Streams,
        purpose: str,
        step: int,
        positions: Sequence[int],
        condition: Mapping[str, Tensor],
        latents: Tensor | LatentShape,
        step_B: Tensor | None = None,
    ) -> RolloutDraw:
        """Draw for one micro-batch.

        Args:
            streams: of the run.
            purpose: names this rollout among those of the step.
            step: of the run.
            positions: of the micro-batch's samples.
            condition: of the micro-batch.
            latents: clean latents, noised to the trained timestep; or their shape, for a rollout
                from pure noise.
            step_B: the trained step of each sample, where it is chosen already.
        """
        if step_B is None:
            step_B = self.draw_step(streams, purpose, step, positions)
        x0 = latents.to(process.device()) if isinstance(latents, Tensor) else None
        shape = latents.shape[1:] if isinstance(latents, Tensor) else latents
        num_noises = 1 if x0 is not None else 1 + self._num_steps_down(step_B)
        noises = tuple(
            streams.normal(f"{purpose}/noise/{k}", step, positions, shape).to(process.device())
            for k in range(num_noises)
        )
        return RolloutDraw(condition, x0, step_B.to(process.device()), noises)

    def draw_step(
        self, streams: Streams, purpose: str, step: int, positions: Sequence[int]
    ) -> Tensor:
        """Which of the student's timesteps each sample is trained at, ``[B]`` in 0..K-1."""
        keys = draw_keys(self.share, positions)
        return streams.integers(f"{purpose}/step", step, keys, 0, len(self.timesteps))

    def inputs(
        self, student: Role, draws: Sequence[RolloutDraw], caches: Sequence[Any] | None = None
    ) -> list[Request]:
        """The student's input at each sample's trained timestep; made without gradient.

        Args:
            student: whose.
            draws: of each micro-batch.
            caches: of the frames before, where a causal student continues a video.
        """
        if draws[0].x0 is None:
            return self._simulate(student, draws, caches or [None] * len(draws))
        requests = []
        for draw in draws:
            assert draw.x0 is not None
            timestep_B = self._timesteps(draw)[draw.step_B]
            requests.append(noised(draw.x0, draw.noises[0], timestep_B, draw.condition))
        return requests

    def _simulate(
        self, student: Role, draws: Sequence[RolloutDraw], caches: Sequence[Any]
    ) -> list[Request]:
        """Walk down from pure noise; a sample stays at its own step.

        DMD2, arXiv 2405.14867, section 4.5. All data ranks walk as far as the furthest may.
        """
        pairs = zip(draws, caches, strict=True)
        requests = [self._start(draw).with_(cache=cache) for draw, cache in pairs]
        for k in range(len(draws[0].noises) - 1):
            x0s = predict_x0(student, requests)
            moved = zip(x0s, requests, draws, strict=True)
            requests = [self._down(x0, request, draw, k) for x0, request, draw in moved]
        return requests

    def _start(self, draw: RolloutDraw) -> Request:
        noise = draw.noises[0]
        first_B = torch.zeros_like(draw.step_B)
        return noised(
            torch.zeros_like(noise), noise, self._timesteps(draw)[first_B], draw.condition
        )

    def _down(self, x0: Tensor, request: Request, draw: RolloutDraw, k: int) -> Request:
        """From t_k to t_{k+1}, for the samples that are trained further down."""
        if self.sample_type == "sde":
            eps = draw.noises[k + 1]
        else:
            eps = x0_to_eps(x0, request.latents_BCTHW, sigma_of(request))
        goes_B = draw.step_B > k
        next_B = torch.where(goes_B, self._timesteps(draw)[k + 1], request.timestep)
        below = noised(x0, eps, next_B, draw.condition)
        latents = torch.where(expand_like(goes_B, x0), below.latents_BCTHW, request.latents_BCTHW)
        return below.with_(latents_BCTHW=latents, cache=request.cache)

    def _timesteps(self, draw: RolloutDraw) -> Tensor:
        return torch.tensor(self.timesteps, dtype=torch.float32, device=draw.step_B.device)

    def _num_steps_down(self, step_B: Tensor) -> int:
        """Steps that every data rank must take: known where all share one choice, else K - 1."""
        return int(step_B[0]) if self.share == "step" else len(self.timesteps) - 1
