"""From noise to latents through a role's network, under whatever layout the role has.

Legend: B batch, C channels, T latent frames, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megagen.engine.role import Role
from megagen.models.base import Request
from megagen.sampling import flow

Condition = Mapping[str, Tensor]


def sample_latents(
    roles: Role | Sequence[Role],
    *,
    noise_BCTHW: Tensor,
    condition: Condition,
    uncondition: Condition | None = None,
    num_steps: int = 50,
    guidance_scale: float | Sequence[float] = 1.0,
    shift: float | None = None,
    sampler: str = "unipc",
    micro_batch_size: int | None = None,
    t_list: Sequence[float] | None = None,
    fresh_noise: flow.FreshNoise | None = None,
) -> Tensor:
    """Solve the flow ODE. Collective over the roles' ranks.

    Args:
        roles: one network, or the experts of different timestep ranges.
        noise_BCTHW: standard normal, the same on every rank that shares this data rank.
        condition: named tensors with first axis B.
        uncondition: the same names for the guidance's other branch; None: no guidance.
        num_steps: solver steps.
        guidance_scale: one, or one for each role; at 1 no unconditional pass is made.
        shift: of the sigma grid; None: the first role's ``flow_shift``.
        sampler: ``euler``, ``unipc`` or ``sde``.
        micro_batch_size: samples of one forward pass; None: all.
        t_list: timesteps in 0..1000 going down to a final 0, in place of ``num_steps`` and
            ``shift``; None: the shifted grid.
        fresh_noise: of the steps of ``sde``.

    Returns:
        Normalised latents x0, fp32 ``[B, C, T, H, W]``, on every rank.

    Raises:
        ConfigError: unknown sampler, impossible grid, or no expert for a timestep.
    """
    experts = [roles] if isinstance(roles, Role) else list(roles)
    scales = _one_each(guidance_scale, len(experts))
    size = micro_batch_size or len(noise_BCTHW)
    velocity = flow.by_timestep(
        [
            flow.Expert(
                _guided(role, condition, uncondition if scale != 1.0 else None, scale, size),
                *role.plugin.timestep_range,
            )
            for role, scale in zip(experts, scales, strict=True)
        ]
    )
    grid_shift = experts[0].plugin.flow_shift if shift is None else shift
    sigmas = flow.shifted_sigmas(num_steps, grid_shift)
    if t_list is not None:
        sigmas = [timestep / 1000 for timestep in t_list]
    return flow.solve(sampler, velocity, noise_BCTHW.float(), sigmas, fresh_noise)


def _one_each(scale: float | Sequence[float], count: int) -> list[float]:
    scales = [float(scale)] * count if isinstance(scale, (int, float)) else list(scale)
    if len(scales) != count:
        raise ValueError(f"{len(scales)} guidance scales for {count} networks")
    return scales


def _guided(
    role: Role, condition: Condition, uncondition: Condition | None, scale: float, size: int
) -> flow.Velocity:
    """The role's guided velocity; both branches go through its pipeline in one call."""
    branches = [condition] if uncondition is None else [condition, uncondition]

    def predict(x_BCTHW: Tensor, sigma: float) -> Tensor:
        requests = [
            Request(part, torch.full((len(part),), 1000.0 * sigma, device=part.device), named)
            for branch in branches
            for part, named in _parts(x_BCTHW, branch, size)
        ]
        velocities = torch.cat(role.predict(requests))
        if uncondition is None:
            return velocities
        conditional, unconditional = velocities.chunk(2)
        return flow.guide(conditional, unconditional, scale)

    return predict


def _parts(x_BCTHW: Tensor, condition: Condition, size: int) -> list[tuple[Tensor, Condition]]:
    """Micro-batches of at most ``size`` samples."""
    return [
        (x_BCTHW[i : i + size], {name: t[i : i + size] for name, t in condition.items()})
        for i in range(0, len(x_BCTHW), size)
    ]
