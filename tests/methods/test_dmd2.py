"""DMD2 against its formulas in double precision, and under every layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.methods import scores
from megagen.methods.dmd2 import DMD2Method
from megagen.methods.scores import score_range
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests import seeds
from tests.engine import cases
from tests.methods import dmd2_cases as dmd2

NUM_STEPS = 5
SINGLE, TP2, CP2 = ParallelDims(), ParallelDims(tp_size=2), ParallelDims(cp_size=2)
PP2, TP2_PP2 = ParallelDims(pp_size=2), ParallelDims(tp_size=2, pp_size=2)
TP2_SP = ParallelDims(tp_size=2, sequence_parallel=True)
# ranks, data layout, student, teacher, critic
LAYOUTS = {
    "tp2": (2, *[TP2] * 4),
    "cp2": (2, *[CP2] * 4),
    "pp2": (2, *[PP2] * 4),
    "dp2": (2, *[SINGLE] * 4),
    "tp2_pp2": (4, *[TP2_PP2] * 4),
    "three_layouts": (4, TP2_SP, PP2, TP2_SP, CP2),
}
DATA = {
    "rollout_mode": "data_latent",
    "dmd_denoising_steps": [1000, 750, 500, 250],
    "warp_denoising_step": True,
    "generator_update_interval": 2,
    "real_score_guidance_scale": 3.5,
}
SIMULATE = {
    "rollout_mode": "simulate",
    "dmd_denoising_steps": [1000, 900, 700, 300],
    "generator_update_interval": 2,
    "real_score_guidance_scale": 4.5,
    "min_timestep_ratio": 0.02,
    "max_timestep_ratio": 0.98,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "data": DATA,
    "data_fastvideo": {
        **DATA,
        "share_rollout": False,
        "vsd_normalizer": "micro_batch",
        "score_timestep_per": "micro_batch",
        "student_step_per": "micro_batch",
    },
    "simulate_sde": SIMULATE,
    "simulate_ode_per_sample": {
        **SIMULATE,
        "student_sample_type": "ode",
        "student_step_per": "sample",
        "fake_score_guidance_scale": 1.5,
    },
    "x0_space_last_frames": {**DATA, "fake_score_pred_type": "x0", "gradient_frames": 2},
    "v_space_alternating": {
        **SIMULATE,
        "fake_score_pred_type": "v",
        "critic_on_student_steps": False,
        "real_score_guidance_scale": 1.0,
    },
    "gan_on_the_teacher": {
        **DATA,
        "gan_loss_weight_gen": 0.7,
        "gan_r1_reg_weight": 3.0,
        "gan_r1_reg_alpha": 0.3,
        "discriminator": {"feature_indices": [1, 3], "head": "branches", "width": 8},
    },
    "gan_on_the_critic": {
        **SIMULATE,
        "gan_loss_weight_gen": 0.4,
        "gan_r1_reg_weight": 2.0,
        # wide: R1 is a difference of two outputs, of which too close ones leave mostly rounding
        "gan_r1_reg_alpha": 3.0,
        "gan_r1_at": "noised",
        "gan_use_same_t_noise": True,
        "discriminator": {
            "feature_source": "critic",
            "feature_indices": [2, 0],
            "head": "attention",
            "width": 8,
        },
    },
}
TRAINED = ("student", "critic", "discriminator")
TERMS = ("generator", "gan_gen", "fake_score", "gan_disc", "r1", "total")
METRICS = (*(f"loss/{t}" for t in TERMS), *(f"grad_norm/{r}" for r in TRAINED))


@functools.cache
def weights() -> list[cases.Weights]:
    return [cases.random_weights(seeds.SHARED + i) for i in range(3)]


@functools.cache
def reference(variant: str) -> dmd2.Curve:
    return dmd2.Curve(dmd2.Reference(weights(), VARIANTS[variant]))


def expected(variant: str, num_steps: int) -> list[dict[str, Any]]:
    return reference(variant).first(num_steps)


def run(
    given: list[cases.Weights],
    data: ParallelDims,
    layouts: list[ParallelDims],
    options: dict[str, Any],
    schedule: str,
    num_steps: int,
) -> list[dict[str, Any]]:
    """In a rank: metrics over all data ranks and, of the steps, the gradients."""
    method = dmd2.make_method(given, data, layouts, options, schedule)
    mesh, found = Mesh.build(data), []
    for step in range(num_steps):
        is_gan = "gan_loss_weight_gen" in options
        kind = {"text_only": options["rollout_mode"] == "simulate" and not is_gan}
        result = method.train_step(dmd2.own_batches(step, mesh, **kind), step)
        assert not result.skipped
        metrics: dict[str, Any] = {k: average(v) for k, v in result.metrics.items()}
        for name in ("student", "critic"):
            if f"grad_norm/{name}" in metrics:
                metrics[name] = dmd2.gradients_of(method.roles[name])
        for name, head in method.heads.items():
            named = head.module.named_parameters()
            metrics[name] = {n: p.grad.clone() for n, p in named if p.grad is not None}
        found.append(metrics)
    return found


def average(value: float) -> float:
    """Over data ranks, as the trainer does it."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def check(ranks: list[list[dict[str, Any]]], wanted_steps: list[dict[str, Any]]) -> None:
    for step, wanted in enumerate(wanted_steps):
        for found in (rank[step] for rank in ranks):
            assert {m for m in METRICS if m in found} == {m for m in METRICS if m in wanted}
            cases.close([found[m] for m in METRICS if m in found], curve(wanted))
    for name in [n for n in TRAINED if any(n in wanted for wanted in wanted_steps)]:
        first = next(i for i, wanted in enumerate(wanted_steps) if name in wanted)
        gradients = cases.merge([rank[first][name] for rank in ranks])
        assert worst_of_norm(gradients, wanted_steps[first][name]) < 1e-5


