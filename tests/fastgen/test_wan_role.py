"""The losses of a DMD2 step on megagen's own Wan, spread over ranks, beside diffusers' Wan.

The same weights, data and draws go through ``DMDPipeline`` on diffusers' networks and through the
library's functions as losses of roles. ``test_dmd.py`` compares the pipeline with the published
one, on diffusers' Wan too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.engine.role import FeatureLoss, Role
from megagen.fastgen import rollout
from megagen.fastgen.config import DMDConfig
from megagen.fastgen.draws import Draws
from megagen.fastgen.flow_matching import add_noise, pred_x0_from_flow
from megagen.fastgen.losses import dsm_loss, gan_disc_loss, gan_gen_loss, r1_loss, vsd_loss
from megagen.fastgen.methods.dmd import DMDPipeline
from megagen.fastgen.plugins.wan22 import attach_feature_capture
from megagen.fastgen.timesteps import sample_timesteps
from megagen.fastgen.utils import classifier_free_guidance
from megagen.fastgen.video_discriminators import Discriminator_VideoDiT
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests import seeds
from tests.engine import cases

ROLES = ("student", "teacher", "fake_score")
BLOCKS = (1, 3)
GAN, SCALE = 0.3, 3.0
T_LIST = [0.95, 0.6, 0.0]
CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "guidance_scale": SCALE,
    "student_sample_steps": 2,
    "backward_simulation": True,
    "sample_t_cfg": {"t_list": T_LIST, "time_dist_type": "logitnormal"},
    "gan_loss_weight_gen": GAN,
    "gan_use_same_t_noise": True,
    "gan_r1_reg_weight": 20.0,
    "gan_r1_reg_alpha": 1.0,  # R1 is a difference of logits: a small one would be all rounding
}
LAYOUTS = {
    "single": (1, ParallelDims()),
    "tp2": (2, ParallelDims(tp_size=2)),
    "pp2": (2, ParallelDims(pp_size=2)),
    "cp2": (2, ParallelDims(cp_size=2)),
}
ADAMW = dataclasses.replace(cases.ADAMW, max_grad_norm=0.0, use_distributed_optimizer=False)


@dataclass(frozen=True)
class Data:
    """One micro-batch; ``seed`` is that of the draws of the student's input and of R1's noise."""

    latents: Tensor
    noise: Tensor
    eps: Tensor
    t: Tensor
    text: Tensor
    negative: Tensor
    seed: int

    def request(self, latents: Tensor, t: Tensor) -> Request:
        return Request(latents, 1000 * t, {"text_embeds_BLD": self.text}, {"data": self, "t": t})


def unconditional(request: Request) -> Request:
    return request.with_(condition={"text_embeds_BLD": request.extra["data"].negative})


@dataclass(frozen=True)
class Case:
    """Networks and data that both sides are given."""

    config: DMDConfig
    weights: dict[str, cases.Weights]
    judge: Discriminator_VideoDiT
    data: list[Data]


@dataclass
class Found:
    """Losses of each micro-batch, and gradients of their mean, by phase."""

    losses: dict[str, list[float]]
    gradients: dict[str, cases.Weights]


def make_case(sample_type: str) -> Case:
    seed = seeds.fresh()
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    config = DMDConfig(**CONFIG, student_sample_type=sample_type)
    judge = Discriminator_VideoDiT(BLOCKS, 4, 32, width=8, head="branches", generator=generator)
    cases.without_kinks(judge)

    def data(rung: int) -> Data:
        text, negative = torch.randn(2, 2, 5, 6, generator=generator)
        shape = (3, cases.BATCH, 3, *cases.SIZE)
        t = sample_timesteps(cases.BATCH, config.sample_t_cfg, device="cpu", generator=generator)
        own = next(s for s in range(seed, seed + 999) if drawn_rung(s) == rung)
        return Data(*torch.randn(shape, generator=generator), t, text, negative, own)

    weights = {role: cases.random_weights(seed + i) for i, role in enumerate(ROLES)}
    return Case(config, weights, judge, [data(rung) for rung in (0, 1)])


def drawn_rung(seed: int) -> int:
    draws = Draws(torch.Generator().manual_seed(seed))
    return draws.rung(len(T_LIST) - 1, torch.device("cpu"))


# -- the pipeline on diffusers' networks -----------------------------------------------------------
def by_pipeline(case: Case) -> Found:
    networks = {role: cases.PlainModel(case.weights[role]).model for role in ROLES}
    attach_feature_capture(networks["teacher"], BLOCKS, grid="auto")
    pipeline = DMDPipeline(**networks, config=case.config, discriminator=case.judge)
    trained = {**networks, "discriminator": case.judge}
    found = Found({}, {})
    for phase in ("student", "fake_score", "discriminator"):
        for data in case.data:
            given: dict[str, Any] = {"encoder_hidden_states": data.text}
            if phase == "student":
                given["negative_encoder_hidden_states"] = data.negative
            terms = getattr(pipeline, f"compute_{phase}_loss")(
                data.latents,
                data.noise,
                eps=data.eps,
                timestep=data.t,
                generator=torch.Generator().manual_seed(data.seed),
                **given,
            )
            (terms["total"] / len(case.data)).backward()
            for name, value in terms.items():
                found.losses.setdefault(f"{phase}/{name}", []).append(float(value.detach()))
        found.gradients[phase] = take_gradients(trained[phase])
        take_gradients(case.judge)  # the student's loss reaches it too
    return found


def take_gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    named = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {name: grad.clone() for name, grad in named.items()}


# -- roles ---------------------------------------------------------------------------------------
class Step:
    """A DMD2 step of three roles, made of the library's functions."""

    def __init__(self, case: Case, dims: ParallelDims, schedule: str) -> None:
        self.case, self.judge = case, case.judge
        settings = {"optimizer": ADAMW, "score_schedule": schedule}
        weights = case.weights
        self.student = cases.make_role(weights["student"], dims, **settings)
        self.fake_score = cases.make_role(weights["fake_score"], dims, name="fake", **settings)
        self.teacher = cases.make_role(weights["teacher"], dims, name="teacher", trainable=False)
        self.gan = FeatureLoss(BLOCKS, self.deceive)
        self.found = Found({}, {})

    def run(self) -> Found:
        generators = [torch.Generator().manual_seed(data.seed) for data in self.case.data]
        inputs = [
            self.student_input(*pair) for pair in zip(self.case.data, generators, strict=True)
        ]
        self.train_student(inputs)
        noised = self.noised(inputs, self.student.predict(inputs))
        self.train_fake_score(noised)
        self.judge_features(noised, [Draws(generator) for generator in generators])
        for phase, role in (("student", self.student), ("fake_score", self.fake_score)):
            role.step()  # sums the gradients over ranks
            self.found.gradients[phase] = cases.whole(role, main_grad)
        return self.found

    def student_input(self, data: Data, generator: torch.Generator) -> Request:
        """By backward simulation, on the student as it is."""
        draws, batch = Draws(generator), len(data.latents)
        rung = draws.rung(len(T_LIST) - 1, data.latents.device)
        t = torch.full((batch,), T_LIST[rung])
        if rung == 0:
            return data.request(rollout.first_input(data.noise, T_LIST[0]), t)

        def predict_x0(x_t: Tensor, t: Tensor) -> Tensor:
            request = data.request(x_t, t)
            return x0_of(self.student.predict([request])[0], request)

        start = rollout.first_input(draws.normal(data.noise), T_LIST[0])
        kind = self.case.config.student_sample_type
        x0 = rollout.simulate(predict_x0, start, T_LIST, rung, kind, draws.normal)
        return data.request(add_noise(x0, data.noise, t), t)

    def noised(self, inputs: list[Request], velocities: list[Tensor]) -> list[Request]:
        """The student's samples, re-noised; the samples themselves are kept."""
        requests = []
        for request, velocity in zip(inputs, velocities, strict=True):
            data, x0 = request.extra["data"], x0_of(velocity, request)
            noisy = data.request(add_noise(x0, data.eps, data.t), data.t)
            requests.append(noisy.with_(extra={**noisy.extra, "x0": x0}))
        return requests

    # -- the student
    def train_student(self, inputs: list[Request]) -> None:
        self.student.zero_grad()
        terms = self.student.forward_score_backward(
            inputs, functools.partial(self.scores, inputs), vsd_and_gan
        )
        vsd = [float(term["vsd"]) for term in terms]
        gan = [float(losses.sum()) for losses in self.gan.losses]
        total = [v + GAN * g for v, g in zip(vsd, gan, strict=True)]
        self.note("student", vsd=vsd, gan_gen=gan, total=total)

    def scores(self, inputs: list[Request], velocities: list[Tensor]) -> list[dict[str, Tensor]]:
        """What teacher and fake score say about the samples, and the discriminator's pull."""
        noised = self.noised(inputs, velocities)
        real = predict_x0(self.teacher, noised)
        uncond = predict_x0(self.teacher, [unconditional(r) for r in noised])
        guided = [classifier_free_guidance(c, u, SCALE) for c, u in zip(real, uncond, strict=True)]
        fake = predict_x0(self.fake_score, noised)
        pull = self.teacher.input_gradient(noised, feature_loss=self.gan)
        return [
            {"teacher_x0": a, "fake_x0": b, "pull": c}
            for a, b, c in zip(guided, fake, pull, strict=True)
        ]

    def deceive(self, position: int, feature_BDTHW: Tensor, request: Request) -> Tensor:
        """One head's share of ``gan_gen_loss``, a mean over all logits."""
        logits = self.judge.forward_head(position, feature_BDTHW)
        return gan_gen_loss(logits) * logits.shape[1] / sum(self.judge.heads_per_feature)

    # -- the critics
    def train_fake_score(self, noised: list[Request]) -> None:
        self.fake_score.zero_grad()
        terms = self.fake_score.forward_backward(noised, denoising)
        losses = [float(term["loss"]) for term in terms]
        self.note("fake_score", fake_score=losses, total=losses)

    def judge_features(self, noised: list[Request], draws: list[Draws]) -> None:
        real, moved = [], []
        for data, own in zip(self.case.data, draws, strict=True):
            real.append(data.request(add_noise(data.latents, data.eps, data.t), data.t))
            noise = self.case.config.gan_r1_reg_alpha * own.normal(data.latents)
            moved.append(data.request(data.latents + noise, data.t))
        features = [self.teacher.features(batch, BLOCKS) for batch in (noised, real, moved)]
        losses: dict[str, list[float]] = {"gan_disc": [], "r1": [], "total": []}
        for each in zip(*features, strict=True):
            fake_logits, real_logits, moved_logits = (self.judge(found) for found in each)
            disc = gan_disc_loss(real_logits, fake_logits)
            r1 = r1_loss(real_logits, moved_logits)
            total = disc + self.case.config.gan_r1_reg_weight * r1
            (total / len(noised)).backward()
            for name, value in {"gan_disc": disc, "r1": r1, "total": total}.items():
                losses[name].append(float(value.detach()))
        self.note("discriminator", **losses)
        self.found.gradients["discriminator"] = take_gradients(self.judge)

    def note(self, phase: str, **losses: list[float]) -> None:
        self.found.losses |= {f"{phase}/{name}": values for name, values in losses.items()}


