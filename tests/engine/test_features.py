"""Features of a network's blocks, and losses on them, under every layout against diffusers' Wan."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.engine.role import FeatureLoss
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests import seeds
from tests.engine import cases

SP = ParallelDims(tp_size=2, sequence_parallel=True)
PP2 = ParallelDims(pp_size=2)
VPP = ParallelDims(pp_size=2, virtual_pp_size=2)
LAYOUTS = {
    "single": (1, ParallelDims()),
    "tp2": (2, ParallelDims(tp_size=2)),
    "tp2_sp": (2, SP),
    "cp2": (2, ParallelDims(cp_size=2)),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, VPP),
    "tp2_pp2": (4, ParallelDims(tp_size=2, pp_size=2)),
    "tp2_sp_cp2": (4, ParallelDims(tp_size=2, sequence_parallel=True, cp_size=2)),
}
SIZES = [(3, 2, 10), (1, 4, 6), (2, 2, 6)]
"""15, 6 and 6 tokens: padded under SP and CP; three micro-batches: one is padded under VPP."""
HIDDEN = 32
BLOCK_SETS = {"all": (3, 0, 1, 2), "first": (0,), "middle": (2, 1, 2), "last": (3,)}


def requests() -> list[Request]:
    return [cases.make_requests(i, 1, size=size)[0] for i, size in enumerate(SIZES)]


class Heads(torch.nn.Module):
    """One small judge a block: a convolution over space and time, and a nonlinearity."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.nn.ParameterList(
            torch.randn(2, HIDDEN, 1, 1, 3, generator=generator) * 0.2 for _ in range(4)
        )

    def forward(self, place: int, feature_BDTHW: Tensor, request: Request) -> Tensor:
        assert feature_BDTHW.dtype == torch.float32
        logits = torch.nn.functional.conv3d(feature_BDTHW, self.weights[place], padding=(0, 0, 1))
        scale = 1 + request.timestep.view(-1, 1) / 1000
        return torch.nn.functional.softplus(-logits.tanh().mean((2, 3, 4)) * scale).mean()


def of_velocity(velocity: Tensor, request: Request) -> dict[str, Tensor]:
    """Not linear in the prediction."""
    return {"loss": (velocity * request.extra["target"]).tanh().mean()}


# -- plain torch ---------------------------------------------------------------------------------
@dataclass
class Expected:
    """Of one request: features of all blocks, losses on them and input gradients."""

    features: list[Tensor] = field(default_factory=list)
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    gradient_with_velocity: Tensor = field(default_factory=lambda: torch.empty(0))


