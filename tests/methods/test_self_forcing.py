"""Self-forcing against whole-video passes in double precision, and under every layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.options import parse_options
from megagen.methods.self_forcing import SelfForcingMethod
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests.engine import cases
from tests.engine.test_kv_cache import PeakBytes
from tests.methods import causal_cases
from tests.methods import dmd2_cases as dmd2
from tests.methods.test_dmd2 import LAYOUTS, SINGLE, average, check, weights
from tests.models.wan_causal_cases import Rule, make_plugin

BASE = {
    "dmd_denoising_steps": [1000, 700, 300],
    "generator_update_interval": 2,
    "real_score_guidance_scale": 3.0,
}
SINK = Rule(2, window=4, sink=1)
VARIANTS: dict[str, tuple[Rule, dict[str, Any]]] = {
    "exit_per_block": (SINK, BASE),
    "one_exit_ode": (
        Rule(2),
        {
            **BASE,
            "warp_denoising_step": True,
            "same_step_across_blocks": True,
            "student_sample_type": "ode",
            "context_noise": 40.0,
            "start_gradient_frame": 1,
            "micro_batches_at_once": 1,
            "share_rollout": False,
        },
    ),
    "longer_than_scored": (
        Rule(2, window=3),
        {
            **BASE,
            "dmd_denoising_steps": [1000, 400],
            "last_step_only": True,
            "num_training_frames": 10,
            "gradient_frames": 4,
            "vsd_normalizer": "micro_batch",
        },
    ),
    "first_frame_given": (
        Rule(3, first_alone=True),
        {**BASE, "given_frames": 1, "context_noise": 20.0, "student_step_per": "sample"},
    ),
}


@functools.cache
def reference_curve(variant: str) -> dmd2.Curve:
    rule, options = VARIANTS[variant]
    return dmd2.Curve(causal_cases.Reference(weights(), options, rule))


def expected(variant: str, num_steps: int) -> list[dict[str, Any]]:
    return reference_curve(variant).first(num_steps)


def own_batches(step: int, mesh: Mesh, options: dict[str, Any]) -> list[Any]:
    return dmd2.own_batches(
        step, mesh, text_only="given_frames" not in options, **causal_cases.KIND
    )


def run(
    given: list[cases.Weights],
    data: ParallelDims,
    layouts: list[ParallelDims],
    variant: str,
    num_steps: int,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """In a rank: metrics over all data ranks and, of the steps, the gradients."""
    rule, options = VARIANTS[variant]
    method = causal_cases.make_method(given, data, layouts, options, rule, **settings)
    mesh, found = Mesh.build(data), []
    for step in range(num_steps):
        result = method.train_step(own_batches(step, mesh, options), step)
        assert not result.skipped
        metrics: dict[str, Any] = {k: average(v) for k, v in result.metrics.items()}
        for name in ("student", "critic"):
            if f"grad_norm/{name}" in metrics:
                metrics[name] = dmd2.gradients_of(method.roles[name])
        found.append(metrics)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_from_the_formulas(variant: str) -> None:
    found = run_ranks(1, run, weights(), SINGLE, [SINGLE] * 3, variant, 2, {})
    check(found, expected(variant, 2))


INTERLEAVED = ParallelDims(pp_size=2, virtual_pp_size=2)
OWN_LAYOUTS = {**LAYOUTS, "vpp2": (2, *[INTERLEAVED] * 4)}


@pytest.mark.parametrize(
    ("layout", "schedule"), [*((name, "replay") for name in OWN_LAYOUTS), ("pp2", "hold")]
)
def test_five_steps_under_every_layout(layout: str, schedule: str) -> None:
    num_ranks, data, *layouts = OWN_LAYOUTS[layout]
    settings = {"schedule": schedule}
    found = run_ranks(num_ranks, run, weights(), data, layouts, "exit_per_block", 5, settings)
    check(found, expected("exit_per_block", 5))


def test_recompute_changes_no_bit() -> None:
    given = (weights(), SINGLE, [SINGLE] * 3, "exit_per_block", 2)
    (plain,) = run_ranks(1, run, *given, {})
    for recompute in ("full", "selective"):
        (found,) = run_ranks(1, run, *given, {"recompute": recompute})
        for ours, theirs in zip(found, plain, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if isinstance(value, dict):
                    assert all(torch.equal(ours[name][key], value[key]) for key in value)
                else:
                    assert ours[name] == value, name


# -- the rollout -----------------------------------------------------------------------------------
def rollout(given: list[cases.Weights], variant: str) -> list[Any]:
    """In a rank: the rollouts of step 0."""
    rule, options = VARIANTS[variant]
    method = causal_cases.make_method(given, SINGLE, [SINGLE] * 3, options, rule)
    batches = own_batches(0, method.student.mesh, options)
    draws = [method.draw_rollout(batch, 0, "student/rollout") for batch in batches]
    return [
        (video.x0_BCTHW, torch.cat([r.latents_BCTHW for r in video.inputs], dim=2))
        for video in method.roll(draws)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_rollout_equals_passes_over_the_whole_video(variant: str) -> None:
    (found,) = run_ranks(1, rollout, weights(), variant)
    rule, options = VARIANTS[variant]
    reference = causal_cases.Reference(weights(), options, rule)
    given = options.get("given_frames", 0)
    for (x0, inputs), batch in zip(found, reference.batches(0), strict=True):
        with torch.no_grad(), dmd2.true_double():
            context, video, noisy, t_BT = reference.roll("student/rollout", 0, batch)
            at_once = reference.whole(context, noisy, t_BT, batch)
        assert cases.relative(inputs, noisy[:, :, given:]) <= 1e-5
        assert cases.relative(x0, video[:, :, -x0.size(2) :]) <= 1e-5
        assert cases.relative(video[:, :, given:], at_once[:, :, given:]) <= 1e-12


def noise_gradients(
    given: list[cases.Weights], layouts: list[ParallelDims]
) -> list[list[Tensor | None]]:
    """In a rank: what a loss on the last block alone gives the noise of each block."""
    rule, options = VARIANTS["exit_per_block"]
    options = {**options, "gradient_frames": 1, "same_step_across_blocks": True}
    method = causal_cases.make_method(given, layouts[0], layouts, options, rule, recompute="full")
    step = next(s for s in range(99) if method.shared_exit([-1], s, "student/rollout") == 0)
    batches = own_batches(step, method.student.mesh, options)
    draws = [method.draw(batch, step, "student", True) for batch in batches]
    for draw in draws:
        for part in draw.rollout.rollouts:
            part.noises[0].requires_grad_()
    method.student_pass(draws)
    return [[part.noises[0].grad for part in draw.rollout.rollouts] for draw in draws]


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_no_gradient_reaches_earlier_blocks(layout: str) -> None:
    dims = SINGLE if layout == "one" else ParallelDims(pp_size=2)
    found = run_ranks(dims.pp_size, noise_gradients, weights(), [dims] * 3)
    for *earlier, last in found[0]:
        assert earlier and all(g is None or not g.any() for g in earlier)
        assert last is not None and last.any()


def peak(given: list[cases.Weights], num_steps: int) -> int:
    """In a rank: the most bytes held at once in a rollout of so many steps a block."""
    steps = torch.linspace(1000, 100, num_steps).tolist()
    options = {**BASE, "dmd_denoising_steps": steps, "last_step_only": True}
    method = causal_cases.make_method(given, SINGLE, [SINGLE] * 3, options, SINK)
    batches = own_batches(0, method.student.mesh, options)
    draws = [method.draw_rollout(batch, 0, "student/rollout") for batch in batches]
    with PeakBytes() as held:
        method.roll(draws)
    return held.peak


def test_the_peak_of_a_rollout_does_not_grow_with_its_steps() -> None:
    found = [run_ranks(1, peak, weights(), num_steps)[0] for num_steps in (3, 8)]
    assert found[0] == found[1] > 0


# -- plans and options -----------------------------------------------------------------------------
def count_passes(given: list[cases.Weights], options: dict[str, Any]) -> tuple[float, float]:
    """In a rank: the student's passes of each frame, averaged over two steps."""
    method = causal_cases.make_method(given, SINGLE, [SINGLE] * 3, options, Rule(1))
    student, counts = method.student, {"predict": 0, "extend_cache": 0, "forward_backward": 0}

    def counted(name: str, verb: Any) -> Any:
        def call(requests: Any, *args: Any, **kwargs: Any) -> Any:
            counts[name] += len(requests)
            return verb(requests, *args, **kwargs)

        return call

    for name in counts:
        setattr(student, name, counted(name, getattr(student, name)))
    for step in range(2):
        method.train_step(own_batches(step, student.mesh, options), step)
    unit = 2 * causal_cases.NUM_BATCHES * causal_cases.SHAPE[1]
    # a rollout leaves its last block out of the cache; a trained block's pass repeats its exit's
    forward = counts["predict"] - counts["forward_backward"]
    missing = 2 * causal_cases.NUM_BATCHES
    return (forward + counts["extend_cache"] + missing) / unit, counts["forward_backward"] / unit


