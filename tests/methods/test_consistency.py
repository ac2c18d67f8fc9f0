"""Consistency distillation against its formulas in double precision, and under every layout."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.options import parse_options
from megagen.methods.consistency import ConsistencyMethod, stepped
from megagen.methods.consistency_causal import ConsistencyCausalMethod
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests.engine import cases
from tests.methods import consistency_cases as consistency
from tests.methods import dmd2_cases as dmd2
from tests.methods.test_dmd2 import CP2, LAYOUTS, SINGLE, TP2_PP2, average, check, weights
from tests.models.wan_causal_cases import Rule, make_plugin

NUM_STEPS = 5
FIRST_ALONE = Rule(2, first_alone=True)
GUIDED = {"grid_steps": 6, "skip_steps": 1, "teacher_guidance_scale": 3.0}
VARIANTS: dict[str, tuple[Rule | None, dict[str, Any]]] = {
    "guided": (None, GUIDED),
    "of_itself_pseudo_huber": (
        None,
        {
            **GUIDED,
            "teacher_guidance_scale": 1.0,
            "target_weights": "student",
            "distance": "pseudo_huber",
            "huber_c": 0.3,
            "loss_weighting": "inverse_step",
            "student_step_per": "micro_batch",
        },
    ),
    "heun_skipping": (
        None,
        {"grid_steps": 4, "skip_steps": 3, "solver": "heun", "grid_flow_shift": 1.5},
    ),
    "causal": (Rule(2), GUIDED),
    "causal_pseudo_huber": (
        FIRST_ALONE,
        {
            "grid_steps": 5,
            "skip_steps": 2,
            "solver": "heun",
            "teacher_guidance_scale": 2.0,
            "distance": "pseudo_huber",
            "huber_c": 0.2,
            "loss_weighting": "inverse_step",
            "context_noise": 60.0,
        },
    ),
    "causal_of_itself_one_step": (
        Rule(3),
        {
            **GUIDED,
            "target_weights": "student",
            "same_step_across_blocks": True,
            "student_step_per": "step",
        },
    ),
}


@functools.cache
def reference(variant: str) -> dmd2.Curve:
    rule, options = VARIANTS[variant]
    return dmd2.Curve(consistency.Reference(weights(), options, rule))


def expected(variant: str, num_steps: int) -> list[dict[str, Any]]:
    return reference(variant).first(num_steps)


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
    method = consistency.make_method(given, data, layouts, options, rule, **settings)
    mesh, found = Mesh.build(data), []
    for step in range(num_steps):
        own = dmd2.own_batches(step, mesh, **consistency.kind(rule))
        result = method.train_step(own, step)
        assert not result.skipped
        metrics: dict[str, Any] = {k: average(v) for k, v in result.metrics.items()}
        metrics["student"] = dmd2.gradients_of(method.student)
        found.append(metrics)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_from_the_formulas(variant: str) -> None:
    found = run_ranks(1, run, weights(), SINGLE, [SINGLE] * 2, variant, 2, {})
    check(found, expected(variant, 2))


# ranks, data layout, student, teacher
OWN_LAYOUTS = {
    **LAYOUTS,
    "vpp2": (2, *[ParallelDims(pp_size=2, virtual_pp_size=2)] * 3),
    "tp2_pp2_and_cp2": (4, TP2_PP2, TP2_PP2, CP2),
}


@pytest.mark.parametrize("layout", OWN_LAYOUTS)
@pytest.mark.parametrize("variant", ["guided", "causal_pseudo_huber"])
def test_five_steps_under_every_layout(variant: str, layout: str) -> None:
    num_ranks, data, *layouts = OWN_LAYOUTS[layout]
    found = run_ranks(num_ranks, run, weights(), data, layouts[:2], variant, NUM_STEPS, {})
    check(found, expected(variant, NUM_STEPS))


def curve(
    given: list[cases.Weights], data: ParallelDims, variant: str, settings: dict[str, Any]
) -> list[float]:
    """In a rank: losses and gradient norms over all data ranks."""
    rule, options = VARIANTS[variant]
    method = consistency.make_method(given, data, [data] * 2, options, rule, **settings)
    mesh, found = Mesh.build(data), []
    for step in range(NUM_STEPS):
        own = dmd2.own_batches(step, mesh, **consistency.kind(rule))
        metrics = method.train_step(own, step).metrics
        found += [average(metrics[name]) for name in ("loss/total", "grad_norm/student")]
    return found


def test_averages_that_are_sharded_and_weights_that_are_gathered_late() -> None:
    """The target's pass must see the average, and the next one the weights."""
    optimizer = replace(dmd2.ADAMW, use_distributed_optimizer=True)
    settings = {"overlap_grad_reduce": True, "overlap_param_gather": True, "optimizer": optimizer}
    wanted = expected("guided", NUM_STEPS)
    steps = [step[name] for step in wanted for name in ("loss/total", "grad_norm/student")]
    for found in run_ranks(2, curve, weights(), SINGLE, "guided", settings):
        cases.close(found, steps)