def x0_of(velocity: Tensor, request: Request) -> Tensor:
    return pred_x0_from_flow(velocity, request.latents_BCTHW, request.extra["t"])


def predict_x0(role: Role, requests: Sequence[Request]) -> list[Tensor]:
    return [x0_of(v, r) for v, r in zip(role.predict(requests), requests, strict=True)]


def vsd_and_gan(velocity: Tensor, request: Request, target: dict[str, Tensor]) -> dict[str, Tensor]:
    """VSD, and a term that is zero and whose gradient is the discriminator's."""
    data, gen = request.extra["data"], x0_of(velocity, request)
    vsd = vsd_loss(gen, target["teacher_x0"], target["fake_x0"])
    x_t = add_noise(gen, data.eps, data.t)
    pull = ((x_t - x_t.detach()) * target["pull"]).sum()
    return {"loss": vsd + GAN * pull, "vsd": vsd}


def denoising(velocity: Tensor, request: Request) -> dict[str, Tensor]:
    data, gen = request.extra["data"], request.extra["x0"]
    return {"loss": dsm_loss("x0", x0_of(velocity, request), x0=gen, eps=data.eps, t=data.t)}


def main_grad(parameter: Any) -> Tensor:
    return parameter.main_grad


def by_roles(case: Case, dims: ParallelDims, schedule: str) -> Found:
    return Step(case, dims, schedule).run()


