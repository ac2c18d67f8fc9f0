"""Which sample comes when: a pure function of (seed, step), so a loader's whole state is the step.

Every bucket is an endless sequence: its samples shuffled for epoch 0, then shuffled anew for epoch
1, and so on. A global batch takes the next G of one bucket's sequence; where an epoch ends within a
batch, the batch goes on with the next epoch, so nothing is dropped and nothing is padded. Buckets
take turns in cycles: in cycle c bucket b has ``floor((c + 1) n_b / G) - floor(c n_b / G)`` batches,
shuffled among the other buckets' (after c cycles each sample has been seen c times, give or take
one batch of its bucket). With one bucket, the order does not depend on G either.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megagen.core.streams import Streams

Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """One place of a global batch: an entry of a bucket, in an epoch of that bucket."""

    bucket: int
    entry: int
    epoch: int


class Order:
    """The order of a run.

    Args:
        sizes: entries of each bucket, all >= 1.
        global_batch_size: G, samples per step.
        streams: the run's streams, or those of the data's own seed.
    """

    def __init__(self, sizes: Sequence[int], global_batch_size: int, streams: Streams) -> None:
        if not sizes or min(sizes) < 1 or global_batch_size < 1:
            raise ValueError(f"no empty bucket or batch: {sizes}, {global_batch_size}")
        self.sizes, self.global_batch_size = tuple(sizes), global_batch_size
        self._streams = streams
        self._permutations: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self._schedules: OrderedDict[int, Tensor] = OrderedDict()

    def step(self, step: int) -> list[Place]:
        """The global batch of a step (from 0): G places of one bucket."""
        bucket, batch = self.bucket_of(step)
        first = batch * self.global_batch_size
        return [self.place(bucket, first + i) for i in range(self.global_batch_size)]

    def place(self, bucket: int, position: int) -> Place:
        """The entry at a position of a bucket's endless sequence."""
        epoch, index = divmod(position, self.sizes[bucket])
        return Place(bucket, int(self._permutation(bucket, epoch)[index]), epoch)

    def bucket_of(self, step: int) -> tuple[int, int]:
        """(bucket, how many batches it has had before) of a step."""
        if len(self.sizes) == 1:
            return 0, step
        limit = (step + 1 + len(self.sizes)) * self.global_batch_size // sum(self.sizes) + 2
        cycle = bisect_right(range(limit), step, key=self._batches_before) - 1
        schedule, index = self._schedule(cycle), step - self._batches_before(cycle)
        bucket = int(schedule[index])
        seen = int((schedule[:index] == bucket).sum())
        return bucket, cycle * self.sizes[bucket] // self.global_batch_size + seen

    def _batches_before(self, cycle: int) -> int:
        return sum(cycle * size // self.global_batch_size for size in self.sizes)

    def _schedule(self, cycle: int) -> Tensor:
        """Bucket of each batch of a cycle."""

        def make() -> Tensor:
            size = self.global_batch_size
            counts = [(cycle + 1) * n // size - cycle * n // size for n in self.sizes]
            buckets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
            return buckets[self._streams.permutation("bucket_order", len(buckets), cycle)]

        return _remember(self._schedules, cycle, 2, make)

    def _permutation(self, bucket: int, epoch: int) -> Tensor:
        def make() -> Tensor:
            return self._streams.permutation("data_order", self.sizes[bucket], bucket, epoch)

        return _remember(self._permutations, (bucket, epoch), 2 * len(self.sizes), make)


Key = TypeVar("Key")


def _remember(
    cache: OrderedDict[Key, Value], key: Key, capacity: int, make: Callable[[], Value]
) -> Value:
    if key not in cache:
        cache[key] = make()
        while len(cache) > capacity:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
