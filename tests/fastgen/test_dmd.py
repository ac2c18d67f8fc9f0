"""Losses and gradients of DMD2 beside the published package, on the same networks and draws."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megagen import fastgen
from tests.fastgen.networks import Case, assert_same, capture, gradients, run

published = pytest.importorskip("modelopt.torch.fastgen")

PHASES = ("student", "fake_score", "discriminator")
SEVERAL = {"student_sample_steps": 3, "sample_t_cfg": {"t_list": [0.95, 0.7, 0.3, 0.0]}}
DTYPES = (torch.float32, torch.float64)


def arguments(case: Case, phase: str) -> dict[str, Any]:
    given = dict(case.data)
    if phase != "student":
        given.pop("negative_encoder_hidden_states")
    return {**given, "gain": 0.7}


def compare(
    config: dict[str, Any], dtype: torch.dtype, *, repeats: int = 1, **options: Any
) -> None:
    case = Case(config, dtype=dtype, **options)
    ours, theirs = case.pipeline(fastgen), case.pipeline(published)
    for phase, repeat in itertools.product(PHASES, range(repeats)):
        if phase == "discriminator" and ours.discriminator is None:
            continue
        seed = int(torch.randint(0, 2**31, (1,)))
        given = arguments(case, phase)
        found, next_numbers = [], []
        for pipeline in (ours, theirs):
            found.append(run(pipeline, phase, seed, **given))
            next_numbers.append(torch.rand(3))
        assert_same(*found, 1e-6)
        assert torch.equal(*next_numbers), f"{phase} {repeat}: another number of draws"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fake_score_pred_type", ["x0", "flow", "eps", "v", None])
@pytest.mark.parametrize("pred_type", ["flow", "x0", "eps", "v"])
def test_prediction_spaces(
    pred_type: str, fake_score_pred_type: str | None, dtype: torch.dtype
) -> None:
    # eps near t = 1 multiplies rounding by 1 / (1 - t): both sides then compare noise
    timing = {"max_t": 0.98}
    compare(
        {
            "pred_type": pred_type,
            "fake_score_pred_type": fake_score_pred_type,
            "guidance_scale": 3.5,
            "sample_t_cfg": timing,
        },
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guidance_scale", [None, 1.0, 0.0, 5.0])
@pytest.mark.parametrize(
    "steps",
    [
        {},
        SEVERAL,
        {**SEVERAL, "backward_simulation": True, "student_sample_type": "sde"},
        {**SEVERAL, "backward_simulation": True, "student_sample_type": "ode"},
    ],
    ids=["one step", "noised data", "simulated sde", "simulated ode"],
)
def test_student_steps(
    steps: dict[str, Any], guidance_scale: float | None, dtype: torch.dtype
) -> None:
    compare({**steps, "guidance_scale": guidance_scale}, dtype, repeats=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same", [False, True], ids=["own noise", "same noise"])
@pytest.mark.parametrize("r1", [0.0, 200.0])
@pytest.mark.parametrize("steps", [{}, SEVERAL], ids=["one step", "several"])
def test_adversarial(steps: dict[str, Any], r1: float, same: bool, dtype: torch.dtype) -> None:
    gan = {"gan_loss_weight_gen": 0.3, "gan_use_same_t_noise": same, "gan_r1_reg_weight": r1}
    compare({**steps, **gan, "guidance_scale": 2.0}, dtype)


@pytest.mark.parametrize("returns", ["tuple", "sample"])
@pytest.mark.parametrize("time_dist_type", ["uniform", "logitnormal", "lognormal", "polynomial"])
def test_calls_and_times(returns: str, time_dist_type: str) -> None:
    timing = {"time_dist_type": time_dist_type, "p_mean": -0.5}
    compare({"num_train_timesteps": 1000, "sample_t_cfg": timing}, torch.float64, returns=returns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pred_type", ["flow", "x0"])
def test_half_precision(pred_type: str, dtype: torch.dtype) -> None:
    """Rounded where the published code rounds, timesteps included: mostly bit for bit.

    A last bit that hangs on the order of two factors may still come through the network as 1e-2.
    """
    gan = {"gan_loss_weight_gen": 0.3, "gan_r1_reg_weight": 10.0}
    case = Case(
        {"pred_type": pred_type, "num_train_timesteps": 1000, "guidance_scale": 2.0, **gan},
        dtype=dtype,
    )
    ours, theirs = case.pipeline(fastgen), case.pipeline(published)
    for phase in PHASES:
        given = arguments(case, phase)
        assert_same(run(ours, phase, 3, **given), run(theirs, phase, 3, **given), 2e-2)


def test_guidance_of_one_call() -> None:
    case = Case({"guidance_scale": 4.0})
    ours, theirs = case.pipeline(fastgen), case.pipeline(published)
    given = {**case.data, "guidance_scale": 1.5}
    assert_same(run(ours, "student", 5, **given), run(theirs, "student", 5, **given), 1e-6)
    without = Case({}).config
    plain = fastgen.DMDPipeline(
        ours.student, ours.teacher, ours.fake_score, fastgen.DMDConfig(**without)
    )
    off = {**case.data, "guidance_scale": "off"}
    off.pop("negative_encoder_hidden_states")
    assert_same(run(ours, "student", 5, **off), run(plain, "student", 5, **case.data), 0.0)


def test_the_average_follows_the_student() -> None:
    case = Case({"ema": {"decay": 0.9, "start_iter": 2}})
    pipelines = [case.pipeline(fastgen), case.pipeline(published)]
    for iteration in (None, None, None, 7, None):
        moved = torch.randn((), dtype=torch.float64)
        for pipeline in pipelines:
            with torch.no_grad():
                for parameter in pipeline.student.parameters():
                    parameter.add_(moved)
            pipeline.update_ema(iteration=iteration)
    ours, theirs = (pipeline.ema.state_dict() for pipeline in pipelines)
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=0)
    assert case.pipeline(fastgen).ema is not None
    assert Case({}).pipeline(fastgen).ema is None


@pytest.mark.parametrize(
    ("config", "call", "error"),
    [
        ({"guidance_scale": 2.0}, "student", ValueError),
        ({"student_sample_steps": 2}, "student", ValueError),
        ({}, "discriminator", RuntimeError),
    ],
)
def test_the_same_calls_are_rejected(
    config: dict[str, Any], call: str, error: type[Exception]
) -> None:
    for library in (fastgen, published):
        case = Case(config)
        case.data.pop("negative_encoder_hidden_states")
        with pytest.raises(error):
            run(case.pipeline(library), call, 0, **case.data)


@pytest.mark.parametrize("library", [fastgen, published])
def test_a_gan_weight_needs_a_discriminator_and_features(library: Any) -> None:
    case = Case({"gan_loss_weight_gen": 0.1})
    networks = {k: v for k, v in case.networks.items() if k != "discriminator"}
    config = library.DMDConfig(**case.config)
    with pytest.raises(ValueError, match="discriminator"):
        library.DMDPipeline(config=config, **networks)
    pipeline = library.DMDPipeline(config=config, **case.networks)
    for phase in ("student", "discriminator"):
        given = arguments(case, phase)
        with pytest.raises(RuntimeError, match="attach_feature_capture"):
            run(pipeline, phase, 0, **given)


def test_an_unknown_output_is_a_type_error() -> None:
    case = Case({}, returns="tensor")
    for library in (fastgen, published):
        pipeline = case.pipeline(library)
        pipeline.student.forward = lambda **_: {"x": 1}
        with pytest.raises(TypeError, match="dict"):
            run(pipeline, "student", 0, **arguments(case, "student"))


def test_features_that_nobody_asked_for_do_not_pile_up() -> None:
    case = Case({})
    pipeline = case.pipeline(fastgen)
    capture(pipeline.teacher)
    run(pipeline, "student", 0, **arguments(case, "student"))
    assert pipeline.teacher._fastgen_captured == []


def test_a_diffusers_wan_is_distilled_alike() -> None:
    """The real thing: tiny Wan transformers as student, teacher and fake score."""
    from diffusers import WanTransformer3DModel

    def wan() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=6,
            freq_dim=8,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )

    case = Case({"num_train_timesteps": 1000, "guidance_scale": 3.0}, dtype=torch.float32, batch=2)
    case.networks = {name: wan() for name in ("student", "teacher", "fake_score")}
    case.networks["discriminator"] = torch.nn.Identity()
    case.data = {
        **{name: torch.randn(2, 4, 2, 4, 4) for name in ("latents", "noise")},
        **{
            name: torch.randn(2, 5, 6)
            for name in ("encoder_hidden_states", "negative_encoder_hidden_states")
        },
    }
    ours, theirs = case.pipeline(fastgen), case.pipeline(published)
    for phase in ("student", "fake_score"):
        given = {k: v for k, v in arguments(case, phase).items() if k != "gain"}
        assert_same(run(ours, phase, 11, **given), run(theirs, phase, 11, **given), 1e-6)
    assert gradients(ours) == {}