# -- both ----------------------------------------------------------------------------------------
@functools.cache
def reference(sample_type: str) -> tuple[Case, Found]:
    case = make_case(sample_type)
    return case, by_pipeline(case)


@pytest.mark.parametrize(
    ("name", "schedule", "sample_type"),
    [
        ("single", "replay", "sde"),
        ("single", "hold", "ode"),
        ("tp2", "replay", "sde"),
        ("pp2", "replay", "sde"),
        ("pp2", "hold", "ode"),
        ("cp2", "replay", "sde"),
    ],
)
def test_a_step_of_roles_equals_the_pipeline(name: str, schedule: str, sample_type: str) -> None:
    num_ranks, dims = LAYOUTS[name]
    case, expected = reference(sample_type)
    found = run_ranks(num_ranks, by_roles, case, dims, schedule)
    for rank in found:
        assert rank.losses.keys() == expected.losses.keys()
        for term, values in expected.losses.items():
            cases.close(rank.losses[term], values)
    for phase, gradients in expected.gradients.items():
        merged = cases.merge([rank.gradients[phase] for rank in found])
        assert cases.relative(flat(merged, gradients), flat(gradients, gradients)) < 1e-5, phase
        # what the discriminator's biases get from real and from fake samples nearly cancels
        assert cases.worst_gradient(merged, gradients) < 3e-5, phase


def flat(tensors: cases.Weights, order: cases.Weights) -> Tensor:
    """All of them as one vector."""
    return torch.cat([tensors[name].flatten() for name in order])
