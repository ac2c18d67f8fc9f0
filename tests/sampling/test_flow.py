"""Samplers against diffusers' schedulers and against an ODE with a closed solution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.sampling import flow

MEAN, STD = 0.7, 0.4


def gaussian_velocity(x: Tensor, sigma: float) -> Tensor:
    """``E[eps - x0 | x]`` for data N(MEAN, STD^2): linear in x, its ODE has a closed solution."""
    alpha = 1 - sigma
    variance = alpha**2 * STD**2 + sigma**2
    centred = x - alpha * MEAN
    return sigma * centred / variance - (MEAN + alpha * STD**2 * centred / variance)


def gaussian_solution(noise: Tensor, sigma: float) -> Tensor:
    """The path of noise e at ``sigma``: quantiles go to quantiles of N(alpha MEAN, variance)."""
    alpha = 1 - sigma
    return alpha * MEAN + math.sqrt(alpha**2 * STD**2 + sigma**2) * noise


def crooked_velocity(x: Tensor, sigma: float) -> Tensor:
    """Something that is not linear and depends on sigma."""
    return torch.sin(3 * x) * (1 + sigma) - x * sigma**2 + x.mean()


def fresh(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


@pytest.mark.parametrize(
    "steps, shift, order", list(itertools.product([1, 2, 3, 7, 20], [1.0, 5.0], [1, 2, 3]))
)
def test_unipc_equals_diffusers(steps: int, shift: float, order: int) -> None:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=order,
    )
    scheduler.set_timesteps(steps)
    noise = fresh(2, 3, 2, 4, 4)
    x = noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        velocity = crooked_velocity(x, float(sigma))
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    ours = flow.unipc(crooked_velocity, noise, scheduler.sigmas.tolist(), order)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4 if order == 3 else 2e-5)


@pytest.mark.parametrize("steps, shift", [(1, 1.0), (4, 3.0), (25, 7.0)])
def test_euler_equals_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    noise = fresh(2, 3, 2, 4, 4)
    x = noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        x = scheduler.step(crooked_velocity(x, float(sigma)), timestep, x, return_dict=False)[0]
    ours = flow.euler(crooked_velocity, noise, scheduler.sigmas.tolist())
    torch.testing.assert_close(ours, x.double(), rtol=0, atol=1e-5)


def gaussian_error(name: str, steps: int, first: float, last: float) -> float:
    """Largest error at ``last`` of a path that starts on the exact one at ``first``."""
    noise = fresh(64)
    sigmas = [first + (last - first) * i / steps for i in range(steps + 1)]
    x = flow.solve(name, gaussian_velocity, gaussian_solution(noise, first), sigmas)
    return float((x - gaussian_solution(noise, last)).abs().max())


@pytest.mark.parametrize("name, order", [("euler", 1), ("unipc", 2)])
def test_samplers_converge_to_the_exact_solution_at_their_order(name: str, order: int) -> None:
    coarse, fine = (gaussian_error(name, steps, 0.9, 0.1) for steps in (32, 128))
    assert fine < 0.01
    assert math.log(coarse / fine) / math.log(4) > 0.85 * order


@pytest.mark.parametrize("name", list(flow.SAMPLERS))
def test_samplers_reach_the_data_from_pure_noise(name: str) -> None:
    assert gaussian_error(name, 200, 1.0, 0.0) < 0.02


def test_unipc_beats_euler_at_equal_steps() -> None:
    assert gaussian_error("unipc", 32, 0.9, 0.1) < 0.2 * gaussian_error("euler", 32, 0.9, 0.1)


def test_one_euler_step_is_the_x0_prediction() -> None:
    noise = fresh(8)
    expected = noise - gaussian_velocity(noise, 1.0)
    torch.testing.assert_close(flow.euler(gaussian_velocity, noise, [1.0, 0.0]), expected)


def test_sde_is_one_estimate_a_step_and_fresh_noise_between() -> None:
    noise, drawn = fresh(16), {1: fresh(16), 2: fresh(16)}
    sigmas = [1.0, 0.75, 0.3, 0.0]
    x = noise
    for k, sigma in enumerate(sigmas[:-1]):
        x0 = x - sigma * crooked_velocity(x, sigma)
        following = sigmas[k + 1]
        x = x0 if k == 2 else x0 + following * (drawn[k + 1] - x0)
    ours = flow.solve("sde", crooked_velocity, noise, sigmas, drawn.__getitem__)
    torch.testing.assert_close(ours, x)


def test_sde_without_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match="draws noise"):
        flow.solve("sde", crooked_velocity, fresh(2), [1.0, 0.0])


def test_grid_is_shifted_and_ends_at_zero() -> None:
    assert flow.shifted_sigmas(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = flow.shifted_sigmas(4, 3.0)
    assert shifted == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert all(a > b for a, b in itertools.pairwise(shifted))


@pytest.mark.parametrize("steps, shift", [(0, 1.0), (4, 0.0), (4, -1.0)])
def test_impossible_grids_are_refused(steps: int, shift: float) -> None:
    with pytest.raises(ConfigError):
        flow.shifted_sigmas(steps, shift)


def test_guidance_extrapolates_from_the_unconditional() -> None:
    cond, uncond = fresh(5), -2 * fresh(5)
    torch.testing.assert_close(flow.guide(cond, uncond, 3.0), 3 * cond - 2 * uncond)
    torch.testing.assert_close(flow.guide(cond, uncond, 0.0), uncond)


def test_no_unconditional_pass_at_scale_one() -> None:
    def never(x: Tensor, sigma: float) -> Tensor:
        raise AssertionError("the unconditional pass was made")

    velocity = flow.guided(crooked_velocity, never, 1.0)
    x = fresh(3)
    torch.testing.assert_close(velocity(x, 0.5), crooked_velocity(x, 0.5))


def test_experts_share_the_path_at_their_boundary() -> None:
    seen: list[tuple[str, float]] = []

    def expert(name: str):
        def predict(x: Tensor, sigma: float) -> Tensor:
            seen.append((name, sigma))
            return torch.zeros_like(x)

        return predict

    predict = flow.by_timestep(
        [flow.Expert(expert("high"), 875, 1000), flow.Expert(expert("low"), 0, 875)]
    )
    flow.euler(predict, fresh(2), [1.0, 0.9, 0.875, 0.5, 0.0])
    assert seen == [("high", 1.0), ("high", 0.9), ("low", 0.875), ("low", 0.5)]


def test_a_missing_expert_is_named() -> None:
    predict = flow.by_timestep([flow.Expert(crooked_velocity, 900, 1000)])
    with pytest.raises(ConfigError, match=r"timestep 500.*\(900, 1000\]"):
        predict(fresh(2), 0.5)


def test_unknown_sampler_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="unipc"):
        flow.solve("unpic", crooked_velocity, fresh(2), [1.0, 0.0])
