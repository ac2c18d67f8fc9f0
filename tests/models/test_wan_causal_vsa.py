"""Causal Wan with sparse attention: whole videos and rollouts against tiles and masks in torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagen.engine.role import Role
from megagen.engine.settings import RoleSettings
from megagen.models.base import Request
from megagen.models.wan_causal import WanCausalModel
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests.engine import cases, test_kv_cache
from tests.models import vsa_cases
from tests.models.wan_causal_cases import GRID, Masked, Reference, Rule, make_request, rotate

# 1 x 3 tokens a frame; runs of frames that 2 does not divide make tiles that are not all alike
TILE = (2, 1, 2)
VSA = {"sparsity": 0.5, "tile": TILE}
RULES = {
    "chunks": Rule(3),
    "first_alone": Rule(2, first_alone=True),
    "relative": Rule(3, first_alone=True, window=6, sink=2, is_relative=True),
}


def weights_of(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        **cases.random_weights(generator.initial_seed()),
        **vsa_cases.make_gates(cases.ARCH, generator),
    }


def make_role(weights: cases.Weights, rule: Rule, layout: dict[str, Any], **settings: Any) -> Role:
    """In a rank: a sparse causal role."""
    keys = {**cases.ARCH, "latents_mean": None, "latents_std": None}
    options = WanCausalModel.Options(architecture=keys, vsa=VSA, **rule.options)
    optimizer = replace(cases.ADAMW, use_distributed_optimizer=False)
    dims = ParallelDims(**layout)
    return Role.build(
        WanCausalModel(options),
        RoleSettings(name="student", dims=dims, optimizer=optimizer, **settings),
        data_layout=Mesh.build(dims),
        store=cases.DictStore(weights),
    )


@dataclass(frozen=True)
class SparseMasked(Masked):
    """diffusers' attention processor: block after block of queries, each with tiles of its keys.

    Args:
        gate: weight and bias.
    """

    gate: tuple[Tensor, Tensor] = field(default=(torch.empty(0), torch.empty(0)))

    def __call__(self, attn: Any, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden))
        given = (q, k, attn.to_v(hidden), F.linear(hidden, *self.gate))
        size, total = GRID[0] * GRID[1], hidden.size(1) // (GRID[0] * GRID[1])
        # [B, frames, tokens of a frame, N, K]
        q, k, v, gate = (x.unflatten(-1, (attn.heads, -1)).unflatten(1, (-1, size)) for x in given)
        if self.stops:
            clean = self.num_frames
            k, v = (torch.cat([x[:, :clean].detach(), x[:, clean:]], dim=1) for x in (k, v))
        out = []
        for _, block in itertools.groupby(range(total), key=self.half_and_block):
            own = list(block)
            frames, where, _ = self.visible(own[0])
            places = torch.tensor([self.visible(f)[2] for f in own]).double()
            turned_q = rotate(q[:, own].flatten(1, 2), places)
            turned_k = rotate(k[:, frames].flatten(1, 2), torch.tensor(where).double())
            tensors = (turned_q, turned_k, v[:, frames].flatten(1, 2), gate[:, own].flatten(1, 2))
            found = vsa_cases.sparse(
                *(x.transpose(1, 2) for x in tensors),
                vsa_cases.tiles([len(own)], *GRID, TILE),
                vsa_cases.tiles(self.key_runs(frames), *GRID, TILE),
                VSA["sparsity"],
            )
            out.append(found.transpose(1, 2))
        return attn.to_out[0](torch.cat(out, dim=1).flatten(2))

    def half_and_block(self, query: int) -> tuple[int, int]:
        """What is made together."""
        return query // self.num_frames, self.rule.block(query % self.num_frames)

    def key_runs(self, frames: list[int]) -> list[int]:
        """Lengths of the runs of neighbours that were made together."""
        runs = [1]
        for before, after in itertools.pairwise(f % self.num_frames for f in frames):
            if after == before + 1 and self.rule.block(after) == self.rule.block(before):
                runs[-1] += 1
            else:
                runs.append(1)
        return runs


class SparseReference(Reference):
    """diffusers' Wan with ``SparseMasked`` self-attention."""

    def __init__(self, weights: cases.Weights, rule: Rule, *, stops: bool = False) -> None:
        self.gates = {n: w.clone().requires_grad_() for n, w in weights.items() if "gate" in n}
        super().__init__({n: w for n, w in weights.items() if "gate" not in n}, rule, stops=stops)

    def __call__(self, request: Request) -> Tensor:
        for i, block in enumerate(self.model.blocks):
            own = [self.gates[f"blocks.{i}.to_gate_compress.{k}"] for k in ("weight", "bias")]
            block.attn1.set_processor = _with_gate(block.attn1, (own[0], own[1]))
        return super().__call__(request)

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | {n: g.grad.clone() for n, g in self.gates.items()}


