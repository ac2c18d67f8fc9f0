"""Three networks in one run: a student whose loss is made of a teacher's and a critic's outputs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megagen.engine.exchange import _Plan
from megagen.engine.role import Role
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests import seeds
from tests.engine import cases

NUM_STEPS = 2
ADAMW = dataclasses.replace(cases.ADAMW, max_grad_norm=0.0, use_distributed_optimizer=False)
PP2 = ParallelDims(pp_size=2)
TP2_PP2 = ParallelDims(tp_size=2, pp_size=2)
TP2_SP = ParallelDims(tp_size=2, sequence_parallel=True)
CP2 = ParallelDims(cp_size=2)
# ranks, data layout, student, teacher, critic
LAYOUTS = {
    "single": (1, *[ParallelDims()] * 4),
    "all_pp2": (2, *[PP2] * 4),
    "all_tp2_pp2": (4, *[TP2_PP2] * 4),
    "all_different": (4, TP2_SP, TP2_SP, CP2, PP2),
    "data_parallel_only": (4, ParallelDims(), PP2, TP2_SP, CP2),
    "twins_share": (2, ParallelDims(), CP2, ParallelDims(), PP2),
    "data_pp2": (4, PP2, ParallelDims(), TP2_SP, TP2_PP2),
}


def x0(velocity: Tensor, request: Request) -> Tensor:
    """The clean latents that a velocity means."""
    return request.latents_BCTHW - request.timestep.view(-1, 1, 1, 1, 1) / 1000 * velocity


def renoised(latents: Tensor, request: Request) -> Request:
    """Another noise level on top; a function of the request."""
    noisy = latents + 0.5 * request.extra["target"]
    return request.with_(latents_BCTHW=noisy, timestep=1000 - request.timestep)


def surrogate(velocity: Tensor, request: Request, target: Tensor) -> dict[str, Tensor]:
    """``<x0, g>`` as a squared distance, so that its gradient is ``x0 - target``."""
    error = x0(velocity, request) - target
    return {"loss": error.square().mean(), "other": error.abs().mean()}


# -- plain torch --------------------------------------------------------------------------------
def plain_run(weights: list[cases.Weights]) -> dict[str, Any]:
    student, teacher, critic = (cases.PlainModel(w, ADAMW) for w in weights)
    curve: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        requests = cases.make_requests(step)
        total = 0.0
        for request in requests:
            with torch.no_grad():
                noisy = renoised(x0(student(request), request), request)
            loss = cases.squared_error(critic(noisy), request)["loss"] / len(requests)
            loss.backward()
            total += loss.item()
        curve += [total, critic.step()]
        total = 0.0
        for request in requests:
            velocity = student(request)
            with torch.no_grad():
                clean = x0(velocity, request)
                noisy = renoised(clean, request)
                target = clean - (critic(noisy) - teacher(noisy))
            loss = surrogate(velocity, request, target)["loss"] / len(requests)
            loss.backward()
            total += loss.item()
        gradients = gradients or student.gradients()
        curve += [total, student.step()]
    return {"curve": curve, "gradients": gradients, "weights": student.weights()}


@functools.cache
def reference() -> tuple[Any, Any]:
    weights = [cases.random_weights(seeds.SHARED + i) for i in range(3)]
    return weights, plain_run(weights)


# -- megagen ------------------------------------------------------------------------------------
def megagen_run(
    weights: list[cases.Weights], data: ParallelDims, layouts: list[ParallelDims], schedule: str
) -> dict[str, Any]:
    settings = {"data": data, "optimizer": ADAMW, "score_schedule": schedule}
    student = cases.make_role(weights[0], layouts[0], name="student", **settings)
    teacher = cases.make_role(weights[1], layouts[1], name="teacher", data=data, trainable=False)
    critic = cases.make_role(weights[2], layouts[2], name="critic", **settings)
    curve: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(NUM_STEPS):
        own = cases.own_part(cases.make_requests(step), Mesh.build(data))
        predictions = student.predict(own)
        noisy = [renoised(x0(v, r), r) for v, r in zip(predictions, own, strict=True)]
        critic.zero_grad()
        terms = critic.forward_backward(noisy, cases.squared_error)
        curve += [mean_loss(terms), critic.step().grad_norm]
        student.zero_grad()
        targets = functools.partial(make_targets, own, teacher, critic)
        terms = student.forward_score_backward(own, targets, surrogate)
        assert all(t.keys() == {"loss", "other"} for t in terms)
        info = student.step()
        gradients = gradients or cases.whole(student, lambda p: p.main_grad)
        curve += [mean_loss(terms), info.grad_norm]
    found = {"curve": curve, "gradients": gradients, "weights": cases.whole(student, lambda p: p)}
    assert teacher.optimizer is None and not any(
        p.requires_grad for chunk in teacher.chunks for p in chunk.parameters()
    )
    return found


def make_targets(
    own: list[Request], teacher: Role, critic: Role, predictions: list[Tensor]
) -> list[Tensor]:
    """``x0 - (critic - teacher)`` at the student's re-noised outputs."""
    clean = [x0(v, r) for v, r in zip(predictions, own, strict=True)]
    noisy = [renoised(c, r) for c, r in zip(clean, own, strict=True)]
    real, fake = teacher.predict(noisy), critic.predict(noisy)
    return [c - (f - r) for c, f, r in zip(clean, fake, real, strict=True)]


