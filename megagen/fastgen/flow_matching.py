"""Rectified flow: the straight path between data and noise, and its changes of variable.

Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747); Liu et al., "Flow
Straight and Fast" (arXiv 2209.03003). With ``t`` in [0, 1], data at 0 and noise at 1:

    x_t = (1 - t) x0 + t eps,        v = dx_t / dt = eps - x0.

All arithmetic is float64 and the result has the dtype of the first tensor named, so a bf16 latent
loses nothing on the way. ``t`` is ``[B]`` or anything that broadcasts after trailing axes are added
(per frame: ``[B, 1, T, 1, 1]``). Nothing is detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_SIGMA = 1e-6


def expand_like(x: Tensor, target: Tensor) -> Tensor:
    """``x`` with trailing axes of size 1 until it has as many axes as ``target``."""
    x = torch.atleast_1d(x)
    return x.reshape(x.shape + (1,) * max(0, target.ndim - x.ndim))


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """``s sigma / (1 + (s - 1) sigma)``: more of the noisy end for ``shift > 1``.

    Esser et al., arXiv 2403.03206, eq. 23.

    Args:
        sigma: any shape, in [0, 1].
        shift: > 0; 1 leaves sigma unchanged.

    Raises:
        ValueError: ``shift <= 0``.
    """
    if shift <= 0:
        raise ValueError(f"shift must be > 0, found {shift}")
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """``(1 - t) x0 + t eps``, in x0's dtype."""
    t64 = expand_like(t, x0).double()
    return ((1 - t64) * x0.double() + t64 * eps.double()).to(x0.dtype)


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """``eps - x0``, in x0's dtype."""
    return (eps.double() - x0.double()).to(x0.dtype)


def pred_x0_from_flow(pred_flow: Tensor, noisy_latents: Tensor, t: Tensor) -> Tensor:
    """``x_t - t v``, in noisy_latents' dtype."""
    t64 = expand_like(t, noisy_latents).double()
    return (noisy_latents.double() - t64 * pred_flow.double()).to(noisy_latents.dtype)


def x0_to_flow(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """``(x_t - x0) / max(t, 1e-6)``, in x0's dtype."""
    t64 = expand_like(t, x0).double().clamp_min(_SMALLEST_SIGMA)
    return ((x_t.double() - x0.double()) / t64).to(x0.dtype)


def x0_to_eps(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """``(x_t - (1 - t) x0) / max(t, 1e-6)``, in x0's dtype."""
    t64 = expand_like(t, x0).double()
    eps = (x_t.double() - (1 - t64) * x0.double()) / t64.clamp_min(_SMALLEST_SIGMA)
    return eps.to(x0.dtype)
