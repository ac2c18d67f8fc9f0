"""What goes wrong silently (or loudly) with megatron-core 0.16.1, each pinned by a test.

The numbers are ours, one a trap. All of it holds on a GPU as well.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from megagen.engine.build import make_config
from megagen.engine.role import Role
from megagen.engine.settings import RoleSettings
from megagen.models.base import Request
from megagen.parallel.comm import copy_to_tp
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests import seeds
from tests.engine import cases

PLAIN = dataclasses.replace(cases.ADAMW, max_grad_norm=0.0, use_distributed_optimizer=False)
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SP = ParallelDims(tp_size=2, sequence_parallel=True)
CP2 = ParallelDims(cp_size=2)
PP2 = ParallelDims(pp_size=2)
VPP = ParallelDims(pp_size=2, virtual_pp_size=2)


@functools.cache
def weights() -> cases.Weights:
    return cases.random_weights(seeds.SHARED)


# -- 1: a gradient that is not contiguous is still summed over TP --------------------------------
def transposed_gradient() -> Tensor:
    x = torch.ones(3, 4, requires_grad=True)
    probe = torch.arange(12.0).view(4, 3) * (dist.get_rank() + 1)
    (copy_to_tp(x, dist.group.WORLD).t() * probe).sum().backward()
    return x.grad


def test_1_copy_to_tp_sums_gradients_that_are_not_contiguous() -> None:
    expected = 3 * torch.arange(12.0).view(4, 3).t()
    assert all(torch.equal(found, expected) for found in run_ranks(2, transposed_gradient))


# -- 2: interleaved stages never exchange in batches ----------------------------------------------
def point_to_point_flags(dims: ParallelDims) -> tuple[bool, bool]:
    config = make_config(cases.make_plugin(), RoleSettings("student", dims))
    return config.overlap_p2p_comm, config.batch_p2p_comm


def test_2_interleaved_stages_overlap_and_do_not_batch() -> None:
    assert point_to_point_flags(VPP) == (True, False)
    assert point_to_point_flags(PP2) == (False, False)


# -- 3, 6, 7, 13: the gradient of every parameter ------------------------------------------------
def gradients(dims: ParallelDims, recompute: Any) -> tuple[dict[str, Tensor], float]:
    role = cases.make_role(weights(), dims, recompute=recompute, optimizer=PLAIN)
    _, norm = cases.update(role, 0)
    return cases.whole(role, lambda p: p.main_grad), norm


@functools.cache
def plain_gradients() -> tuple[dict[str, Tensor], float]:
    plain = cases.PlainModel(weights(), PLAIN)
    for request in cases.make_requests(0):
        (cases.squared_error(plain(request), request)["loss"] / cases.NUM_REQUESTS).backward()
    found = plain.gradients()
    return found, plain.step()


@pytest.mark.parametrize(
    ("dims", "recompute"),
    [
        (PP2, "none"),  # 3: embedders on every stage: summed over stages, counted once in the norm
        (VPP, "none"),
        (SP, "none"),  # 6: parameters that act on token shards: summed over TP
        (CP2, "none"),  # 7: the loss on the whole prediction counts once over CP
        (SP, "full"),  # 1 and 13: what the recomputed block differentiates is its argument
    ],
    ids=["pp2", "vpp2", "sp", "cp2", "sp_recompute"],
)
def test_3_6_7_13_every_parameter_has_its_gradient(dims: ParallelDims, recompute: str) -> None:
    weights()  # one draw for all ranks
    expected, norm = plain_gradients()
    found = run_ranks(2, gradients, dims, recompute)
    assert cases.worst_gradient(cases.merge([part for part, _ in found]), expected) < 1e-5
    for _, rank_norm in found:
        assert abs(rank_norm - norm) < 1e-5 * norm


# -- 4: the optimizer can be resumed without TE or Apex --------------------------------------------
def resumed_steps(folder: Path) -> None:
    role = cases.make_role(weights(), ParallelDims())
    for step in range(3):
        cases.update(role, step)
    dist_checkpointing.save({"student": role.sharded_state()}, str(folder))
    fresh = cases.make_role(weights(), ParallelDims())
    wanted = {"student": fresh.sharded_state(is_loading=True)}
    fresh.load_state(dist_checkpointing.load(wanted, str(folder))["student"])
    groups = [g for g in fresh.optimizer._groups() if g["params"]]
    assert groups and all(g["step"] == 3 and isinstance(g["step"], int) for g in groups)
    for part in fresh.optimizer._parts():
        assert part.optimizer.state
        assert all(s.keys() == {"exp_avg", "exp_avg_sq"} for s in part.optimizer.state.values())
    assert cases.update(role, 3) == cases.update(fresh, 3)


def test_4_a_fresh_optimizer_takes_a_checkpoint_and_its_step(tmp_path: Path) -> None:
    weights()
    run_ranks(2, resumed_steps, tmp_path)


# -- 5: no weight decay on biases, norms and tables -----------------------------------------------
def decayed(is_distributed: bool) -> dict[str, Tensor]:
    optimizer = dataclasses.replace(cases.ADAMW, use_distributed_optimizer=is_distributed)
    role = cases.make_role(weights(), ParallelDims(), optimizer=optimizer)
    role.zero_grad()
    requests = cases.own_part(cases.make_requests(0), role.mesh)
    role.forward_backward(requests, lambda v, r: {"loss": 0 * v.mean()})
    role.step()
    return cases.whole(role, lambda p: p)


@pytest.mark.parametrize("is_distributed", [True, False])
def test_5_a_zero_gradient_shrinks_matrices_and_nothing_else(is_distributed: bool) -> None:
    weights()
    found = run_ranks(2, decayed, is_distributed)[0]
    shrunk = 1 - cases.ADAMW.learning_rate * cases.ADAMW.weight_decay
    names = {"decays": 0, "stays": 0}
    for name, before in weights().items():
        decays = before.ndim > 1 and "table" not in name
        names["decays" if decays else "stays"] += 1
        expected = before * shrunk if decays else before
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=0)
    assert min(names.values()) > 10


# -- 8, 9, 10, 11, 14: groups and configs of their own ---------------------------------------------
def groups_and_configs() -> None:
    from megatron.core import parallel_state

    tp2 = ParallelDims(tp_size=2, pp_size=2)
    student = cases.make_role(weights(), tp2, name="student")
    critic = cases.make_role(weights(), ParallelDims(cp_size=2), data=tp2, name="critic")
    assert parallel_state.get_tensor_model_parallel_world_size() == 1  # none of these is used
    for role in (student, critic):
        pg = role.mesh.pg
        for field in dataclasses.fields(pg):
            assert hasattr(pg, field.name), f"{field.name} is not set"
        assert pg.embd.size() == pg.pos_embd.size() == 1
        assert pg.intra_dist_opt.size() == dist.get_world_size()  # every role on every rank
        assert isinstance(role.config.cp_comm_type, str)
        for chunk in role.chunks:
            linears = [m for m in chunk.modules() if hasattr(m, "tp_group")]
            assert linears and all(m.tp_group is pg.tp for m in linears)
    assert student.config is not critic.config
    for role, other in ((student, critic), (critic, student)):
        assert role.config.no_sync_func.__self__ in role._ddp
        assert role.config.no_sync_func.__self__ not in other._ddp
    assert Mesh.build(tp2) is student.mesh


def test_8_to_11_and_14_roles_have_groups_and_configs_of_their_own() -> None:
    weights()
    run_ranks(4, groups_and_configs)


# -- 12: with overlap every trainable parameter must get a gradient --------------------------------
def untouched() -> list[str]:
    role = cases.make_role(weights(), ParallelDims(), optimizer=PLAIN)
    cases.update(role, 0)
    named = [(n, p) for chunk in role.chunks for n, p in chunk.named_parameters()]
    return [name for name, p in named if not p.main_grad.any()]


def test_12_every_parameter_takes_part() -> None:
    weights()
    assert run_ranks(1, untouched) == [[]]


# -- 12b: gathered weights are waited for where the module that owns them is called ----------------
def uncalled() -> list[str]:
    role = cases.make_role(weights(), ParallelDims())
    called = set()
    owners = {
        name: module
        for chunk in role.chunks
        for name, module in chunk.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    for name, module in owners.items():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    cases.update(role, 0)
    return sorted(owners.keys() - called)


def test_12_every_owner_of_parameters_is_called() -> None:
    weights()
    assert run_ranks(1, uncalled) == [[]]


# -- 15: shapes that vary within one call ----
SIZES = [(3, 2, 10), (1, 4, 6), (2, 2, 6), (3, 2, 4)]


def varied() -> list[Request]:
    return [cases.make_requests(i, 1, size=size)[0] for i, size in enumerate(SIZES)]


def train_on_varied_shapes(dims: ParallelDims, schedule: str) -> tuple[list[float], float]:
    role = cases.make_role(weights(), dims, score_schedule=schedule)
    role.zero_grad()
    if schedule == "hold":
        terms = role.forward_score_backward(
            varied(), lambda v: v, lambda v, r, t: cases.squared_error(v, r)
        )
    else:
        terms = role.forward_backward(varied(), cases.squared_error)
    assert role.config.variable_seq_lengths is False
    norm = role.step().grad_norm
    cases.update(role, 1)  # and of one shape again
    return [float(t["loss"]) for t in terms], norm


@pytest.mark.parametrize(
    ("dims", "schedule"),
    [(PP2, "replay"), (PP2, "hold"), (VPP, "replay")],
    ids=["pp2", "pp2_hold", "vpp2"],
)
def test_15_stages_exchange_tensors_of_any_shape(dims: ParallelDims, schedule: str) -> None:
    plain = cases.PlainModel(weights())
    losses = [cases.squared_error(plain(r), r)["loss"] for r in varied()]
    (sum(losses) / len(losses)).backward()
    norm = plain.step()
    for rank_losses, rank_norm in run_ranks(2, train_on_varied_shapes, dims, schedule):
        cases.close(rank_losses, [float(loss.detach()) for loss in losses])
        cases.close([rank_norm], [norm])


# -- 17: weights are read whole, under names without wrappers --------------------------------------
def weights_after_an_update(options: dict[str, bool]) -> dict[str, Tensor]:
    role = cases.make_role(weights(), ParallelDims(), **options)
    cases.update(role, 0)
    state = role.sharded_state()["model"]["chunk0"]
    assert state and all(name.startswith("student.") for name in state)
    assert all(tensor.key == name and "module." not in name for name, tensor in state.items())
    return {name: tensor.data.detach().clone() for name, tensor in state.items()}


def test_17_a_state_taken_while_weights_are_gathered_is_current() -> None:
    weights()
    plain = run_ranks(2, weights_after_an_update, {})
    overlapped = run_ranks(2, weights_after_an_update, OVERLAP)
    for expected, found in zip(plain, overlapped, strict=True):
        assert cases.worst(found, expected) < 1e-6


# -- 19: the checkpoint writer's helper does not run __main__ again --------------------------------
def results_queue() -> bool:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue = filesystem_async._get_write_results_queue()
    queue.put(dist.get_rank())
    return queue.get() == dist.get_rank()


def test_19_the_writers_queue_needs_no_new_interpreter() -> None:
    assert all(run_ranks(2, results_queue, timeout=20))


# -- 20: nothing reads or moves the global generator -----------------------------------------------
def with_generator(seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    role: Role = cases.make_role(weights(), SP, recompute="full")
    before = torch.get_rng_state()
    role.predict(cases.make_requests(3))
    point = cases.update(role, 0)
    assert torch.equal(torch.get_rng_state(), before)
    return point


def test_20_results_do_not_depend_on_the_global_generator() -> None:
    weights()
    assert run_ranks(2, with_generator, 1) == run_ranks(2, with_generator, 2)
