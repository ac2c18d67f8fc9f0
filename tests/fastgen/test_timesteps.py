"""Timestep samplers: the published draws from the same seed, and the distributions they promise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

from megagen.fastgen.config import SampleTimestepConfig
from megagen.fastgen.timesteps import sample_from_t_list, sample_timesteps

TYPES = ("uniform", "shifted", "logitnormal", "lognormal", "polynomial")
CPU = torch.device("cpu")
N = 20_000
FAR = 2.8 / math.sqrt(N)
"""A Kolmogorov-Smirnov distance beyond which chance leads once in three million draws."""


def random_config(kind: str, seeded: torch.Generator) -> SampleTimestepConfig:
    rng = random.Random(seeded.initial_seed())
    return SampleTimestepConfig(
        time_dist_type=kind,
        min_t=rng.uniform(0.0, 0.2),
        max_t=rng.uniform(0.7, 1.0),
        shift=rng.uniform(1.0, 8.0),
        p_mean=rng.uniform(-1.0, 1.0),
        p_std=rng.uniform(0.5, 2.0),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", TYPES)
def test_the_same_seed_gives_the_published_draws(
    published: Any, kind: str, dtype: torch.dtype, seeded: torch.Generator
) -> None:
    cfg, seed = random_config(kind, seeded), seeded.initial_seed()
    theirs = published.SampleTimestepConfig(**cfg)
    torch.manual_seed(seed)
    found = sample_timesteps(100, cfg, device=CPU, dtype=dtype)
    torch.manual_seed(seed)
    wanted = published.flow_matching.sample_timesteps(100, theirs, device=CPU, dtype=dtype)
    assert found.dtype == dtype and torch.equal(found, wanted)
    torch.manual_seed(seed)
    rungs = sample_from_t_list(50, [0.9, 0.5, 0.2, 0.0], device=CPU, dtype=dtype)
    torch.manual_seed(seed)
    assert torch.equal(
        rungs,
        published.flow_matching.sample_from_t_list(
            50, [0.9, 0.5, 0.2, 0.0], device=CPU, dtype=dtype
        ),
    )


def cumulative(cfg: SampleTimestepConfig) -> Callable[[Any], Any]:
    """P(t <= .) before the clamp, from the definition of the distribution."""
    m, span = cfg.min_t, cfg.max_t - cfg.min_t
    uniform = stats.uniform(m, span)
    if cfg.time_dist_type == "shifted":
        return lambda t: uniform.cdf(t / (cfg.shift - (cfg.shift - 1) * t))
    if cfg.time_dist_type == "logitnormal":
        normal = stats.norm(cfg.p_mean, cfg.p_std)
        return lambda t: normal.cdf([math.log(u / (1 - u)) for u in (t - m) / span])
    if cfg.time_dist_type == "lognormal":
        low, high = ((math.log(x) - cfg.p_mean) / cfg.p_std for x in (m, cfg.max_t))
        cut = stats.truncnorm(low, high, cfg.p_mean, cfg.p_std)
        return lambda t: cut.cdf([math.log(x) for x in t])
    return uniform.cdf


@pytest.mark.parametrize("kind", TYPES)
def test_distribution(published: Any, kind: str, seeded: torch.Generator) -> None:
    cfg = random_config(kind, seeded)
    t = sample_timesteps(N, cfg, device=CPU, dtype=torch.float64, generator=seeded)
    assert t.min() >= cfg.min_t and t.max() <= cfg.max_t
    below, cdf = t[t < cfg.max_t].numpy(), cumulative(cfg)
    grid = 1e-3 if kind == "polynomial" else 0.0
    mass = float(cdf(cfg.max_t)) if kind == "shifted" else 1 - grid
    assert abs(len(below) / N - mass) < FAR, "what the clamp moved to max_t"
    distance = stats.kstest(below, lambda x: cdf(x) / mass).statistic
    assert distance < FAR / math.sqrt(mass) + grid
    theirs = published.flow_matching.sample_timesteps(
        N, published.SampleTimestepConfig(**cfg), device=CPU, dtype=torch.float64
    )
    assert stats.ks_2samp(t.numpy(), theirs.numpy()).statistic < FAR * math.sqrt(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TYPES)
def test_bounds_hold_after_rounding(kind: str, dtype: torch.dtype, seeded: torch.Generator) -> None:
    cfg = SampleTimestepConfig(time_dist_type=kind, min_t=0.1, max_t=0.8, shift=8.0, p_std=9.0)
    t = sample_timesteps(N, cfg, device=CPU, dtype=dtype, generator=seeded)
    low, high = torch.tensor([0.1, 0.8], dtype=dtype)
    assert low <= t.min() and t.max() <= high
    if kind == "shifted":  # t' of which the shift makes 0.8 or more is 1/3 or more
        assert abs(float((t == high).double().mean()) - (0.8 - 1 / 3) / 0.7) < FAR + 0.01


def test_list_is_uniform_over_its_rungs(seeded: torch.Generator) -> None:
    t_list = [0.9, 0.5, 0.2, 0.0]
    t = sample_from_t_list(N, t_list, device=CPU, dtype=torch.float64, generator=seeded)
    counts = [int((t == rung).sum()) for rung in t_list]
    assert counts[-1] == 0 and sum(counts) == N
    assert stats.chisquare(counts[:-1]).pvalue > 1e-6


@pytest.mark.parametrize("kind", TYPES)
def test_generator_stands_for_the_default_one(kind: str, seeded: torch.Generator) -> None:
    cfg, seed = random_config(kind, seeded), seeded.initial_seed()
    own = torch.Generator().manual_seed(seed)
    before = torch.get_rng_state()
    found = sample_timesteps(20, cfg, device="cpu", generator=own)
    rungs = sample_from_t_list(20, [0.9, 0.4, 0.0], device="cpu", generator=own)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(seed)
    assert torch.equal(found, sample_timesteps(20, cfg, device="cpu"))
    assert torch.equal(rungs, sample_from_t_list(20, [0.9, 0.4, 0.0], device="cpu"))


def test_what_is_rejected(published: Any) -> None:
    unknown = SimpleNamespace(time_dist_type="cosine", min_t=0.0, max_t=1.0)
    for library in (SimpleNamespace(**globals()), published.flow_matching):
        with pytest.raises(ValueError, match="cosine"):
            library.sample_timesteps(3, unknown, device=CPU)
        for t_list in ([0.0], [0.9, 0.5], []):
            with pytest.raises(AssertionError):
                library.sample_from_t_list(3, t_list, device=CPU)
    assert sample_timesteps(0, SampleTimestepConfig(), device=CPU).shape == (0,)