def curve(metrics: dict[str, Any]) -> list[float]:
    return [metrics[m] for m in METRICS if m in metrics]


def worst_of_norm(found: cases.Weights, wanted: cases.Weights) -> float:
    """The largest error of any tensor's gradient, relative to that of the whole network."""
    assert found.keys() == wanted.keys()
    norm = sum(float(g.double().square().sum()) for g in wanted.values()) ** 0.5
    error: Tensor = torch.stack([(found[n].double() - wanted[n]).norm() for n in wanted])
    return float(error.max()) / norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["gan_on_the_teacher", "gan_on_the_critic"])
def test_a_discriminator_under_layouts(variant: str, layout: str) -> None:
    num_ranks, data, *layouts = LAYOUTS[layout]
    schedule = "hold" if variant == "gan_on_the_critic" else "replay"
    given = (weights(), data, layouts, VARIANTS[variant], schedule, NUM_STEPS)
    check(run_ranks(num_ranks, run, *given), expected(variant, NUM_STEPS))


COUNTED = {"data": {}, "simulate_ode_per_sample": {}, "data_fastvideo": {}}
COUNTED |= {"v_space_alternating": {"student_step_per": "sample"}}


@pytest.mark.parametrize("variant", COUNTED)
def test_passes_are_what_the_plan_says(variant: str) -> None:
    options = VARIANTS[variant] | COUNTED[variant]
    (found,) = run_ranks(1, count_passes, weights(), options)
    planned = DMD2Method.passes(parse_options(DMD2Method.Options, options, ""))
    assert found == {name: tuple(passes[:2]) for name, passes in planned.items()}


