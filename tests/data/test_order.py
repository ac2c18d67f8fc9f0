"""The order is a pure function of (seed, step) in which nothing is lost or repeated."""

from __future__ import annotations

from collections import Counter

import pytest

from megagen.core.streams import Streams
from megagen.data.order import Order, Place


def epochs(order: Order, num_steps: int) -> dict[tuple[int, int], Counter[int]]:
    """(bucket, epoch) -> how often each entry came."""
    found: dict[tuple[int, int], Counter[int]] = {}
    for step in range(num_steps):
        for place in order.step(step):
            found.setdefault((place.bucket, place.epoch), Counter())[place.entry] += 1
    return found


@pytest.mark.parametrize("batch", [1, 4, 7, 23])
def test_every_sample_once_per_epoch(batch: int) -> None:
    sizes = (17, 5, 30, 1)
    order = Order(sizes, batch, Streams(3))
    found = epochs(order, 5 * sum(sizes) // batch)
    for (bucket, epoch), counts in found.items():
        if (bucket, epoch + 1) in found:  # whole
            assert counts == Counter(range(sizes[bucket]))
    for bucket, size in enumerate(sizes):  # buckets take turns in proportion, give or take a batch
        taken = sum(c.total() for (b, _), c in found.items() if b == bucket)
        assert abs(taken - 5 * size) <= 2 * batch


def test_one_bucket_is_one_long_sequence_whatever_the_batch() -> None:
    def flat(batch: int) -> list[Place]:
        order = Order([13], batch, Streams(1))
        return [place for step in range(24 // batch) for place in order.step(step)]

    assert flat(1) == flat(2) == flat(6) == flat(24)


def test_reshuffled_every_epoch_and_by_seed() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = Order([40], 1, Streams(seed))
        return [order.step(40 * number + i)[0].entry for i in range(40)]

    assert epoch(0, 0) == epoch(0, 0)
    assert len({tuple(epoch(s, n)) for s in (0, 1) for n in (0, 1, 2)}) == 6
    assert sorted(epoch(0, 2)) == list(range(40))


def test_a_batch_is_of_one_bucket_and_buckets_are_mixed() -> None:
    order = Order((50, 30, 20), 5, Streams(9))
    buckets = [order.step(step) for step in range(200)]
    assert all(len({place.bucket for place in batch}) == 1 for batch in buckets)
    sequence = [batch[0].bucket for batch in buckets]
    assert Counter(sequence) == {0: 100, 1: 60, 2: 40}
    assert sequence[:20] != sequence[20:40]  # another mix in every cycle
    assert any(sequence[i] != sequence[i + 1] for i in range(10))


def test_any_step_without_those_before() -> None:
    sizes, batch = (11, 3, 8), 4
    in_turn = Order(sizes, batch, Streams(5))
    expected = [in_turn.step(step) for step in range(60)]
    for step in (59, 0, 17, 42, 41, 58):
        assert Order(sizes, batch, Streams(5)).step(step) == expected[step]


def test_batch_larger_than_a_bucket_and_than_the_dataset() -> None:
    order = Order((2, 1), 8, Streams(0))
    places = [place for step in range(30) for place in order.step(step)]
    counts = Counter(place.bucket for place in places)
    assert counts[0] + counts[1] == 240
    assert abs(counts[0] - 160) <= 8