def plain(model: cases.PlainModel, request: Request, blocks: list[int], heads: Heads) -> Expected:
    taken: dict[int, Tensor] = {}
    handles = [
        model.model.blocks[b].register_forward_hook(
            lambda module, args, output, b=b: taken.__setitem__(b, output)
        )
        for b in blocks
    ]
    leaf = request.latents_BCTHW.clone().requires_grad_()
    velocity = model(request.with_(latents_BCTHW=leaf))
    for handle in handles:
        handle.remove()
    frames, height, width = request.latents_BCTHW.shape[2:]
    grid = (frames, height // 2, width // 2)
    features = [taken[b].transpose(1, 2).unflatten(2, grid) for b in blocks]
    losses = torch.stack([heads(i, f, request) for i, f in enumerate(features)])
    (alone,) = torch.autograd.grad(losses.sum(), leaf, retain_graph=True)
    total = losses.sum() + of_velocity(velocity, request)["loss"]
    (both,) = torch.autograd.grad(total, leaf)
    return Expected([f.detach() for f in features], losses.detach(), alone, both)


@functools.cache
def weights() -> cases.Weights:
    return cases.random_weights(seeds.SHARED)


@functools.cache
def reference(name: str) -> tuple[int, list[Expected]]:
    """The heads' seed, and what is expected of each request."""
    seed = seeds.SHARED + 1
    model, blocks = cases.PlainModel(weights()), sorted(set(BLOCK_SETS[name]))
    return seed, [plain(model, request, blocks, Heads(seed)) for request in requests()]


# -- megagen -------------------------------------------------------------------------------------
def in_ranks(
    tensors: cases.Weights,
    dims: ParallelDims,
    data: ParallelDims,
    jobs: dict[str, int],
    settings: dict[str, Any],
) -> dict[str, list[Expected]]:
    """What a role says, for several sets of blocks."""
    role = cases.make_role(tensors, dims, data=data, **settings)
    own, found = requests(), {}
    for name, seed in jobs.items():
        heads = Heads(seed)
        loss = FeatureLoss(BLOCK_SETS[name], heads)
        features = role.features(own, BLOCK_SETS[name])
        alone = role.input_gradient(own, feature_loss=loss)
        losses, loss.losses = loss.losses, []
        both = role.input_gradient(own, of_velocity, feature_loss=loss)
        assert all(torch.equal(a, b) for a, b in zip(losses, loss.losses, strict=True))
        assert all(weight.grad is None for weight in heads.parameters())
        rows = zip(features, losses, alone, both, strict=True)
        found[name] = [Expected(*row) for row in rows]
    if role.trainable:
        buffers = [p.main_grad for chunk in role.chunks for p in chunk.parameters()]
        assert not any(b.any() for b in buffers), "a feature loss reached the weights"
        loss_value, _ = cases.update(role, 0, Mesh.build(data))  # hooks and states are back
        assert loss_value == loss_value
    return found


def check(found: list[dict[str, list[Expected]]], names: list[str]) -> None:
    for rank in found:
        for name in names:
            for ours, expected in zip(rank[name], reference(name)[1], strict=True):
                for a, b in zip(ours.features, expected.features, strict=True):
                    assert a.shape == b.shape and a.dtype == torch.float32 and not a.requires_grad
                    assert cases.relative(a, b) < 1e-5
                assert (ours.losses - expected.losses).abs().max() < 1e-5
                assert cases.relative(ours.gradient, expected.gradient) < 1e-5
                pair = (ours.gradient_with_velocity, expected.gradient_with_velocity)
                assert cases.relative(*pair) < 1e-5


def run(
    num_ranks: int, dims: ParallelDims, data: ParallelDims, names: list[str], **settings: Any
) -> None:
    jobs = {name: reference(name)[0] for name in names}
    found = run_ranks(num_ranks, in_ranks, weights(), dims, data, jobs, settings)
    check(found, names)


@pytest.mark.parametrize("name", LAYOUTS)
def test_features_and_their_gradients_equal_diffusers(name: str) -> None:
    num_ranks, dims = LAYOUTS[name]
    run(num_ranks, dims, dims, list(BLOCK_SETS), trainable=False)


@pytest.mark.parametrize("name", ["tp2_sp_cp2", "tp2_pp2"])
def test_results_come_home_to_another_data_layout(name: str) -> None:
    """Every rank a data rank; the twins of a replica share the work or gather it."""
    num_ranks, dims = LAYOUTS[name]
    run(num_ranks, dims, ParallelDims(), ["middle"], trainable=False)


def test_a_replica_a_rank_where_the_data_is_in_stages() -> None:
    run(2, ParallelDims(), PP2, ["all"], trainable=False)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("name", ["single", "tp2_sp", "pp2_vpp2"])
def test_recomputation_does_not_see_the_taps(name: str, recompute: str) -> None:
    num_ranks, dims = LAYOUTS[name]
    run(num_ranks, dims, dims, ["all", "middle"], trainable=False, recompute=recompute)


def test_a_trainable_role_has_features_and_trains_on() -> None:
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    run(2, PP2, PP2, ["middle"], recompute="full", **overlap)


# -- what is not run -----------------------------------------------------------------------------
def blocks_that_ran(tensors: cases.Weights, dims: ParallelDims) -> tuple[list[int], list[int]]:
    role = cases.make_role(tensors, dims, trainable=False)
    ran: list[int] = []
    for chunk in role.chunks:
        for number, block in chunk.blocks.items():
            block.register_forward_hook(lambda *_, number=number: ran.append(int(number)))
    own = cases.make_requests(0, 2)
    role.features(own, [1])
    forward, ran[:] = sorted(ran), []
    role.input_gradient(own, feature_loss=FeatureLoss([1], lambda i, f, r: f.square().mean()))
    return forward, sorted(ran)


@pytest.mark.parametrize("name", ["single", "pp2", "pp2_vpp2"])
def test_blocks_behind_the_last_one_do_not_run(name: str) -> None:
    num_ranks, dims = LAYOUTS[name]
    found = run_ranks(num_ranks, blocks_that_ran, weights(), dims)
    for kind in range(2):
        assert sorted(b for rank in found for b in rank[kind]) == [0, 0, 1, 1]


def refused(tensors: cases.Weights) -> None:
    role = cases.make_role(tensors, ParallelDims(), trainable=False)
    for blocks in ([], [4], [-1, 2]):
        with pytest.raises(ConfigError, match="4 blocks"):
            role.features(requests(), blocks)
        with pytest.raises(ConfigError, match="4 blocks"):
            role.input_gradient(requests(), feature_loss=FeatureLoss(blocks, Heads(0)))


def test_blocks_that_are_not_there_are_refused() -> None:
    run_ranks(1, refused, weights())