def mean_loss(terms: list[dict[str, Tensor]]) -> float:
    """Over all data ranks."""
    loss = torch.stack([t["loss"] for t in terms]).mean()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


@pytest.mark.parametrize("schedule", ["replay", "hold"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_student_teacher_critic_equal_a_single_process(name: str, schedule: str) -> None:
    num_ranks, data, *layouts = LAYOUTS[name]
    weights, expected = reference()
    found = run_ranks(num_ranks, megagen_run, weights, data, layouts, schedule)
    for rank in found:
        cases.close(rank["curve"], expected["curve"])
    gradients = cases.merge([rank["gradients"] for rank in found])
    assert cases.worst_gradient(gradients, expected["gradients"]) < 1e-5
    assert cases.worst(cases.merge([rank["weights"] for rank in found]), expected["weights"]) < 1e-4


def test_virtual_stages_replay_where_hold_is_asked() -> None:
    vpp = ParallelDims(pp_size=2, virtual_pp_size=2)
    weights, expected = reference()
    for rank in run_ranks(2, megagen_run, weights, vpp, [vpp, PP2, vpp], "hold"):
        cases.close(rank["curve"], expected["curve"])


# -- the exchange's arithmetic ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("replicas", "data_rank"),
    [
        ([[0, 1], [2, 3]], [0, 0, 1, 1]),
        ([[0, 1], [2, 3]], [0, 1, 0, 1]),
        ([[0], [1], [2], [3]], [0, 0, 1, 1]),
        ([[0, 1, 2], [3, 4, 5]], [0, 0, 1, 1, 2, 2]),
        ([[0, 1], [2, 3], [4, 5]], [0, 1, 2, 0, 1, 2]),
        ([[0, 1, 2, 3]], [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("num_requests", [1, 2, 3])
def test_every_request_counts_alike(
    replicas: list[list[int]], data_rank: list[int], num_requests: int
) -> None:
    contents = [tuple(sorted({data_rank[r] for r in ranks})) for ranks in replicas]
    plan = _Plan(replicas, contents, data_rank)
    totals: dict[tuple[int, int], float] = {}
    for replica in range(len(replicas)):
        items = plan.items(replica, num_requests)
        for item, weight in zip(items, plan.weights(replica, num_requests), strict=True):
            share = weight / len(items) / len(replicas)
            totals[item] = totals.get(item, 0.0) + share
    count = (max(data_rank) + 1) * num_requests
    assert len(totals) == count
    assert all(abs(total - 1 / count) < 1e-12 for total in totals.values())
