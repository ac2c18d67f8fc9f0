"""``callbacks.ema`` and ``callbacks.grad_clip``: FastVideo's names for settings of the engine."""

from __future__ import annotations

from pydantic import Field

from megagen.core.options import StrictOptions


class EMAOptions(StrictOptions):
    """``callbacks.ema``: moving average of the student's weights.

    Attributes:
        decay: share of the old average kept at each update, in [0, 1).
        start_iter: student updates before the average starts (from the weights of that moment).
    """

    decay: float = Field(0.9999, ge=0, lt=1)
    start_iter: int = Field(0, ge=0)


class GradClipOptions(StrictOptions):
    """``callbacks.grad_clip``: clipping by the global norm over all ranks.

    Attributes:
        max_grad_norm: > 0 clips; 0: no clipping (the norm is still reported).
    """

    max_grad_norm: float = Field(1.0, ge=0)
