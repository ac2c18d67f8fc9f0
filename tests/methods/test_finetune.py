"""Fine-tuning against its formulas: noising, target, loss, weights, law of the timesteps."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

from megagen.core.errors import ConfigError
from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.methods.base import TrainingMethod
from megagen.methods.finetune import FineTuneMethod, FineTuneOptions

MEAN, STD = 0.3, 1.7


def role(flow_shift: float = 3.0, timestep_range: tuple[float, float] = (0.0, 1000.0)) -> Any:
    """What the method asks of a role, with a "network" that answers 0.5 x + t / 1000."""
    plugin = SimpleNamespace(
        flow_shift=flow_shift,
        timestep_range=timestep_range,
        normalize=lambda latents: (latents - MEAN) / STD,
    )
    seen: list[Any] = []

    def forward_backward(requests: Any, loss_fn: Any) -> list[dict[str, torch.Tensor]]:
        seen.extend(requests)
        answers = (0.5 * r.latents_BCTHW + r.timestep.view(-1, 1, 1, 1, 1) / 1000 for r in requests)
        return [loss_fn(v, r) for v, r in zip(answers, requests, strict=True)]

    info = SimpleNamespace(grad_norm=2.0, learning_rate=0.1, skipped=False)
    return SimpleNamespace(
        plugin=plugin,
        seen=seen,
        zero_grad=lambda: None,
        forward_backward=forward_backward,
        step=lambda: info,
    )


def method(student: Any, seed: int = 5, **options: Any) -> FineTuneMethod:
    parsed = parse_options(FineTuneOptions, options, "method")
    return FineTuneMethod({"student": student}, parsed, Streams(seed))


def batch(positions: tuple[int, ...], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(positions), 2, 3, 4, 4, generator=generator)
    names = tuple(str(p) for p in positions)
    return Batch(latents, {}, positions, names, names)


@pytest.mark.parametrize("weighting", ["none", "bell", "one_plus_sigma"])
def test_one_step_from_the_formulas(weighting: str) -> None:
    student = role(flow_shift=2.5)
    batches = [batch((8, 9, 10), 1), batch((11, 12, 13), 2)]
    result = method(student, loss_weighting=weighting).train_step(batches, step=4)
    streams, losses = Streams(5), []
    for given in batches:
        per_sample = []
        for i, position in enumerate(given.positions):
            x0 = (given.latents_BCTHW[i].double() - MEAN) / STD
            noise = torch.randn(2, 3, 4, 4, generator=streams.generator("noise", 4, position))
            u = 1 - torch.rand((), generator=streams.generator("timestep", 4, position)).double()
            sigma = 2.5 * u / (1 + 1.5 * u)
            x_t = (1 - sigma) * x0 + sigma * noise.double()
            answer = 0.5 * x_t + sigma
            weight = {
                "none": 1.0,
                "bell": math.exp(-2 * (sigma - 0.5) ** 2) / 0.8556243918921488,
                "one_plus_sigma": (1 + 2.5 * sigma) / 2.25,
            }[weighting]
            per_sample.append(weight * ((answer - (noise.double() - x0)) ** 2).mean())
        losses.append(torch.stack(per_sample).mean())
    assert result.metrics["loss/total"] == pytest.approx(
        float(torch.stack(losses).mean()), rel=1e-6
    )
    assert result.metrics["grad_norm/student"] == 2.0 and result.skipped == ()


def test_weights_have_mean_one() -> None:
    sigma = (torch.arange(20000) + 0.5) / 20000
    for weighting in ("none", "bell", "one_plus_sigma", "index_bell"):
        weight = method(role(), loss_weighting=weighting).loss_weight(sigma, base=sigma)
        assert float(weight.double().mean()) == pytest.approx(1.0, abs=1e-5)


def sigmas(count: int = 4000, student: Any = None, **options: Any) -> Any:
    return method(student or role(flow_shift=1.0), **options).draw_sigma(0, range(count)).numpy()


def test_laws_of_the_timesteps() -> None:
    assert stats.kstest(sigmas(), "uniform").pvalue > 1e-3
    drawn = sigmas(weighting_scheme="logit_normal", logit_mean=0.4, logit_std=0.7)
    logits = torch.logit(torch.from_numpy(drawn)).numpy()
    assert stats.kstest(logits, stats.norm(0.4, 0.7).cdf).pvalue > 1e-3
    u = torch.linspace(0, 1, 20001).double()
    mode = 1 - u - 0.8 * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    drawn = sigmas(weighting_scheme="mode", mode_scale=0.8)
    assert stats.ks_2samp(drawn, mode.numpy()).pvalue > 1e-3
    shifted = sigmas(weighting_scheme="shifted", timestep_shift=4.0)
    assert stats.kstest(shifted, lambda s: s / (4 - 3 * s)).pvalue > 1e-3


def test_the_runs_shift_warps_every_law_but_shifted() -> None:
    plain, warped = sigmas(), sigmas(student=role(flow_shift=3.0))
    assert torch.allclose(torch.from_numpy(warped), torch.from_numpy(3 * plain / (1 + 2 * plain)))
    one, other = (
        sigmas(student=role(flow_shift=f), weighting_scheme="shifted", timestep_shift=2.0)
        for f in (1.0, 7.0)
    )
    assert (one == other).all()


def test_ranges_of_experts_and_options() -> None:
    low = sigmas(student=role(3.0, (0.0, 875.0)))
    high = sigmas(student=role(3.0, (875.0, 1000.0)))
    assert low.max() <= 0.875 < high.min() and high.max() <= 1
    narrow = sigmas(min_timestep_ratio=0.2, max_timestep_ratio=0.6)
    assert narrow.min() >= 0.2 and narrow.max() <= 0.6


def test_a_step_does_not_depend_on_how_samples_are_dealt_out() -> None:
    together, apart = role(), role()
    method(together).train_step([batch((0, 1, 2, 3))], 7)
    whole = batch((0, 1, 2, 3))
    halves = [
        Batch(whole.latents_BCTHW[s], {}, whole.positions[s], whole.ids[s], whole.captions[s])
        for s in (slice(0, 2), slice(2, 4))
    ]
    method(apart).train_step(halves, 7)
    joined = torch.cat([r.latents_BCTHW for r in apart.seen])
    assert torch.equal(together.seen[0].latents_BCTHW, joined)


def test_roles_are_checked() -> None:
    with pytest.raises(ConfigError, match="student"):
        FineTuneMethod.check_roles(("student", "teacher"))
    with pytest.raises(ConfigError):
        TrainingMethod.check_roles(())