# -- parts of a step -------------------------------------------------------------------------------
def parts(given: list[cases.Weights], variant: str, changes: dict[str, Any]) -> list[Any]:
    """In a rank, after a step: (request, request below it, target) of each micro-batch of another;
    the weights before and after."""
    rule, options = VARIANTS[variant]
    method = consistency.make_method(given, SINGLE, [SINGLE] * 2, {**options, **changes}, rule)
    kind = consistency.kind(rule)
    method.train_step(dmd2.batches(0, **kind), 0)
    before = cases.whole(method.student, lambda p: p)
    noisy = [method.draw(batch, 1) for batch in dmd2.batches(1, **kind)]
    below = method.solve(noisy)
    targets = method.targets(below)
    return [list(zip(noisy, below, targets, strict=True)), before, method.student]


def one_step_to_the_data(given: list[cases.Weights], variant: str) -> list[tuple[Tensor, Tensor]]:
    found, before, student = parts(
        given, variant, {"skip_steps": VARIANTS[variant][1]["grid_steps"]}
    )
    after = cases.whole(student, lambda p: p)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all((r.timestep == 1000).all() and not b.timestep.any() for r, b, _ in found)
    return [(below.latents_BCTHW, target) for _, below, target in found]


@pytest.mark.parametrize("variant", ["guided", "causal_pseudo_huber"])
def test_at_the_data_a_path_ends_where_the_teacher_says(variant: str) -> None:
    """f(x, 0) is x to the bit; and the average gives the weights back."""
    (found,) = run_ranks(1, one_step_to_the_data, weights(), variant)
    assert found and all(torch.equal(below, target) for below, target in found)


def levels(given: list[cases.Weights], variant: str) -> list[tuple[Tensor, Tensor]]:
    found, _, _ = parts(given, variant, {"student_step_per": "sample"})
    return [(noisy.timestep, below.timestep) for noisy, below, _ in found]


def test_each_block_has_a_level_of_its_own() -> None:
    rule, _ = VARIANTS["causal"]
    assert rule is not None
    (found,) = run_ranks(1, levels, weights(), "causal")
    t_BT = torch.cat([t for t, _ in found])
    assert torch.equal(t_BT[:, 0], t_BT[:, 1]) and torch.equal(t_BT[:, 2], t_BT[:, 3])
    assert t_BT[:, [0, 2, 4]].unique(dim=1).shape[1] > 1
    (found,) = run_ranks(1, levels, weights(), "causal_of_itself_one_step")
    assert all((t == t[:, :1]).all() for t, _ in found)


