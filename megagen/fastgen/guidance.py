"""Classifier-free guidance of a teacher: scale, interval and rescaling.

Ho and Salimans, arXiv 2207.12598, in the form ``uncond + s (cond - uncond)``: s = 1 is no guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagen.fastgen.utils import classifier_free_guidance, expand_like

__all__ = ["Guidance", "without_prompt"]


@dataclass(frozen=True)
class Guidance:
    """How strongly, and where, a teacher is guided.

    Args:
        scale: s >= 0; 1 leaves the conditional prediction as it is.
        interval: lowest and highest t in [0, 1] at which guidance applies, both included; None:
            everywhere (Kynkaanniemi et al., arXiv 2404.07724).
        rescale: phi in [0, 1]: share of the guided prediction whose standard deviation is set to
            the conditional one's (Lin et al., arXiv 2305.08891, eq. 15 and 16).
    """

    scale: float
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def wanted(self, t: Tensor) -> bool:
        """Whether any sample of ``t`` ``[B]`` lies in the interval.

        Reads ``t`` on the host where there is an interval.
        """
        return self.interval is None or bool(self._inside(t).any())

    def combine(self, cond: Tensor, uncond: Tensor, t: Tensor) -> Tensor:
        """The guided prediction.

        Args:
            cond: conditional x0, ``[B, ...]``.
            uncond: unconditional x0, like ``cond``.
            t: ``[B]`` in [0, 1].

        Returns:
            Like ``cond``.
        """
        guided = classifier_free_guidance(cond, uncond, self.scale)
        if self.rescale > 0:
            axes = tuple(range(1, cond.ndim))
            ratio = cond.float().std(axes, keepdim=True) / guided.float().std(axes, keepdim=True)
            guided = guided * (1 + self.rescale * (ratio - 1)).to(guided.dtype)
        if self.interval is None:
            return guided
        return torch.where(expand_like(self._inside(t), cond), guided, cond)

    def _inside(self, t: Tensor) -> Tensor:
        assert self.interval is not None
        low, high = self.interval
        return (t >= low) & (t <= high)


def without_prompt(
    given: Mapping[str, Any], embedding: Tensor | None, mask: Tensor | None
) -> dict[str, Any]:
    """The arguments of the unconditional pass: the negative embedding, no trace of the prompt.

    Args:
        given: arguments of the conditional pass.
        embedding: replaces ``encoder_hidden_states``, ``[B, L', D]``.
        mask: replaces ``encoder_hidden_states_mask``, which is dropped where None.
    """
    dropped = ("encoder_hidden_states_mask", "txt_seq_lens")
    negative = {name: value for name, value in given.items() if name not in dropped}
    negative["encoder_hidden_states"] = embedding
    return negative if mask is None else {**negative, "encoder_hidden_states_mask": mask}
