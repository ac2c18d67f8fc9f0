"""Two small tensor helpers that every part of the loss library shares."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["classifier_free_guidance", "expand_like"]


def expand_like(x: Tensor, target: Tensor) -> Tensor:
    """``x`` with trailing axes of size 1 until it has as many axes as ``target``.

    Axes are never taken away, so a time per frame (``[B, 1, T, 1, 1]``) passes as it is.

    Args:
        x: any shape; a scalar counts as ``[1]``.
        target: only its number of axes is read.

    Returns:
        A view of ``x``, ready to broadcast against ``target``.
    """
    x = torch.atleast_1d(x)
    return x.reshape(x.shape + (1,) * max(0, target.ndim - x.ndim))


def classifier_free_guidance(
    cond_pred: Tensor, uncond_pred: Tensor, guidance_scale: float
) -> Tensor:
    """``c + (s - 1)(c - u)``, which is ``u + s (c - u)``: 1 means no guidance, 0 the unconditional.

    Ho & Salimans, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598). Papers that write
    ``c + w (c - u)``, DMD2 (arXiv 2405.14867) among them, mean ``w = s - 1``.

    Args:
        cond_pred: ``c``, any shape, the network's output with the prompt.
        uncond_pred: ``u``, the same shape, with the negative or empty prompt.
        guidance_scale: ``s``, any number; above 1 pushes away from ``u``.

    Returns:
        The same shape and dtype; gradients reach both predictions.
    """
    return cond_pred + (guidance_scale - 1.0) * (cond_pred - uncond_pred)
