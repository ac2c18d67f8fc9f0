"""Samplers of flow models: sigma grids, Euler, UniPC, guidance and experts, as pure functions.

A flow model gives the velocity ``v(x, sigma) = eps - x0`` on ``x = (1 - sigma) x0 + sigma eps``;
its ODE ``dx/dsigma = v`` is solved from sigma 1 (noise) to 0. UniPC: Zhao et al. 2023 (arXiv
2302.04867), Algorithms 5 to 8 in the data-prediction form with ``B(h) = e^h - 1``.

Legend: B batch, C channels, T latent frames, H W latent height and width; sigmas has ``steps + 1``
entries, decreasing, the last 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megagen.core.errors import ConfigError, suggest

Velocity = Callable[[Tensor, float], Tensor]
"""``predict(x_BCTHW, sigma) -> velocity_BCTHW``, fp32."""

FreshNoise = Callable[[int], Tensor]
"""(number of the step, from 1) -> standard normal noise like the start."""

SamplerName = Literal["euler", "unipc", "sde"]

_SIGMA_MAX = 1 - 1e-6  # log-SNR is -inf at 1; the same offset as diffusers' scheduler


def shift_sigma(sigma: float, shift: float) -> float:
    """``shift sigma / (1 + (shift - 1) sigma)``: more steps at high noise for shift > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shifted_sigmas(num_steps: int, shift: float = 1.0) -> list[float]:
    """Evenly spaced sigmas from 1 to 0, then shifted; ``num_steps + 1`` values.

    Raises:
        ConfigError: ``num_steps`` < 1 or ``shift`` <= 0.
    """
    if num_steps < 1:
        raise ConfigError(f"found {num_steps}; at least 1 sampling step is needed.", where="steps")
    if shift <= 0:
        raise ConfigError(f"found {shift}; the flow shift must be above 0.", where="shift")
    return [shift_sigma(1 - i / num_steps, shift) for i in range(num_steps + 1)]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance ``uncond + scale (cond - uncond)`` (arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def guided(conditional: Velocity, unconditional: Velocity | None, scale: float) -> Velocity:
    """One velocity out of two; at scale 1, or without an unconditional one, one pass only."""
    if unconditional is None or scale == 1.0:
        return conditional
    return lambda x, sigma: guide(conditional(x, sigma), unconditional(x, sigma), scale)


@dataclass(frozen=True)
class Expert:
    """A network that serves timesteps in (low, high] of 0..1000 (Wan 2.2 A14B has two)."""

    predict: Velocity
    low: float = 0.0
    high: float = 1000.0


def by_timestep(experts: Sequence[Expert]) -> Velocity:
    """The velocity of whichever expert serves the timestep.

    Raises:
        ConfigError: at call time, when no expert serves it.
    """

    def predict(x: Tensor, sigma: float) -> Tensor:
        timestep = 1000.0 * sigma
        for expert in experts:
            if expert.low < timestep <= expert.high:
                return expert.predict(x, sigma)
        ranges = ", ".join(f"({e.low:g}, {e.high:g}]" for e in experts)
        raise ConfigError(
            f"no expert serves timestep {timestep:g}; the experts loaded serve {ranges}.",
            remedy="Load the other expert too (transformer and transformer_2).",
        )

    return predict


def euler(predict: Velocity, noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """First-order solution: ``x += (sigma_next - sigma) v``."""
    x = noise
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * predict(x, sigma)
    return x


def sde(
    predict: Velocity, noise: Tensor, sigmas: Sequence[float], fresh_noise: FreshNoise
) -> Tensor:
    """Steps of few-step students: estimate x0, and noise it anew to the next sigma.

    Consistency sampling, Song et al., arXiv 2303.01469, algorithm 1.
    """
    x = noise
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas), 1):
        x = x - sigma * predict(x, sigma)
        if following > 0:
            x = (1 - following) * x + following * fresh_noise(step)
    return x