def _with_gate(attention: Any, gate: tuple[Tensor, Tensor]) -> Any:
    """Take the reference's ``Masked`` as ``SparseMasked``."""

    def set_processor(masked: Masked) -> None:
        parts = (masked.rule, masked.num_frames, masked.has_clean, masked.stops)
        attention.processor = SparseMasked(*parts, gate=gate)

    return set_processor


def whole(
    weights: cases.Weights,
    rule: Rule,
    layout: dict[str, Any],
    requests: list[Request],
    how: dict[str, Any],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """In a rank: predictions of whole videos, and gradients of this rank's stages."""
    return _run(make_role(weights, rule, layout, **how), requests, None)


def streamed(
    weights: cases.Weights, rule: Rule, layout: dict[str, Any], requests: list[Request]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """In a rank: predictions of a rollout, and gradients of all its blocks."""
    role = make_role(weights, rule, layout)
    predictions, kept = test_kv_cache.roll(role, requests)
    return _run(role, kept, predictions)


def _run(
    role: Role, requests: list[Request], predictions: list[Tensor] | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    from megatron.core.distributed import finalize_model_grads

    found = role.predict(requests) if predictions is None else predictions
    role.zero_grad()
    role.forward_backward(requests, cases.squared_error)
    finalize_model_grads(role._ddp, None, pg_collection=role.mesh.pg)
    return found, cases.whole(role, lambda p: p.main_grad.clone())


def reference(
    weights: cases.Weights, rule: Rule, requests: list[Request], *, in_blocks: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Of whole videos, or of the blocks of rollouts."""
    model = SparseReference(weights, rule, stops=in_blocks)
    found = []
    for request in requests:
        velocity = model(request)
        square = (velocity - request.extra["target"]).square()
        numbers = torch.tensor([rule.block(f) for f in range(square.size(2))])
        parts = [square[:, :, numbers == n].mean() for n in numbers.unique()]
        loss = torch.stack(parts).mean() if in_blocks else square.mean()
        (loss / len(requests)).backward()
        found.append(velocity.detach())
    return found, model.gradients()


def check(found: list[Any], expected: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    gradients: dict[str, Tensor] = {}
    for predictions, own in found:
        gradients |= own
        for ours, theirs in zip(predictions, expected[0], strict=True):
            assert cases.relative(ours, theirs) <= 1e-5
    assert cases.worst_gradient(gradients, expected[1]) <= 1e-4


LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((name, {}, {}) for name in RULES),
    ("first_alone", {"tp_size": 2, "cp_size": 2}, {"recompute": "selective"}),
    ("relative", {"pp_size": 2}, {"recompute": "full"}),
]


@pytest.mark.parametrize(("name", "layout", "how"), LAYOUTS)
def test_whole_videos(
    name: str, layout: dict[str, Any], how: dict[str, Any], seeded: torch.Generator
) -> None:
    weights = weights_of(seeded)
    requests = [make_request(seeded, 7), make_request(seeded, 5, batch=1, has_clean=True)]
    ranks = ParallelDims(**layout).model_parallel_size
    found = run_ranks(ranks, whole, weights, RULES[name], layout, requests, how)
    check(found, reference(weights, RULES[name], requests, in_blocks=False))


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, {}) for name in RULES), ("relative", {"cp_size": 2})]
)
def test_streaming_is_the_whole_video(
    name: str, layout: dict[str, Any], seeded: torch.Generator
) -> None:
    weights, requests = weights_of(seeded), test_kv_cache.clips(seeded)
    ranks = ParallelDims(**layout).model_parallel_size
    found = run_ranks(ranks, streamed, weights, RULES[name], layout, requests)
    check(found, reference(weights, RULES[name], requests, in_blocks=True))
