"""What a role does beside the training pass: predictions, input gradients, accumulation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.engine.role import Role
from megagen.engine.settings import RoleSettings
from megagen.models.base import Request
from megagen.models.wan import WanModel
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests import seeds
from tests.engine import cases

SP = ParallelDims(tp_size=2, sequence_parallel=True)
VPP = ParallelDims(pp_size=2, virtual_pp_size=2)
LAYOUTS = {
    "single": (1, ParallelDims()),
    "tp2": (2, ParallelDims(tp_size=2)),
    "tp2_sp": (2, SP),
    "cp2": (2, ParallelDims(cp_size=2)),
    "cp2_ring": (2, ParallelDims(cp_size=2, cp_comm_type="p2p")),
    "pp2": (2, ParallelDims(pp_size=2)),
    "pp2_vpp2": (2, VPP),
    "tp2_sp_cp2": (4, ParallelDims(tp_size=2, sequence_parallel=True, cp_size=2)),
}
SIZES = [(3, 2, 10), (1, 4, 6), (2, 2, 6)]


def mixed_requests() -> list[Request]:
    """Three micro-batches of different shapes."""
    return [cases.make_requests(i, 1, size=size)[0] for i, size in enumerate(SIZES)]


def feature_loss(velocity: Tensor, request: Request) -> dict[str, Tensor]:
    """Not linear in the prediction."""
    return {"loss": (velocity * request.extra["target"]).tanh().mean()}


@functools.cache
def reference() -> tuple[cases.Weights, list[Tensor], list[Tensor]]:
    """Weights, predictions and input gradients of diffusers' network."""
    weights = cases.random_weights(seeds.SHARED)
    plain = cases.PlainModel(weights)
    predictions, gradients = [], []
    for request in mixed_requests():
        leaf = request.latents_BCTHW.clone().requires_grad_()
        velocity = plain(request.with_(latents_BCTHW=leaf))
        feature_loss(velocity, request)["loss"].backward()
        predictions.append(velocity.detach())
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    return weights, predictions, gradients


def passes(weights: cases.Weights, dims: ParallelDims, data: ParallelDims, **settings: Any) -> Any:
    role = cases.make_role(weights, dims, data=data, **settings)
    before = cases.whole(role, lambda p: p)
    requests = mixed_requests()
    predictions = role.predict(requests)
    gradients = role.input_gradient(requests, feature_loss)
    alone = role.predict(requests[2:])
    if role.trainable:
        assert all(p.requires_grad for chunk in role.chunks for p in chunk.parameters())
        buffers = [p.main_grad for chunk in role.chunks for p in chunk.parameters()]
        assert not any(b.any() for b in buffers), "an input gradient reached the weights"
        loss, _ = cases.update(role, 0, Mesh.build(data))  # the hooks are back in place
        assert loss == loss
        return predictions, gradients, alone
    assert cases.worst(cases.whole(role, lambda p: p), before) == 0
    return predictions, gradients, alone


@pytest.mark.parametrize("name", LAYOUTS)
def test_predictions_and_input_gradients_of_mixed_shapes(name: str) -> None:
    num_ranks, dims = LAYOUTS[name]
    weights, predictions, gradients = reference()
    run = functools.partial(passes, trainable=False)
    check(run_ranks(num_ranks, run, weights, dims, dims), predictions, gradients)


def test_results_come_home_to_another_data_layout() -> None:
    """Four data ranks with the same requests, a network over TP2+SP x CP2."""
    _, dims = LAYOUTS["tp2_sp_cp2"]
    weights, predictions, gradients = reference()
    run = functools.partial(passes, trainable=False)
    check(run_ranks(4, run, weights, dims, ParallelDims()), predictions, gradients)


def test_a_trainable_role_gives_input_gradients_and_trains_on() -> None:
    weights, predictions, gradients = reference()
    options = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    run = functools.partial(passes, **options)
    found = run_ranks(2, run, weights, ParallelDims(pp_size=2), ParallelDims(pp_size=2))
    check(found, predictions, gradients)


def check(found: list[Any], predictions: list[Tensor], gradients: list[Tensor]) -> None:
    for rank_predictions, rank_gradients, alone in found:
        for ours, expected in zip(rank_predictions, predictions, strict=True):
            assert ours.dtype == torch.float32
            assert cases.relative(ours, expected) < 1e-5
        for ours, expected in zip(rank_gradients, gradients, strict=True):
            assert cases.relative(ours, expected) < 1e-5
        assert cases.relative(alone[0], predictions[2]) < 1e-5


