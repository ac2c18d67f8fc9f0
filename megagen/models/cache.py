"""What a causal network keeps of the frames before: keys and values, never written again.

A cache is a list of blocks, and a longer cache is a new list that shares them. So a pass that is
repeated (recomputation, a pipeline's replay, another micro-batch) sees what the first one saw, and
nothing has to be cleared. Tensors are without gradient: it stops at the cache.

Legend: S tokens, B batch, N heads of this rank, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]
"""Keys (normed and rotated to their absolute frame) and values, ``[S, B, N, K]`` each."""


@dataclass(frozen=True)
class CachedBlock:
    """Keys and values of consecutive frames.

    Args:
        frames: latent frames of the video.
        layers: by global number, those of this rank's pipeline stages, for the heads that this rank
            attends with (over TP, and over CP under ``a2a``).
    """

    frames: range
    layers: Mapping[int, KeysValues]


@dataclass(frozen=True)
class KVCache:
    """This rank's part of what a causal network keeps of one micro-batch.

    Args:
        blocks: in order; those that no later frame can see are left out.
        next_frame: latent frame of the video that comes next.
        record: where the network puts the keys and values of the request's own frames, by layer;
            None: they are not kept.
    """

    blocks: tuple[CachedBlock, ...] = ()
    next_frame: int = 0
    record: dict[int, KeysValues] | None = None

    @property
    def frames(self) -> list[int]:
        """Latent frames that are held, in order."""
        return [frame for block in self.blocks for frame in block.frames]

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        tensors = [t for b in self.blocks for pair in b.layers.values() for t in pair]
        return sum(t.numel() * t.element_size() for t in tensors)

    def recording(self) -> KVCache:
        """The same, with an empty record."""
        return replace(self, record={})
