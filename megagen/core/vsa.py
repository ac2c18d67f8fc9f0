"""Options of video sparse attention (VSA, arXiv 2505.13389), of a config and of a network."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from megagen.core.options import StrictOptions

CONFIG_KEY = "_vsa"
"""Where a transformer's ``config.json`` keeps ``VSAOptions``; diffusers ignores such keys."""


class VSAOptions(StrictOptions):
    """``models.<role>.attention.vsa``: each tile of tokens attends to the tiles that matter to it.

    Attributes:
        sparsity: share of the tiles that a tile leaves out, in [0, 1); 0: attention is dense.
        tile: tokens of a tile along (frame, row, column), at most 64 together; ``auto``: one that
            fits the video's size.
        decay_rate: the sparsity rises from 0 by this, in steps of the run; None: it does not rise.
        decay_interval_steps: steps between two rises.
        dense_backend: of what stays dense (cross-attention): ``sdpa``, ``flash`` or ``te``.
        kernels: ``auto``, or the kernels to use: ``reference``, ``cpu``, ``triton``, ``cuda``.
        deterministic: the same gradients bit by bit in every run; false: the faster backward pass.
    """

    sparsity: float = Field(ge=0, lt=1)
    tile: tuple[int, int, int] | Literal["auto"] = (4, 4, 4)
    decay_rate: float | None = Field(None, gt=0, lt=1)
    decay_interval_steps: int | None = Field(None, ge=1)
    dense_backend: Literal["sdpa", "flash", "te"] = "sdpa"
    kernels: str = "auto"
    deterministic: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> VSAOptions:
        if self.tile != "auto":
            tile: Any = self.tile
            if min(tile) < 1 or math.prod(tile) > 64:
                raise ValueError(
                    f"tile {list(tile)} has {math.prod(tile)} tokens; its sizes must be at least "
                    "1 and at most 64 together"
                )
        if (self.decay_rate is None) != (self.decay_interval_steps is None):
            raise ValueError("decay_rate and decay_interval_steps go together: give both or none")
        if self.decay_rate is not None and self.decay_rate > self.sparsity:
            raise ValueError(
                f"decay_rate {self.decay_rate} is more than sparsity {self.sparsity}: it would "
                "never rise from 0"
            )
        return self

    def at(self, step: int | None) -> float:
        """The sparsity in a step of the run: ``min(step // interval, s // rate) * rate``.

        Args:
            step: steps done before it; None: after the last rise.
        """
        if self.decay_rate is None or self.decay_interval_steps is None:
            return self.sparsity
        most = math.floor(self.sparsity / self.decay_rate + 1e-9)  # 0.9 / 0.03 is a little below 30
        rises = most if step is None else min(step // self.decay_interval_steps, most)
        return round(rises * self.decay_rate, 12)
