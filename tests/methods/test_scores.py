"""What unconditional passes see, when they are made, and which timesteps experts are scored at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.fastgen.guidance import Guidance
from megagen.methods import scores
from megagen.methods.diffusion_forcing import DiffusionForcingSFTMethod
from megagen.methods.kd import KDMethod
from megagen.methods.scores import Unconditional, UncondOptions
from megagen.methods.self_forcing import SelfForcingMethod
from megagen.models.base import Request
from tests.engine import cases
from tests.methods import dmd2_cases as dmd2
from tests.models.wan_causal_cases import Rule, make_plugin

EMPTY, NEGATIVE = torch.full((2, 6), 3.0), torch.full((9, 6), 5.0)
EMBEDDINGS = {"empty": EMPTY, "negative": NEGATIVE}


def request() -> Request:
    generator = torch.Generator().manual_seed(1)
    text, image = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
    x = torch.randn(2, 3, 1, 2, 2, generator=generator)
    condition = {"text_embeds_BLD": text, "image_embeds_BLD": image}
    return Request(x, torch.tensor([900.0, 400.0]), condition)


def unconditional(embeddings: Any = EMBEDDINGS, **options: Any) -> Unconditional:
    parsed = parse_options(UncondOptions, options, "method.cfg_uncond")
    return Unconditional(parsed, embeddings, needed=True)


@pytest.mark.parametrize("text", ["negative_prompt", "empty", "zero", "keep"])
@pytest.mark.parametrize("image", ["keep", "zero", "drop"])
def test_what_unconditional_passes_see(text: str, image: str) -> None:
    given = request()
    found = unconditional(text=text, image=image)(given)
    own, own_image = (given.condition[f"{n}_embeds_BLD"] for n in ("text", "image"))
    short = torch.zeros(5, 6)
    short[:2] = 3  # padded with zeros; the negative prompt is cut
    wanted = {"negative_prompt": torch.full((5, 6), 5.0), "empty": short, "keep": own}
    assert torch.equal(
        found.condition["text_embeds_BLD"],
        wanted.get(text, torch.zeros(5, 6)).expand(2, 5, 6),
    )
    if image == "drop":
        assert "image_embeds_BLD" not in found.condition
    else:
        kept = own_image if image == "keep" else torch.zeros_like(own_image)
        assert torch.equal(found.condition["image_embeds_BLD"], kept)
    assert torch.equal(found.latents_BCTHW, given.latents_BCTHW)


def test_a_missing_embedding() -> None:
    with pytest.raises(ConfigError, match="no embedding of that prompt"):
        unconditional({"empty": EMPTY})
    found = unconditional({}, on_missing="ignore")(request())
    assert not found.condition["text_embeds_BLD"].any()
    Unconditional(UncondOptions(), {}, needed=False)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_scale_1_makes_no_unconditional_pass(scale: float) -> None:
    seen: list[Request] = []

    def predict(requests: list[Request]) -> list[Tensor]:
        seen.extend(requests)
        return [0.5 * r.latents_BCTHW + r.condition["text_embeds_BLD"].mean() for r in requests]

    given, role = request(), SimpleNamespace(predict=predict)
    (found,) = scores.guided_x0(role, [given], Guidance(scale), unconditional())  # type: ignore[arg-type]
    assert len(seen) == (1 if scale == 1 else 2)
    sigma = given.timestep.view(2, 1, 1, 1, 1) / 1000
    cond, uncond = (
        given.latents_BCTHW - sigma * (0.5 * given.latents_BCTHW + mean)
        for mean in (given.condition["text_embeds_BLD"].mean(), 5.0)
    )
    torch.testing.assert_close(found.float(), (uncond + scale * (cond - uncond)).float())


# -- experts ---------------------------------------------------------------------------------------
def expert(side: str) -> Any:
    return cases.make_plugin(expert=side, boundary_ratio=0.875)


@pytest.mark.parametrize(("side", "low", "high"), [("high", 875, 1000), ("low", 0, 875)])
def test_self_forcing_scores_on_the_experts_side(side: str, low: int, high: int) -> None:
    """The causal student serves all timesteps; what scores it is an expert."""
    plugins = {"student": make_plugin(Rule(2)), "teacher": expert(side), "critic": expert(side)}
    options = parse_options(
        SelfForcingMethod.Options, {"dmd_denoising_steps": [1000, 500]}, "method"
    )
    SelfForcingMethod.check(options, plugins)
    served = scores.score_range(options, plugins)
    drawn = scores.score_timestep(
        Streams(1), "t", 0, range(2000), options, shift=5.0, served=served
    )
    assert low < drawn.min() and drawn.max() <= high
    u = (drawn - low) / (high - low)
    law = stats.uniform().cdf
    assert stats.kstest((u / (5 - 4 * u)).numpy(), law).pvalue > 1e-3  # nothing piles up
    plugins["critic"] = expert("low" if side == "high" else "high")
    with pytest.raises(ConfigError, match="served by every network"):
        SelfForcingMethod.check(options, plugins)


@pytest.mark.parametrize("side", ["high", "low"])
def test_paths_need_both_experts_and_students_their_own_timesteps(side: str, tmp_path: Any) -> None:
    given = {"teacher_path_cache": str(tmp_path), "teacher_inference_steps": 4, "snap": True}
    options = parse_options(
        KDMethod.Options, {**given, "dmd_denoising_steps": [1000, 500]}, "method"
    )
    both = {"teacher": expert("high"), "teacher_2": expert("low")}
    KDMethod.check(options, {"student": cases.make_plugin(), **both})
    with pytest.raises(ConfigError, match="no teacher serves timestep"):
        KDMethod.check(options, {"student": cases.make_plugin(), "teacher": expert(side)})
    with pytest.raises(ConfigError, match="outside"):
        KDMethod.check(options, {"student": expert(side), **both})


@pytest.mark.parametrize(("side", "low", "high"), [("high", 875, 1000), ("low", 0, 875)])
def test_forcing_draws_on_the_experts_side(side: str, low: int, high: int) -> None:
    """Of a whole-video expert, each chunk has a timestep of its own and all are served."""
    student: Any = SimpleNamespace(plugin=expert(side))
    options = parse_options(DiffusionForcingSFTMethod.Options, {"chunk_size": 1}, "method")
    method = DiffusionForcingSFTMethod({"student": student}, options, Streams(3))
    t = torch.cat([method.draw(batch, 0).timestep for batch in dmd2.batches(0, count=40)])
    assert t.shape == (80, 3) and len(t.unique()) == t.numel()
    assert low < t.min() < low + 30 and high - 30 < t.max() <= high