def unipc(predict: Velocity, noise: Tensor, sigmas: Sequence[float], order: int = 2) -> Tensor:
    """UniPC of the given order: predictor, and a corrector that reuses the next step's prediction.

    The last step is of order 1, the first ones as high as the history allows (diffusers'
    ``lower_order_final``).
    """
    sigmas = [min(s, _SIGMA_MAX) for s in sigmas]
    num_steps = len(sigmas) - 1
    x, before = noise, noise
    history: list[tuple[float, Tensor]] = []  # (sigma, x0 prediction), newest last
    used = 0
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        x0 = x - sigma * predict(x, sigma)
        if history:
            x = _unipc_update(before, history, used, sigma, corrected_by=x0)
        history = [*history[-(order - 1) :], (sigma, x0)] if order > 1 else [(sigma, x0)]
        used = min(order, num_steps - i, len(history))
        before = x
        x = _unipc_update(x, history, used, following)
    return x


def _unipc_update(
    x: Tensor,
    history: Sequence[tuple[float, Tensor]],
    order: int,
    target: float,
    corrected_by: Tensor | None = None,
) -> Tensor:
    """One UniP step (UniC, given the prediction at the target) from the newest sigma to ``target``.

    ``x_t = sigma_t / sigma_s x - alpha_t (e^-h - 1) (m_0 + sum_k rho_k D_k)``, h the log-SNR step,
    ``D_k = (m_k - m_0) / r_k``.
    """
    sigma, m0 = history[-1]
    h = _half_log_snr(target) - _half_log_snr(sigma)
    phi = math.expm1(-h)
    points = [(_half_log_snr(s) - _half_log_snr(sigma), m) for s, m in history[-order:-1][::-1]]
    ratios = [distance / h for distance, _ in points]
    differences = [(m - m0) / r for r, (_, m) in zip(ratios, points, strict=True)]
    if corrected_by is not None:
        differences.append(corrected_by - m0)
    weights = _unipc_weights(ratios, h, corrector=corrected_by is not None)
    total = m0
    for weight, difference in zip(weights, differences, strict=True):
        total = total + weight * difference
    return (target / sigma) * x - (1 - target) * phi * total


def _unipc_weights(ratios: Sequence[float], h: float, *, corrector: bool) -> list[float]:
    """rho of ``R rho = b``: ``R[i, k] = r_k^i``, ``b_i = (i + 1)! phi_{i+2}(-h) h / B(-h)``."""
    count = len(ratios) + corrector
    if count == 0:
        return []
    if count == 1:
        return [0.5]  # the authors' choice where one point is used: independent of h
    nodes = torch.tensor([*ratios, 1.0][:count], dtype=torch.float64)
    rows, right = [], []
    phi_k, factorial = math.expm1(-h) / -h - 1, 1
    for i in range(count):
        rows.append(nodes**i)
        right.append(phi_k * factorial / math.expm1(-h))
        factorial *= i + 2
        phi_k = phi_k / -h - 1 / factorial
    solution = torch.linalg.solve(torch.stack(rows), torch.tensor(right, dtype=torch.float64))
    return solution.tolist()


def _half_log_snr(sigma: float) -> float:
    """``log(alpha / sigma)`` with ``alpha = 1 - sigma``."""
    return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)


SAMPLERS: dict[str, Callable[[Velocity, Tensor, Sequence[float]], Tensor]] = {
    "euler": euler,
    "unipc": unipc,
}
"""Solvers of the ODE by name: ``sampler(predict, noise, sigmas) -> x0``."""


def solve(
    name: str,
    predict: Velocity,
    noise: Tensor,
    sigmas: Sequence[float],
    fresh_noise: FreshNoise | None = None,
) -> Tensor:
    """Run the sampler called ``name``; ``sde`` needs ``fresh_noise``.

    Raises:
        ConfigError: no such sampler, or no noise for it.
    """
    if name == "sde":
        if fresh_noise is None:
            raise ConfigError("is sde, which draws noise, and none is given.", where="sampler")
        return sde(predict, noise, sigmas, fresh_noise)
    if name not in SAMPLERS:
        known = [*SAMPLERS, "sde"]
        raise ConfigError(f"found {name!r};", remedy=suggest(name, known), where="sampler")
    return SAMPLERS[name](predict, noise, sigmas)
