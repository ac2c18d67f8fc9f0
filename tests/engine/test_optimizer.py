"""Schedules, skipped updates, the moving average, bf16."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.optimization import get_scheduler
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.engine.lr import factor, parse_step_rules
from megagen.engine.settings import EMASettings, OptimizerSettings
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests import seeds
from tests.engine import cases

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


# -- learning rates -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind",
    ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_are_those_of_diffusers(kind: Any, warmup: int) -> None:
    settings = OptimizerSettings(
        learning_rate=3e-3,
        lr_scheduler=kind,
        lr_warmup_steps=warmup,
        lr_num_cycles=2,
        lr_power=1.7,
        total_steps=15,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    options = {"num_cycles": 2, "power": 1.7}
    expected = get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=15, **options
    )
    for step in range(20):
        assert factor(settings, step) * 3e-3 == pytest.approx(expected.get_last_lr()[0], abs=1e-12)
        if step == 14 and kind == "cosine":
            break  # diffusers' cosine rises again behind its end
        optimizer.step()
        expected.step()


def test_cosine_with_a_floor_and_piecewise_rules() -> None:
    floor = OptimizerSettings(
        learning_rate=1.0, lr_scheduler="cosine_with_min_lr", min_lr_ratio=0.0, total_steps=10
    )
    assert factor(floor, 10) == 0.0
    assert factor(dataclasses.replace(floor, min_lr_ratio=0.3), 9) == 0.3
    steps = OptimizerSettings(
        learning_rate=1.0, lr_scheduler="piecewise_constant", lr_step_rules="1:3,0.1:5,0.01"
    )
    assert [factor(steps, s) for s in range(7)] == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    with pytest.raises(ConfigError, match="lr_step_rules"):
        parse_step_rules("1:3,oops")


def scheduled(weights: cases.Weights) -> list[float]:
    settings = dataclasses.replace(cases.ADAMW, lr_scheduler="linear", lr_warmup_steps=2)
    role = cases.make_role(weights, ParallelDims(), optimizer=settings)
    rates = []
    for step in range(4):
        role.zero_grad()
        role.forward_backward(cases.make_requests(step)[:1], cases.squared_error)
        rates.append(role.step().learning_rate)
    return rates


def test_the_rate_used_is_the_schedules() -> None:
    (rates,) = run_ranks(1, scheduled, cases.random_weights(1))
    assert rates == [0.0, 0.005, 0.01, 0.01 * (1 - 1 / 98)]


# -- updates that are skipped -------------------------------------------------------------------
def everything(role: Any) -> list[Tensor]:
    """Weights, masters, moments and average of this rank."""
    role.sync_weights()
    found = [p for chunk in role.chunks for p in chunk.parameters()]
    found += [master.values for master in role.optimizer.masters()]
    for part in role.optimizer._parts():
        for state in part.optimizer.state.values():
            found += [v for v in state.values() if isinstance(v, Tensor)]
    found += role.ema._shards
    return [tensor.detach().clone() for tensor in found]


def skip(weights: cases.Weights, dims: ParallelDims, poison: str, **settings: Any) -> Any:
    role = cases.make_role(weights, dims, ema=EMASettings(0.9), **settings)
    cases.update(role, 0)
    before, updates = everything(role), role.num_updates
    steps = [g.get("step") for g in role.optimizer._groups()]

    def poisoned(velocity: Tensor, request: Request) -> dict[str, Tensor]:
        terms = cases.squared_error(velocity, request)
        if poison == "gradient":
            terms["loss"] = terms["loss"] * torch.where(velocity > 1e9, velocity, torch.nan).mean()
        elif poison == "loss":
            terms["other"] = torch.tensor(torch.inf)
        return terms

    own = cases.own_part(cases.make_requests(1), role.mesh)
    role.zero_grad()
    # one rank's share of the data is bad
    is_bad = role.mesh.dp_rank == role.mesh.dp_size - 1
    role.forward_backward(own, poisoned if is_bad else cases.squared_error)
    info = role.step()
    assert info.skipped and role.num_updates == updates
    assert steps == [g.get("step") for g in role.optimizer._groups()]
    after = everything(role)
    assert len(before) == len(after) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return cases.update(role, 2)


@pytest.mark.parametrize("poison", ["gradient", "loss"])
@pytest.mark.parametrize(
    ("num_ranks", "dims", "settings"),
    [
        (1, ParallelDims(), {}),
        (2, ParallelDims(), OVERLAP),
        (2, ParallelDims(pp_size=2), {}),
        (2, ParallelDims(tp_size=2), {}),
    ],
    ids=["single", "dp2_overlap", "pp2", "tp2"],
)
def test_a_bad_micro_batch_changes_nothing_anywhere(
    num_ranks: int, dims: ParallelDims, settings: dict[str, Any], poison: str
) -> None:
    weights = cases.random_weights(seeds.fresh())
    found = run_ranks(num_ranks, functools.partial(skip, **settings), weights, dims, poison)
    plain = cases.PlainModel(weights)
    for step in (0, 2):  # as if the bad step had not been
        requests = cases.make_requests(step)
        loss = sum(cases.squared_error(plain(r), r)["loss"] for r in requests) / len(requests)
        loss.backward()
        norm = plain.step()
    for rank_loss, rank_norm in found:
        cases.close([rank_loss, rank_norm], [float(loss.detach()), norm])


# -- the moving average -------------------------------------------------------------------------
def averaged(weights: cases.Weights, dims: ParallelDims, **settings: Any) -> Any:
    role = cases.make_role(weights, dims, ema=EMASettings(0.8, start_step=1), **settings)
    for step in range(3):
        cases.update(role, step)
    role.sync_weights()
    trained = cases.whole(role, lambda p: p)
    with role.ema.swapped():
        average = cases.whole(role, lambda p: p)
        predicted = role.predict(cases.own_part(cases.make_requests(9), role.mesh))
    assert cases.worst(cases.whole(role, lambda p: p), trained) == 0
    return average, predicted, cases.update(role, 3)


AVERAGED = {
    "single": (1, ParallelDims(), {}),
    "dp2": (2, ParallelDims(), {}),
    "dp2_overlap": (2, ParallelDims(), OVERLAP),
    "cp2": (2, ParallelDims(cp_size=2), {}),
    "pp2": (2, ParallelDims(pp_size=2), {}),
    "tp2_sp_dp2": (4, ParallelDims(tp_size=2, sequence_parallel=True), {}),
    "plain": (
        1,
        ParallelDims(),
        {"optimizer": dataclasses.replace(cases.ADAMW, use_distributed_optimizer=False)},
    ),
}


@functools.cache
def averaged_reference() -> Any:
    weights = cases.random_weights(seeds.SHARED)
    plain = cases.PlainModel(weights)
    shadow = copy.deepcopy(plain.weights())
    for step in range(4):
        requests = cases.make_requests(step)
        loss = sum(cases.squared_error(plain(r), r)["loss"] for r in requests) / len(requests)
        loss.backward()
        if step == 3:
            break
        plain.step()
        decay = 0.8 if step >= 1 else 0.0
        shadow = {n: decay * a + (1 - decay) * plain.weights()[n] for n, a in shadow.items()}
    last = float(loss.detach()), plain.step()
    plain.model.load_state_dict(shadow)
    with torch.no_grad():
        predicted = [plain(r) for r in cases.make_requests(9)]
    return weights, shadow, predicted, last


@pytest.mark.parametrize("name", AVERAGED)
def test_average_of_weights(name: str) -> None:
    num_ranks, dims, settings = AVERAGED[name]
    weights, shadow, predicted, last = averaged_reference()
    found = run_ranks(num_ranks, functools.partial(averaged, **settings), weights, dims)
    assert cases.worst(cases.merge([average for average, _, _ in found]), shadow) < 1e-4
    assert cases.relative(found[0][1][0], predicted[0]) < 1e-4
    for _, _, point in found:
        cases.close(point, last)


# -- bf16 ---------------------------------------------------------------------------------------
def half_precision(weights: cases.Weights, dims: ParallelDims, **settings: Any) -> Any:
    role = cases.make_role(weights, dims, precision="bf16", ema=EMASettings(0.5), **settings)
    chunk = role.chunks[0]
    assert {p.dtype for p in chunk.parameters()} >= {torch.bfloat16}
    assert all(p.main_grad.dtype == torch.float32 for p in chunk.parameters())
    points = [cases.update(role, step) for step in range(3)]
    masters = [m.values for m in role.optimizer.masters()]
    assert all(m.dtype == torch.float32 for m in masters)
    for master in role.optimizer.masters():  # weights are the rounded masters
        size = master.values.numel()
        part = master.parameter.detach().view(-1)[master.start : master.start + size]
        assert torch.equal(part, master.values.to(part.dtype))
    kept = sum(m.numel() for m in masters)
    counted = torch.tensor(kept)
    dist.all_reduce(counted)
    return points, int(counted)


def test_bf16_keeps_fp32_masters_gradients_and_average() -> None:
    weights = cases.random_weights(5)
    settings = {"optimizer": dataclasses.replace(cases.ADAMW, learning_rate=1e-3)}
    run = functools.partial(half_precision, **settings)
    (points, count), *_ = run_ranks(2, run, weights, ParallelDims())
    assert count == sum(w.numel() for w in weights.values())  # sharded over the two, none twice
    plain = cases.PlainModel(weights, settings["optimizer"])
    for step, (loss, norm) in enumerate(points):
        requests = cases.make_requests(step)
        exact = sum(cases.squared_error(plain(r), r)["loss"] for r in requests) / len(requests)
        exact.backward()
        cases.close([loss, norm], [float(exact.detach()), plain.step()], tolerance=0.03)