def test_a_step_goes_along_the_velocity() -> None:
    """Between its own levels, frame by frame."""
    x, v = torch.randn(2, 2, 3, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    below = torch.tensor([[0.0, 100.0, 250.0, 0.0]]).expand(2, -1)
    t_BT = torch.tensor([[1000.0, 400.0, 500.0, 50.0]]).expand(2, -1)
    found = stepped(Request(x, t_BT, {}, {"timestep_below": below}), v)
    change = torch.tensor([-1, -0.3, -0.25, -0.05])[:, None, None]
    assert torch.equal(found.timestep, below)
    torch.testing.assert_close(found.latents_BCTHW, x + change * v)


# -- plans and options -----------------------------------------------------------------------------
def count_passes(given: list[cases.Weights], variant: str) -> dict[str, list[float]]:
    """In a rank: passes of each sample in a step, without and with gradient."""
    rule, options = VARIANTS[variant]
    method = consistency.make_method(given, SINGLE, [SINGLE] * 2, options, rule)
    batches = dmd2.batches(0, **consistency.kind(rule))
    counts = {name: [0.0, 0.0] for name in method.roles}

    def counted(name: str, place: int, verb: Any) -> Any:
        def call(requests: Any, *args: Any) -> Any:
            frames = [1 + ("clean_latents_BCTHW" in r.condition) for r in requests]
            counts[name][place] += sum(frames) / len(batches)
            return verb(requests, *args)

        return call

    for name, role in method.roles.items():
        for place, verb in enumerate(("predict", "forward_backward")):
            setattr(role, verb, counted(name, place, getattr(role, verb)))
    method.train_step(batches, 0)
    return counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_are_what_the_plan_says(variant: str) -> None:
    """Among others: at guidance 1 there is no unconditional pass."""
    rule, options = VARIANTS[variant]
    cls = ConsistencyCausalMethod if rule else ConsistencyMethod
    planned = cls.passes(parse_options(cls.Options, options, ""))
    (found,) = run_ranks(1, count_passes, weights(), variant)
    assert found == {name: list(passes[:2]) for name, passes in planned.items()}


def test_options_are_checked() -> None:
    plain, causal = cases.make_plugin(), make_plugin(Rule(2))

    def refused(match: str, student: Any, teacher: Any, **options: Any) -> None:
        cls = ConsistencyCausalMethod if student.is_causal else ConsistencyMethod
        with pytest.raises(ConfigError, match=match):
            parsed = parse_options(cls.Options, options, "method")
            cls.check(parsed, {"student": student, "teacher": teacher})

    refused("skip_steps: is 5; the grid has 4 steps", plain, plain, grid_steps=4, skip_steps=5)
    refused("grid_steps", plain, plain, grid_steps=0)
    refused("huber_c", plain, plain, huber_c=0)
    refused("did you mean 'skip_steps'", plain, plain, skip_step=2)
    wide = cases.make_plugin()
    wide.in_channels = 4
    refused("different channels", plain, wide)
    refused("chunk_size.*blocks of 2 frames", causal, causal, chunk_size=3)
    refused("context_noise", causal, causal, context_noise=1001)
    refused("sees all frames at once", causal, plain)
    refused(r"makes blocks of \[1, 2\].*the student of \[2, 2\]", causal, make_plugin(FIRST_ALONE))
    high = cases.make_plugin(expert="high", boundary_ratio=0.875)
    refused("models.teacher.expert.*would not reach their ends", plain, high)
    parsed = parse_options(ConsistencyCausalMethod.Options, {}, "")
    with pytest.raises(ConfigError, match="wan_causal"):
        ConsistencyCausalMethod.check(parsed, {"student": plain, "teacher": causal})


def test_an_expert_of_low_noise_has_the_grid_below_its_boundary() -> None:
    low = cases.make_plugin(expert="low", boundary_ratio=0.5)
    plugins = {"student": low, "teacher": cases.make_plugin()}
    options = parse_options(ConsistencyMethod.Options, {"grid_steps": 10, "grid_flow_shift": 1}, "")
    assert options.sigmas(plugins) == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    with pytest.raises(ConfigError, match="5 steps below timestep 500"):
        ConsistencyMethod.check(options.model_copy(update={"skip_steps": 6}), plugins)


def without_average(given: list[cases.Weights]) -> None:
    with pytest.raises(ConfigError, match=r"no moving average.*callbacks\.ema"):
        consistency.make_method(given, SINGLE, [SINGLE] * 2, GUIDED, None, ema=None)


def test_a_target_of_no_average_is_refused() -> None:
    run_ranks(1, without_average, weights())


def unconditional(given: list[cases.Weights]) -> None:
    options = {**GUIDED, "cfg_uncond": {"image": "drop"}}
    method = consistency.make_method(given, SINGLE, [SINGLE] * 2, options, Rule(2))
    (batch, *_) = dmd2.batches(0, **consistency.kind(Rule(2)))
    request = method.draw(batch, 0)
    found = method.without_prompt(request).condition
    assert found["clean_latents_BCTHW"] is request.condition["clean_latents_BCTHW"]
    assert not torch.equal(found["text_embeds_BLD"], request.condition["text_embeds_BLD"])


def test_an_unconditional_pass_keeps_the_clean_frames() -> None:
    run_ranks(1, unconditional, weights())
