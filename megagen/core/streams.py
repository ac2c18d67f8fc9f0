"""Seeded random streams: every random number of a run is a function of what it is for.

A generator is derived from ``(seed, purpose, key...)``, where the key is usually ``(step, sample)``
with ``sample`` the global sample position of the run. So noise, timesteps, exit steps, caption
dropout and data order are the same on one rank, under TP, CP and PP, on any number of data-parallel
ranks and after a resume, and no state needs saving. Nothing in megagen reads the global RNG.

Draws are made on the CPU and moved: a CUDA generator gives other numbers for the same seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Streams:
    """The streams of one run.

    Args:
        seed: the run's seed, any integer.
    """

    seed: int

    def generator(self, purpose: str, *key: int | str) -> torch.Generator:
        """A CPU generator that depends on ``(seed, purpose, key)`` alone.

        Two different tuples give independent streams (a 63-bit hash of the tuple is the seed).
        """
        text = "\x1f".join([str(self.seed), purpose, *map(str, key)])
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def normal(
        self, purpose: str, step: int, samples: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """Standard normal noise ``[len(samples), *shape]``, fp32, one stream per sample."""
        return torch.stack(
            [
                torch.randn(tuple(shape), generator=self.generator(purpose, step, sample))
                for sample in samples
            ]
        )

    def uniform(
        self, purpose: str, step: int, samples: Sequence[int], shape: Sequence[int] = ()
    ) -> Tensor:
        """Uniform numbers in [0, 1), ``[len(samples), *shape]``, fp32, one stream per sample."""
        return torch.stack(
            [
                torch.rand(tuple(shape), generator=self.generator(purpose, step, sample))
                for sample in samples
            ]
        )

    def integers(
        self,
        purpose: str,
        step: int,
        samples: Sequence[int],
        low: int,
        high: int,
        shape: Sequence[int] = (),
    ) -> Tensor:
        """Integers in [low, high), ``[len(samples), *shape]``, int64, one stream per sample."""
        return torch.stack(
            [
                torch.randint(
                    low, high, tuple(shape), generator=self.generator(purpose, step, sample)
                )
                for sample in samples
            ]
        )

    def permutation(self, purpose: str, length: int, *key: int | str) -> Tensor:
        """A permutation of ``range(length)``, int64 ``[length]``."""
        return torch.randperm(length, generator=self.generator(purpose, *key))
