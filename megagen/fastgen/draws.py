"""The random numbers of a distillation step: one generator, and who shares what it draws.

Ranks of one model-parallel group (tensor, context, pipeline) work on the same samples and must draw
the same numbers; data-parallel ranks must not. With a ``group`` each draw is taken from the group's
first rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megagen.fastgen.timesteps import sample_from_t_list

__all__ = ["Draws"]


class Draws:
    """Draws of one call.

    Args:
        generator: where numbers come from; None: torch's default generator of the device.
        group: ranks that share every draw; None: each rank draws for itself.
    """

    def __init__(
        self, generator: torch.Generator | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        self.generator, self.group = generator, group

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise of ``like``'s shape, dtype and device."""
        place = self.place(like.device)
        noise = torch.empty_like(like, device=place, requires_grad=False)
        return self.share(noise.normal_(generator=self.generator).to(like.device))

    def from_list(self, n: int, t_list: Sequence[float], device: torch.device) -> Tensor:
        """``[n]`` float32, each a uniform pick of ``t_list[:-1]``."""
        place = self.place(device)
        t = sample_from_t_list(
            n, list(t_list), device=place, dtype=torch.float32, generator=self.generator
        )
        return self.share(t.to(device))

    def rung(self, count: int, device: torch.device) -> int:
        """One number in [0, count), the same on every rank of the run.

        All ranks take the same number of student steps, so that collectives inside the student
        (FSDP's) meet.
        """
        place = self.place(device)
        index = torch.randint(0, count, (1,), device=place, generator=self.generator).to(device)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(index, src=0)
        return int(index.item())

    def place(self, device: torch.device) -> torch.device:
        """Where numbers for ``device`` are drawn: where the generator is."""
        return self.generator.device if self.generator is not None else device

    def share(self, drawn: Tensor) -> Tensor:
        """The draw of the group's first rank, like ``drawn``."""
        if self.group is not None and self.group.size() > 1:
            drawn = drawn.contiguous()
            dist.broadcast(drawn, src=dist.get_global_rank(self.group, 0), group=self.group)
        return drawn
