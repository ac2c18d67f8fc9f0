"""Diffusion and teacher forcing against their formulas in double precision, under every layout."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.options import parse_options
from megagen.core.registry import resolve
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.methods import METHODS
from megagen.methods.diffusion_forcing import DiffusionForcingSFTMethod
from megagen.methods.teacher_forcing import TeacherForcingSFTMethod
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests.engine import cases
from tests.methods import causal_cases
from tests.methods import dmd2_cases as dmd2
from tests.methods.test_dmd2 import LAYOUTS, SINGLE, average, weights, worst_of_norm
from tests.models.wan_causal_cases import Rule, make_plugin

SINK = Rule(2, window=4, sink=1)
FIRST_ALONE = Rule(2, first_alone=True)
VARIANTS: dict[str, tuple[str, Rule, dict[str, Any]]] = {
    "forcing": ("diffusion_forcing", SINK, {"min_timestep_ratio": 0.1}),
    "forcing_logit_normal": (
        "diffusion_forcing",
        FIRST_ALONE,
        {"weighting_scheme": "logit_normal", "loss_weighting": "bell", "chunk_size": 2},
    ),
    "teacher": ("teacher_forcing", Rule(2), {}),
    "teacher_noised": (
        "teacher_forcing",
        FIRST_ALONE,
        {"context_noise": 60.0, "max_timestep_ratio": 0.9},
    ),
}
METRICS = ("loss/total", "grad_norm/student")


def make_method(given: cases.Weights, data: ParallelDims, dims: ParallelDims, variant: str) -> Any:
    name, rule, options = VARIANTS[variant]
    student = causal_cases.make_student(given, rule, dims, data)
    cls = resolve(name, METHODS)
    parsed = parse_options(cls.Options, options, "method")
    cls.check(parsed, {"student": student.plugin})
    return cls({"student": student}, parsed, Streams(dmd2.SEED))


def run(
    given: cases.Weights, data: ParallelDims, dims: ParallelDims, variant: str, num_steps: int
) -> list[dict[str, Any]]:
    """In a rank: metrics over all data ranks, and the gradients of each step."""
    method, mesh, found = make_method(given, data, dims, variant), Mesh.build(data), []
    for step in range(num_steps):
        result = method.train_step(dmd2.own_batches(step, mesh, **causal_cases.KIND), step)
        metrics: dict[str, Any] = {k: average(v) for k, v in result.metrics.items()}
        found.append({**metrics, "student": dmd2.gradients_of(method.student)})
    return found


class Reference:
    """One network in double precision."""

    def __init__(self, variant: str) -> None:
        self.name, self.rule, options = VARIANTS[variant]
        self.o = {"min_timestep_ratio": 0.0, "max_timestep_ratio": 1.0, **options}
        self.net = cases.PlainModel(weights()[0], dmd2.ADAMW)
        self.net.model.double()
        self.velocity = causal_cases.causal_reference(self.net, weights()[0], self.rule)
        self.velocity.stops = False  # the clean half learns too
        self.streams = Streams(dmd2.SEED)

    def times(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noise level and weight of every frame."""
        blocks = [self.rule.block(frame) for frame in range(causal_cases.SHAPE[1])]
        sigma = torch.zeros(len(batch.positions), len(blocks), dtype=torch.float64)
        weight = torch.zeros_like(sigma)
        for i, position in enumerate(batch.positions):
            generator = self.streams.generator("timestep", step, position)
            shape = (max(blocks) + 1,)
            if self.o.get("weighting_scheme") == "logit_normal":
                u = torch.sigmoid(torch.randn(shape, generator=generator).double())
            else:
                u = 1 - torch.rand(shape, generator=generator).double()
            low, high = self.o["min_timestep_ratio"], self.o["max_timestep_ratio"]
            s = low + (high - low) * dmd2.SHIFT * u / (1 + (dmd2.SHIFT - 1) * u)
            if self.o.get("loss_weighting") == "bell":
                w = torch.exp(-2 * (s - 0.5) ** 2) / 0.8556243918921488
            else:
                w = (torch.exp(-2 * (u - 0.5) ** 2) - math.exp(-0.5)) / 0.24909373218
            sigma[i], weight[i] = s[blocks], w[blocks]
        return sigma, weight

    def loss(self, step: int, batch: Batch) -> Tensor:
        assert batch.latents_BCTHW is not None
        x0 = batch.latents_BCTHW.double()
        eps = self.normal("noise", step, batch)
        sigma, weight = self.times(step, batch)
        s = sigma[:, None, :, None, None]
        condition = {"text_embeds_BLD": batch.condition["text_embeds_BLD"].double()}
        if self.name == "teacher_forcing":
            level = self.o.get("context_noise", 0.0)
            context = self.normal("context_noise", step, batch)
            condition["clean_latents_BCTHW"] = (1 - level / 1000) * x0 + level / 1000 * context
            condition["clean_timestep"] = torch.full((len(x0),), level)
        request = Request((1 - s) * x0 + s * eps, (1000 * sigma).float(), condition)
        per_frame = (self.velocity(request) - (eps - x0)).square().mean((1, 3, 4))
        return (weight * per_frame).mean()

    def normal(self, purpose: str, step: int, batch: Batch) -> Tensor:
        return torch.stack(
            [
                torch.randn(
                    causal_cases.SHAPE, generator=self.streams.generator(purpose, step, position)
                ).double()
                for position in batch.positions
            ]
        )

    def step(self, step: int) -> dict[str, Any]:
        everyone, total = dmd2.batches(step, **causal_cases.KIND), 0.0
        with dmd2.true_double():
            for batch in everyone:
                loss = self.loss(step, batch) / len(everyone)
                loss.backward()
                total += loss.item()
        gradients = {n: g.clone() for n, g in self.net.gradients().items()}
        return {
            "loss/total": total,
            "student": gradients,
            "grad_norm/student": self.net.step(),
        }


