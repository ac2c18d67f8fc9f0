"""Caches of causal networks: held by a role, handed about as references.

A rollout, block by block, with ``student`` a role of a causal network (all calls are collective)::

    caches = [None] * len(noise)                     # one a micro-batch; no frame yet
    for block in student.plugin.blocks(num_frames):  # ranges of latent frames
        x = [n[:, :, block.start : block.stop] for n in noise]
        for t in t_list:                             # few-step denoising, no gradient
            v = student.predict([Request(x_i, t, condition_i, cache=c), ...])
            ...
        # the pass that carries the gradient is one more request with the same cache
        kept.append(Request(x_before, t_exit, condition_i, cache=c))
        # the block as the next ones see it: clean at timestep 0, or with context noise at its
        caches = student.extend_cache([Request(x0_i, t_context, condition_i, cache=c), ...])
    student.forward_backward(kept, loss_fn)          # in any order, at any time before ``step``

``extend_cache`` changes nothing: it gives new references, and a cache lives for as long as anything
refers to it or to a longer one that shares its blocks. The gradient stops at the cache. With
guidance each branch has a cache of its own. A request with a cache may hold any number of frames;
they are cut into blocks from its first on. The network's window decides what is kept.

Where a role's layout differs from the run's, its ranks hold parts of other data ranks' caches too.
So a reference carries no tensors between ranks: each rank finds its own part by the reference's
key, and keeps all parts of one ``extend_cache`` while it holds any reference made by that call.
Replicas that serve the same data ranks each write all their caches.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megagen.engine.exchange import Item
from megagen.models.cache import KVCache


@dataclass(frozen=True, eq=False)
class Parts:
    """This rank's parts of the caches that one call made, by micro-batch."""

    caches: Mapping[Item, KVCache]


@dataclass(frozen=True)
class CacheRef:
    """A cache of one micro-batch of this data rank.

    Args:
        serial: of the call that made it, the same on every rank.
        item: data rank and number of the micro-batch.
        next_frame: latent frame of the video that comes next.
        parts: keeps this rank's tensors alive; None in a reference that came from another rank.
    """

    serial: int
    item: Item
    next_frame: int
    parts: Parts | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> Any:
        """Between ranks the key travels, not the tensors."""
        return CacheRef, (self.serial, self.item, self.next_frame)


class Caches:
    """The caches of one role on this rank that somebody still refers to."""

    def __init__(self) -> None:
        self._serial = 0
        self._alive: weakref.WeakValueDictionary[int, Parts] = weakref.WeakValueDictionary()

    def keep(
        self, caches: Mapping[Item, KVCache], own: Sequence[tuple[Item, int]]
    ) -> list[CacheRef]:
        """References to the own ones of ``caches``, with the frame that comes next.

        Args:
            caches: this rank's parts, of every micro-batch that its replica works on.
            own: micro-batches of this data rank, and the next frame of each.
        """
        self._serial += 1
        parts = Parts(caches)
        self._alive[self._serial] = parts
        return [CacheRef(self._serial, item, frame, parts) for item, frame in own]

    def find(self, ref: CacheRef | None) -> KVCache | None:
        """This rank's part of a cache.

        Raises:
            ValueError: it is of another role, or was not kept on every rank.
        """
        if ref is None:
            return None
        parts = ref.parts or self._alive.get(ref.serial)
        if parts is None or self._alive.get(ref.serial) is not parts:
            raise ValueError(f"{ref} is not of this role, or not every rank holds it any more")
        return parts.caches[ref.item]
