"""Videos made block by block by a causal network, each block handed out as soon as it is done.

A block of latent frames is denoised in a few steps while it attends to a cache of the blocks
before (self-forcing's inference, Huang et al., arXiv 2506.08009, algorithm 2), then goes into the
cache itself: clean, or with a little noise. A step down is that of few-step students: with fresh
noise (``sde``) or with the noise that the estimate implies (``ode``, Euler's step).

Legend: B batch, C channels, T latent frames, H W latent height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions
from megagen.engine.kv_cache import CacheRef
from megagen.engine.role import Role
from megagen.fastgen import rollout
from megagen.fastgen.flow_matching import add_noise, pred_x0_from_flow
from megagen.models.base import Request
from megagen.sampling import flow
from megagen.sampling.latents import Condition

FreshNoise = Callable[[str, range], Tensor]
"""(what for, latent frames) -> standard normal noise of these frames, ``[B, C, T, H, W]``."""


def _goes_down(steps: list[float]) -> list[float]:
    falls = all(a > b for a, b in itertools.pairwise(steps))
    if len(steps) < 2 or not falls or steps[0] > 1000 or steps[-1] != 0:
        raise ValueError("timesteps go down from at most 1000 to a final 0")
    return steps


TimestepList = Annotated[list[float], AfterValidator(_goes_down)]
"""Timesteps of a few-step student, checked."""


class StreamOptions(StrictOptions):
    """How each block is made.

    Attributes:
        t_list: timesteps in 0..1000 going down to a final 0, for instance 1000, 750, 500, 250, 0;
            None: ``num_steps`` evenly spaced ones, shifted as for whole videos.
        sample_type: noise of a step down: ``sde`` (fresh) or ``ode`` (that of the estimate).
        context_noise: timestep in 0..1000 at which finished blocks go into the cache; 0: clean.
    """

    t_list: TimestepList | None = None
    sample_type: Literal["sde", "ode"] = "sde"
    context_noise: float = Field(0.0, ge=0, le=1000)

    def sigmas(self, num_steps: int, shift: float) -> list[float]:
        """Noise levels of a block's steps, going down, and a final 0."""
        if self.t_list is None:
            return flow.shifted_sigmas(num_steps, shift)
        return [timestep / 1000 for timestep in self.t_list]


def stream_latents(
    role: Role,
    options: StreamOptions,
    *,
    noise_BCTHW: Tensor,
    fresh_noise: FreshNoise,
    sigmas: Sequence[float],
    condition: Condition,
    uncondition: Condition | None = None,
    guidance_scale: float = 1.0,
    given_BCTHW: Tensor | None = None,
) -> Iterator[tuple[range, Tensor]]:
    """Make a video block by block. Collective over the role's ranks: all iterate to the end.

    Args:
        role: of a causal network.
        options: kind of step, noise of the context.
        noise_BCTHW: standard normal, of the whole video; the same on every rank that shares this
            data rank, as are all other tensors.
        fresh_noise: of ``sde`` steps and of a noised context.
        sigmas: noise levels of the steps, and a final 0.
        condition: named tensors with first axis B; those that are videos are whole.
        uncondition: the same names for the guidance's other branch; None: no guidance.
        guidance_scale: at 1 no unconditional pass is made.
        given_BCTHW: the video's first frames, normalised; what follows continues them.

    Yields:
        (latent frames, normalised x0 fp32 ``[B, C, T, H, W]``) of each block made.

    Raises:
        ConfigError: the network is not causal.
    """
    check_causal(role)
    branches = [condition]
    if uncondition is not None and guidance_scale != 1.0:
        branches.append(uncondition)
    block_maker = _BlockMaker(role, options, branches, guidance_scale, fresh_noise)
    start = 0
    if given_BCTHW is not None:
        start = given_BCTHW.size(2)
        block_maker.remember(given_BCTHW, range(start))
    blocks: list[range] = role.plugin.blocks(noise_BCTHW.size(2) - start, start)
    for block in blocks:
        noise = noise_BCTHW[:, :, block.start : block.stop].float()
        x0_BCTHW = block_maker.make(noise, block, sigmas)
        yield block, x0_BCTHW
        if block is not blocks[-1]:
            block_maker.remember(x0_BCTHW, block)


def check_causal(role: Role) -> None:
    """Raise ``ConfigError`` where a role's network cannot stream."""
    if not role.plugin.is_causal:
        raise ConfigError(
            f"a network of the family {role.plugin.family!r} makes all frames at once.",
            remedy="Drop --stream, or choose a causal network (family wan_causal).",
            where="stream",
        )


class _BlockMaker:
    """The branches' caches, and the two things done with them."""

    def __init__(
        self,
        role: Role,
        options: StreamOptions,
        branches: Sequence[Condition],
        scale: float,
        fresh_noise: FreshNoise,
    ) -> None:
        self._role, self._options, self._scale = role, options, scale
        self._branches, self._fresh_noise = branches, fresh_noise
        self._caches: list[CacheRef | None] = [None] * len(branches)

    def make(self, noise_BCTHW: Tensor, block: range, sigmas: Sequence[float]) -> Tensor:
        """The block's x0."""
        numbers = itertools.count(1)

        def predict_x0(x_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
            velocities = self._role.predict(self._requests(x_BCTHW, 1000 * sigma_B))
            velocity = velocities[0]
            if len(velocities) > 1:
                velocity = flow.guide(velocities[0], velocities[1], self._scale)
            return pred_x0_from_flow(velocity, x_BCTHW, sigma_B.double())

        return rollout.sample(
            predict_x0,
            noise_BCTHW,
            list(sigmas),
            self._options.sample_type,
            lambda x: self._fresh_noise(f"step/{next(numbers)}", block).to(x),
        )

    def remember(self, x0_BCTHW: Tensor, block: range) -> None:
        """Later blocks see this one."""
        timestep = self._options.context_noise
        timestep_B = torch.full((len(x0_BCTHW),), timestep, device=x0_BCTHW.device)
        if timestep:
            eps = self._fresh_noise("context", block).to(x0_BCTHW)
            x0_BCTHW = add_noise(x0_BCTHW, eps, timestep_B.double() / 1000)
        self._caches = list(self._role.extend_cache(self._requests(x0_BCTHW, timestep_B)))

    def _requests(self, x_BCTHW: Tensor, timestep_B: Tensor) -> list[Request]:
        pairs = zip(self._branches, self._caches, strict=True)
        return [Request(x_BCTHW, timestep_B, named, cache=cache) for named, cache in pairs]