@functools.cache
def reference(variant: str) -> dmd2.Curve:
    return dmd2.Curve(Reference(variant))


def expected(variant: str, num_steps: int) -> list[dict[str, Any]]:
    return reference(variant).first(num_steps)


def check(ranks: list[list[dict[str, Any]]], wanted_steps: list[dict[str, Any]]) -> None:
    for step, wanted in enumerate(wanted_steps):
        for found in (rank[step] for rank in ranks):
            cases.close([found[m] for m in METRICS], [wanted[m] for m in METRICS])
    gradients = cases.merge([rank[0]["student"] for rank in ranks])
    assert worst_of_norm(gradients, wanted_steps[0]["student"]) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_from_the_formulas(variant: str) -> None:
    check(run_ranks(1, run, weights()[0], SINGLE, SINGLE, variant, 1), expected(variant, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["forcing", "teacher_noised"])
def test_five_steps_under_every_layout(variant: str, layout: str) -> None:
    num_ranks, data, dims, *_ = LAYOUTS[layout]
    check(run_ranks(num_ranks, run, weights()[0], data, dims, variant, 5), expected(variant, 5))


# -- draws and options -----------------------------------------------------------------------------
def drawn(given: cases.Weights) -> list[Request]:
    method = make_method(given, SINGLE, SINGLE, "forcing_logit_normal")
    return [
        method.draw(batch, step)
        for step in range(40)
        for batch in dmd2.batches(step, shape=(3, 7, 2, 6))
    ]


def test_each_chunk_has_a_timestep_of_its_own() -> None:
    (requests,) = run_ranks(1, drawn, weights()[0])
    t = torch.cat([request.timestep for request in requests])
    blocks = [FIRST_ALONE.block(frame) for frame in range(7)]
    assert blocks == [0, 1, 1, 2, 2, 3, 3]
    for first in (1, 3, 5):
        assert torch.equal(t[:, first], t[:, first + 1])
    own = t[:, [0, 1, 3, 5]].double()
    assert len(own.unique()) == own.numel()
    assert torch.corrcoef(own.T).fill_diagonal_(0).abs().max() < 0.25
    u = own / 1000 / (dmd2.SHIFT - (dmd2.SHIFT - 1) * own / 1000)
    assert stats.kstest(torch.logit(u).flatten().numpy(), "norm").pvalue > 1e-3


def test_options_are_checked() -> None:
    plain = cases.make_plugin()

    def refused(cls: Any, match: str, plugin: Any, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            cls.check(parse_options(cls.Options, options, "method"), {"student": plugin})

    causal = make_plugin(Rule(2))
    refused(DiffusionForcingSFTMethod, "chunk_size.*blocks of 2 frames", causal, chunk_size=3)
    refused(TeacherForcingSFTMethod, "wan_causal", plain)
    refused(TeacherForcingSFTMethod, "context_noise", causal, context_noise=1001)
    options = parse_options(DiffusionForcingSFTMethod.Options, {"chunk_size": 4}, "")
    DiffusionForcingSFTMethod.check(options, {"student": plain})
