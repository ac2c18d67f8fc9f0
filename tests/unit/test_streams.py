"""Streams depend on what they are for and on nothing else."""

import torch

from megagen.core.streams import Streams


def test_same_key_same_numbers_whatever_was_drawn_before() -> None:
    a = Streams(7).normal("noise", 3, [10, 11, 12], (4, 5))
    torch.manual_seed(0)
    torch.randn(17)
    Streams(7).uniform("timestep", 3, [10])
    b = Streams(7).normal("noise", 3, [12, 10], (4, 5))
    assert torch.equal(b[0], a[2]) and torch.equal(b[1], a[0])


def test_every_part_of_the_key_matters() -> None:
    draws = [
        Streams(seed).normal(purpose, step, [sample], (8,))
        for seed, purpose, step, sample in [
            (1, "noise", 1, 1),
            (2, "noise", 1, 1),
            (1, "timestep", 1, 1),
            (1, "noise", 11, 1),
            (1, "noise", 1, 11),
        ]
    ]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert not torch.allclose(a, b)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    streams = Streams(0)
    streams.normal("a", 0, [0], (2,))
    streams.integers("b", 0, [0], 0, 5)
    streams.permutation("c", 10, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_moments() -> None:
    z = Streams(3).normal("noise", 0, range(2000), (10,)).double()
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    correlation = (z[:-1] * z[1:]).mean()  # neighbouring samples
    assert abs(correlation) < 0.03
    u = Streams(3).uniform("t", 0, range(4000)).double()
    assert abs(u.mean() - 0.5) < 0.02 and u.min() >= 0 and u.max() < 1