# -- what a plugin changes before and behind its network -----------------------------------------
class Peculiar(WanModel):
    """Wants latents halved and predicts the negative velocity, plus what went in."""

    def inputs(self, request: Request) -> Request:
        return request.with_(latents_BCTHW=0.5 * request.latents_BCTHW)

    def velocity(self, prediction_BCTHW: Tensor, request: Request) -> Tensor:
        return request.latents_BCTHW.detach() - prediction_BCTHW


def peculiar_loss(velocity: Tensor, request: Request) -> dict[str, Tensor]:
    """Of the clean latents, so that it must see the caller's request."""
    clean = request.latents_BCTHW - request.timestep.view(-1, 1, 1, 1, 1) / 1000 * velocity
    return {"loss": (clean - request.extra["target"]).square().mean()}


def peculiar(weights: cases.Weights, dims: ParallelDims, schedule: str) -> Any:
    plugin = Peculiar(cases.make_plugin().options)
    settings = RoleSettings("student", dims, optimizer=cases.ADAMW, score_schedule=schedule)
    store = cases.DictStore(weights)
    role = Role.build(plugin, settings, data_layout=Mesh.build(dims), store=store)
    requests = cases.make_requests(0)
    predictions = role.predict(requests)
    gradients = role.input_gradient(requests, peculiar_loss)
    role.zero_grad()
    if schedule == "hold":
        role.forward_score_backward(requests, lambda v: v, lambda v, r, t: peculiar_loss(v, r))
    else:
        role.forward_backward(requests, peculiar_loss)
    return predictions, gradients, role.step().grad_norm


@pytest.mark.parametrize("schedule", ["replay", "hold"])
@pytest.mark.parametrize("dims", [ParallelDims(pp_size=2), SP], ids=["pp2", "tp2_sp"])
def test_losses_see_the_callers_request(dims: ParallelDims, schedule: str) -> None:
    weights, *_ = reference()
    plain = cases.PlainModel(weights)
    predictions, gradients = [], []
    for request in cases.make_requests(0):
        leaf = request.latents_BCTHW.clone().requires_grad_()
        velocity = request.latents_BCTHW - plain(request.with_(latents_BCTHW=0.5 * leaf))
        loss = peculiar_loss(velocity, request)["loss"]
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (loss / cases.NUM_REQUESTS).backward()
        predictions.append(velocity.detach())
        gradients.append(gradient)
    norm = plain.step()
    for ours_v, ours_g, ours_norm in run_ranks(2, peculiar, weights, dims, schedule):
        assert all(cases.relative(a, b) < 1e-5 for a, b in zip(ours_v, predictions, strict=True))
        assert all(cases.relative(a, b) < 1e-5 for a, b in zip(ours_g, gradients, strict=True))
        cases.close([ours_norm], [norm])


# -- several backward passes in one update ------------------------------------------------------
def accumulate(weights: cases.Weights, dims: ParallelDims, **settings: Any) -> Any:
    role = cases.make_role(weights, dims, **settings)
    for step in range(2):
        requests = cases.own_part(cases.make_requests(step), role.mesh)
        half = len(requests) // 2
        role.zero_grad()
        first = role.forward_backward(requests[:half], cases.squared_error, more_to_come=True)
        terms = first + role.forward_backward(requests[half:], cases.squared_error)
        norm = role.step().grad_norm
    return [float(t["loss"]) for t in terms], norm


@pytest.mark.parametrize("name", ["dp2", "dp2_overlap", "pp2"])
def test_two_backward_passes_add_up(name: str) -> None:
    weights, *_ = reference()
    dims = ParallelDims(pp_size=2) if name == "pp2" else ParallelDims()
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    options = overlap if name == "dp2_overlap" else {}
    plain = cases.PlainModel(weights)
    for step in range(2):
        requests = cases.make_requests(step)
        losses = [cases.squared_error(plain(r), r)["loss"] for r in requests]
        # each pass is a mean over its own half, so together they are twice the mean
        (2 * sum(losses) / len(losses)).backward()
        norm = plain.step()
    found = run_ranks(2, functools.partial(accumulate, **options), weights, dims)
    for _, rank_norm in found:
        assert abs(rank_norm - norm) < 1e-5 * norm
    ours = found[0][0] if name == "pp2" else found[0][0] + found[1][0]
    cases.close(ours, [float(loss.detach()) for loss in losses])


def test_virtual_stages_say_which_counts_they_take() -> None:
    weights, *_ = reference()
    found = run_ranks(2, odd_count, weights)
    assert all("3 micro-batches" in message and "pp_size 2" in message for message in found)


def odd_count(weights: cases.Weights) -> str:
    role = cases.make_role(weights, VPP)
    role.zero_grad()
    with pytest.raises(ConfigError) as error:
        role.forward_backward(cases.make_requests(0)[:3], cases.squared_error)
    return str(error.value)
