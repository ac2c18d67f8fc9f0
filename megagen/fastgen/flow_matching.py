"""Rectified flow: the straight path between data and noise, and its changes of variable.

Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747); Liu et al., "Flow
Straight and Fast" (arXiv 2209.03003). With ``t`` in [0, 1], data at 0 and noise at 1:

    x_t = (1 - t) x0 + t eps,        v = dx_t / dt = eps - x0.

All arithmetic is float64 and the result has the dtype of the tensor that each function names, so a
bf16 latent loses nothing on the way. ``t`` is ``[B]`` or anything that broadcasts after trailing
axes are added (per frame: ``[B, 1, T, 1, 1]``). Nothing is detached: gradients reach every tensor.
The work is done in place on fresh float64 copies, two of the latents' size at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagen.fastgen.timesteps import sample_from_t_list, sample_timesteps
from megagen.fastgen.utils import expand_like

__all__ = [
    "add_noise",
    "expand_like",
    "pred_noise_to_pred_x0",
    "pred_x0_from_flow",
    "rf_alpha",
    "rf_sigma",
    "sample_from_t_list",
    "sample_timesteps",
    "shift_sigma",
    "velocity_target",
    "x0_to_eps",
    "x0_to_flow",
]

_SMALLEST_DIVISOR = 1e-6
"""No division by less: at t = 0 nothing is known of the noise, at t = 1 nothing of the data."""


def rf_alpha(t: Tensor) -> Tensor:
    """``1 - t``, the share of data at time ``t``; any shape, t's dtype."""
    return 1.0 - t


def rf_sigma(t: Tensor) -> Tensor:
    """``t`` itself, the share of noise at time ``t``; any shape."""
    return t


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
    """``x_t = (1 - t) x0 + t eps``, the noisy sample at time ``t``.

    Args:
        x0: data ``[B, ...]``.
        eps: standard normal noise, x0's shape.
        t: ``[B]`` or broadcastable, in [0, 1].

    Returns:
        x0's shape and dtype.
    """
    t = _wide_time(t, x0)
    shape = _common_shape(x0, eps, t)
    x_t = _fresh(x0, shape).mul_(rf_alpha(t))
    return x_t.add_(_fresh(eps, shape).mul_(rf_sigma(t))).to(x0.dtype)


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """``v = eps - x0``, what a flow network learns; x0's shape and dtype."""
    return _fresh(eps, _common_shape(eps, x0)).sub_(x0.double()).to(x0.dtype)


def pred_noise_to_pred_x0(pred_noise: Tensor, noisy_latents: Tensor, t: Tensor) -> Tensor:
    """``x0 = (x_t - t eps) / max(1 - t, 1e-6)``, the data that a predicted noise implies.

    Args:
        pred_noise: ``eps``, ``[B, ...]``.
        noisy_latents: ``x_t``, the same shape.
        t: ``[B]`` or broadcastable, in [0, 1].

    Returns:
        noisy_latents' shape and dtype.
    """
    t = _wide_time(t, noisy_latents)
    shape = _common_shape(noisy_latents, pred_noise, t)
    x0 = _fresh(noisy_latents, shape).sub_(_fresh(pred_noise, shape).mul_(rf_sigma(t)))
    return x0.div_(rf_alpha(t).clamp_min(_SMALLEST_DIVISOR)).to(noisy_latents.dtype)


def pred_x0_from_flow(pred_flow: Tensor, noisy_latents: Tensor, t: Tensor) -> Tensor:
    """``x0 = x_t - t v``, the data that a predicted velocity implies.

    Args:
        pred_flow: ``v``, ``[B, ...]``.
        noisy_latents: ``x_t``, the same shape.
        t: ``[B]`` or broadcastable, in [0, 1].

    Returns:
        noisy_latents' shape and dtype.
    """
    t = _wide_time(t, noisy_latents)
    shape = _common_shape(noisy_latents, pred_flow, t)
    x0 = _fresh(noisy_latents, shape).sub_(_fresh(pred_flow, shape).mul_(rf_sigma(t)))
    return x0.to(noisy_latents.dtype)


def x0_to_flow(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """``v = (x_t - x0) / max(t, 1e-6)``, the velocity that leads from ``x0`` to ``x_t``.

    Args:
        x0: data, ``[B, ...]``.
        x_t: the noisy sample, the same shape.
        t: ``[B]`` or broadcastable, in [0, 1].

    Returns:
        x0's shape and dtype.
    """
    t = _wide_time(t, x0)
    v = _fresh(x_t, _common_shape(x0, x_t, t)).sub_(x0.double())
    return v.div_(rf_sigma(t).clamp_min(_SMALLEST_DIVISOR)).to(x0.dtype)


def x0_to_eps(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """``eps = (x_t - (1 - t) x0) / max(t, 1e-6)``, the noise that leads from ``x0`` to ``x_t``.

    Args:
        x0: data, ``[B, ...]``.
        x_t: the noisy sample, the same shape.
        t: ``[B]`` or broadcastable, in [0, 1].

    Returns:
        x0's shape and dtype.
    """
    t = _wide_time(t, x0)
    shape = _common_shape(x0, x_t, t)
    eps = _fresh(x_t, shape).sub_(_fresh(x0, shape).mul_(rf_alpha(t)))
    return eps.div_(rf_sigma(t).clamp_min(_SMALLEST_DIVISOR)).to(x0.dtype)


def _wide_time(t: Tensor, like: Tensor) -> Tensor:
    return expand_like(t.double(), like)


def _common_shape(*tensors: Tensor) -> torch.Size:
    return torch.broadcast_shapes(*(x.shape for x in tensors))


def _fresh(x: Tensor, shape: torch.Size) -> Tensor:
    """A float64 copy of ``x`` with the given shape, which nobody else sees: autograd lets it be
    overwritten, and saves the old values itself where a gradient needs them."""
    if x.shape == shape:
        return x.to(torch.float64, copy=True)
    return x.double().expand(shape).clone()