def test_passes_are_what_the_plan_says() -> None:
    options = {**BASE, "last_step_only": True}
    (found,) = run_ranks(1, count_passes, weights(), options)
    parsed = parse_options(SelfForcingMethod.Options, options, "")
    assert found == SelfForcingMethod.passes(parsed)["student"][:2]


def test_options_are_checked() -> None:
    plain = cases.make_plugin()
    plugins = {"student": make_plugin(Rule(2)), "teacher": plain, "critic": plain}

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            parsed = parse_options(SelfForcingMethod.Options, {**BASE, **changes}, "method")
            SelfForcingMethod.check(parsed, plugins)

    refused("blocks of 2 frames", chunk_size=3)
    refused("would not learn", enable_gradient_in_rollout=False)
    refused("rollout_mode", rollout_mode="data_latent")
    refused("kv_grad", kv_grad="reference_leak")
    refused("go down", dmd_denoising_steps=[500, 750])
    plugins["student"] = plain
    refused("wan_causal")


def refusals(given: list[cases.Weights]) -> None:
    for changes, match in (
        ({"num_training_frames": 4}, "num_training_frames is 4"),
        ({"given_frames": 5}, "given_frames 5"),
        ({"start_gradient_frame": 5, "generator_update_interval": 1}, "no block of 5 frames"),
    ):
        method = causal_cases.make_method(given, SINGLE, [SINGLE] * 3, {**BASE, **changes}, SINK)
        with pytest.raises(ConfigError, match=match):
            method.train_step(dmd2.batches(0, **causal_cases.KIND), 0)


def test_what_samples_cannot_give_is_refused() -> None:
    run_ranks(1, refusals, weights())