def count_passes(given: list[cases.Weights], options: dict[str, Any]) -> dict[str, Any]:
    """Passes of each sample, averaged over two steps; held, so that no forward is repeated."""
    method = dmd2.make_method(given, SINGLE, [SINGLE] * 3, options, "hold")
    counts = {name: [0.0, 0.0] for name in dmd2.ROLES}

    def counted(name: str, kind: int, verb: Any) -> Any:
        def call(requests: Any, *args: Any, **kwargs: Any) -> Any:
            counts[name][kind] += len(requests) / dmd2.NUM_BATCHES / 2
            return verb(requests, *args, **kwargs)

        return call

    for name, role in method.roles.items():
        role.predict = counted(name, 0, role.predict)  # type: ignore[method-assign]
        for verb in ("forward_backward", "forward_score_backward"):
            setattr(role, verb, counted(name, 1, getattr(role, verb)))
    for step in range(2):
        method.train_step(dmd2.batches(step), step)
    return {name: tuple(count) for name, count in counts.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_from_the_formulas(variant: str) -> None:
    found = run_ranks(1, run, weights(), SINGLE, [SINGLE] * 3, VARIANTS[variant], "replay", 2)
    check(found, expected(variant, 2))


@pytest.mark.parametrize("variant", ["data", "simulate_sde"])
@pytest.mark.parametrize("schedule", ["replay", "hold"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_under_every_layout(layout: str, schedule: str, variant: str) -> None:
    num_ranks, data, *layouts = LAYOUTS[layout]
    given = (weights(), data, layouts, VARIANTS[variant], schedule, NUM_STEPS)
    check(run_ranks(num_ranks, run, *given), expected(variant, NUM_STEPS))


@pytest.mark.parametrize(("expert", "low", "high"), [("high", 875, 1000), ("low", 0, 875)])
def test_experts_keep_to_their_side_of_the_boundary(expert: str, low: int, high: int) -> None:
    plugins = {name: cases.make_plugin(expert=expert, boundary_ratio=0.875) for name in dmd2.ROLES}
    steps = [1000, 950, 900] if expert == "high" else [800, 400]
    options = parse_options(DMD2Method.Options, {**DATA, "dmd_denoising_steps": steps}, "")
    options = options.model_copy(update={"warp_denoising_step": False})
    DMD2Method.check(options, plugins)
    drawn = scores.score_timestep(
        Streams(1), "t", 0, range(3000), options, shift=1.0, served=score_range(options, plugins)
    )
    assert low < drawn.min() < low + 2 and high - 2 < drawn.max() <= high
    uniform = stats.uniform(low, high - low).cdf
    assert stats.kstest(drawn.numpy(), uniform).pvalue > 1e-3  # nothing piles up at the boundary
    with pytest.raises(ConfigError, match="outside"):
        DMD2Method.check(options.model_copy(update={"dmd_denoising_steps": [900, 800]}), plugins)
    plugins["teacher"] = cases.make_plugin(
        expert="low" if expert == "high" else "high", boundary_ratio=0.875
    )
    with pytest.raises(ConfigError, match="served by every network"):
        DMD2Method.check(options, plugins)


def test_the_low_noise_expert_cannot_start_from_noise() -> None:
    plugins = {name: cases.make_plugin(expert="low", boundary_ratio=0.875) for name in dmd2.ROLES}
    options = {**SIMULATE, "dmd_denoising_steps": [800, 400]}
    with pytest.raises(ConfigError, match="data_latent"):
        DMD2Method.check(parse_options(DMD2Method.Options, options, ""), plugins)


def test_bounds_of_the_score_timesteps() -> None:
    def drawn(**changes: Any) -> Tensor:
        given = {**DATA, "min_timestep_ratio": 0.02, "max_timestep_ratio": 0.9, **changes}
        options = parse_options(DMD2Method.Options, given, "")
        return scores.score_timestep(
            Streams(3), "t", 4, range(4000), options, shift=5.0, served=(0.0, 1000.0)
        )

    clamped, rescaled = drawn(), drawn(timestep_bounds="rescale")
    beyond = 1 - 0.9 / (5 - 4 * 0.9)  # share of u whose shifted time is above the bound
    assert float((clamped == 900).double().mean()) == pytest.approx(beyond, abs=0.03)
    assert rescaled.min() >= 20 and rescaled.max() < 900
    unshifted = drawn(timestep_bounds="rescale", score_flow_shift=1.0)
    assert stats.kstest(unshifted.numpy(), stats.uniform(20, 880).cdf).pvalue > 1e-3
    whole_step = drawn(score_timestep_per="step")
    assert (whole_step == whole_step[0]).all()


def test_options_are_checked() -> None:
    plugins = {name: cases.make_plugin() for name in dmd2.ROLES}

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            DMD2Method.check(parse_options(DMD2Method.Options, {**DATA, **changes}, ""), plugins)

    refused("one of t_list", dmd_denoising_steps=None)
    refused("ends with 0", dmd_denoising_steps=None, t_list=[1000, 500])
    refused("go down", dmd_denoising_steps=[500, 750])
    refused("4 steps", student_sample_steps=3)
    refused("no score timestep", min_timestep_ratio=0.5, max_timestep_ratio=0.5)
    refused("did you mean 'real_score_guidance_scale'", real_score_guidence_scale=3)
