"""Rollouts on caches against diffusers' blocks over the whole video under an explicit mask."""

from __future__ import annotations

import functools
import gc
import pickle
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megagen.core.errors import ConfigError, DataError
from megagen.engine.kv_cache import CacheRef
from megagen.engine.role import Role
from megagen.models.base import Request
from megagen.models.cache import KVCache
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from megagen.parallel.mesh import Mesh
from tests.engine import cases
from tests.models.wan_causal_cases import (
    Reference,
    Rule,
    frames_of,
    make_plugin,
    make_request,
    make_role,
    whole_video,
)

RULES = {
    "chunks": Rule(3),
    "first_alone": Rule(2, first_alone=True),
    "window": Rule(2, window=3),
    "sink": Rule(2, window=4, sink=1),
    "frames": Rule(1, window=3, sink=2),
    "relative": Rule(2, first_alone=True, window=5, sink=2, is_relative=True),
}
SP = {"tp_size": 2, "sequence_parallel": True}
NUM_FRAMES = 8


def clips(generator: torch.Generator, count: int = 2) -> list[Request]:
    """Noisy frames and the clean ones that the cache is made of."""
    requests = []
    for _ in range(count):
        request = make_request(generator, NUM_FRAMES, has_clean=True)
        request.condition.pop("clean_timestep")  # type: ignore[attr-defined]
        requests.append(request)
    return requests


def roll(role: Role, requests: list[Request]) -> tuple[list[Tensor], list[Request]]:
    """Each clip's velocities, block by block; and the requests of all blocks, with their caches."""
    caches: list[CacheRef | None] = [None] * len(requests)
    parts: list[list[Tensor]] = [[] for _ in requests]
    kept: list[Request] = []
    for block in role.plugin.blocks(NUM_FRAMES):  # type: ignore[attr-defined]
        pairs = list(zip(requests, caches, strict=True))
        noisy = [frames_of(r, block, cache=cache) for r, cache in pairs]
        for found, velocity in zip(parts, role.predict(noisy), strict=True):
            found.append(velocity)
        caches = list(role.extend_cache([clean_part(r, block, cache) for r, cache in pairs]))
        assert [cache.next_frame for cache in caches if cache] == [block.stop] * len(caches)
        kept += noisy
    return [whole_video(found) for found in parts], kept


def clean_part(request: Request, block: range, cache: CacheRef | None) -> Request:
    """The clean frames of a block at timestep 0."""
    clean = request.condition["clean_latents_BCTHW"]
    part = frames_of(request.with_(latents_BCTHW=clean), block, cache=cache)
    return part.with_(timestep=torch.zeros_like(part.timestep))


def run(
    weights: cases.Weights,
    rule: Rule,
    layout: dict[str, Any],
    requests: list[Request],
    settings: dict[str, Any],
    data: dict[str, Any] | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """In a rank: predictions of a rollout, then gradients of all its blocks in one pass."""
    from megatron.core.distributed import finalize_model_grads

    spread = ParallelDims(**(layout if data is None else data))
    role = make_role(weights, rule, ParallelDims(**layout), data=spread, **settings)
    own = cases.own_part(requests, Mesh.build(spread))
    predictions, kept = roll(role, own)
    role.zero_grad()
    role.forward_backward(kept, cases.squared_error)
    finalize_model_grads(role._ddp, None, pg_collection=role.mesh.pg)
    return predictions, cases.whole(role, lambda p: p.main_grad.clone())


def reference(
    weights: cases.Weights, rule: Rule, requests: list[Request]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    model = Reference(weights, rule, stops=True)
    blocks = make_plugin(rule).blocks(NUM_FRAMES)
    predictions = []
    for request in requests:
        velocity = model(request)
        square = (velocity - request.extra["target"]).square()
        losses = [square[:, :, block.start : block.stop].mean() for block in blocks]
        (torch.stack(losses).mean() / len(requests)).backward()
        predictions.append(velocity.detach())
    return predictions, model.gradients()


def check(found: list[Any], expected: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    gradients: dict[str, Tensor] = {}
    for predictions, own in found:
        gradients |= own
        for ours, theirs in zip(predictions, expected[0], strict=True):
            assert cases.relative(ours, theirs) <= 1e-5
    assert cases.worst_gradient(gradients, expected[1]) <= 1e-4


@pytest.mark.parametrize("name", RULES)
def test_a_rollout_equals_the_whole_video_under_a_mask(name: str, seeded: torch.Generator) -> None:
    weights, requests = cases.random_weights(seeded.initial_seed()), clips(seeded)
    found = run_ranks(1, run, weights, RULES[name], {}, requests, {})
    check(found, reference(weights, RULES[name], requests))


LAYOUTS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"tp_size": 2}, "relative", {"score_schedule": "hold"}),
    (SP, "sink", {"recompute": "full"}),
    ({"cp_size": 2}, "relative", {}),
    ({"cp_size": 2, "cp_comm_type": "all_gather"}, "sink", {"recompute": "selective"}),
    ({"pp_size": 2}, "relative", {"recompute": "full"}),
    ({"pp_size": 2, "virtual_pp_size": 2}, "sink", {}),
    ({"tp_size": 2, "pp_size": 2}, "sink", {"recompute": "full"}),
]


@pytest.mark.parametrize(("layout", "name", "settings"), LAYOUTS)
def test_layouts(
    layout: dict[str, Any], name: str, settings: dict[str, Any], seeded: torch.Generator
) -> None:
    weights, requests = cases.random_weights(seeded.initial_seed()), clips(seeded)
    num_ranks = ParallelDims(**layout).model_parallel_size
    found = run_ranks(num_ranks, run, weights, RULES[name], layout, requests, settings)
    check(found, reference(weights, RULES[name], requests))


@pytest.mark.parametrize(
    ("layout", "data"), [(SP, {}), ({"pp_size": 2}, {"cp_size": 2}), ({}, {"tp_size": 2})]
)
def test_a_role_with_a_layout_of_its_own(
    layout: dict[str, Any], data: dict[str, Any], seeded: torch.Generator
) -> None:
    """Two data ranks whose network is spread over both; one data rank with two replicas."""
    weights, requests = cases.random_weights(seeded.initial_seed()), clips(seeded)
    expected, gradients = reference(weights, RULES["sink"], requests)
    found = run_ranks(2, run, weights, RULES["sink"], layout, requests, {}, data)
    if not data:
        assert cases.relative(found[0][0][0], expected[0]) <= 1e-5
        assert cases.relative(found[1][0][0], expected[1]) <= 1e-5
        found = [([], own) for _, own in found]
        expected = []
    check(found, (expected, gradients))


def test_recompute_changes_no_bit(seeded: torch.Generator) -> None:
    weights, requests = cases.random_weights(seeded.initial_seed()), clips(seeded)
    rule = RULES["relative"]
    ((plain, gradients),) = run_ranks(1, run, weights, rule, {}, requests, {})
    for recompute in ("full", "selective"):
        settings = {"recompute": recompute}
        ((found, again),) = run_ranks(1, run, weights, rule, {}, requests, settings)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert all(torch.equal(gradients[name], again[name]) for name in gradients)


# -- the gradient and the memory -------------------------------------------------------------------
def last_block(weights: cases.Weights, request: Request, layout: dict[str, Any]) -> Tensor:
    """In a rank: what the last block's loss gives the noise of every frame."""
    role = make_role(weights, RULES["chunks"], ParallelDims(**layout), recompute="full")
    noise = request.latents_BCTHW.clone().requires_grad_()
    cache = None
    for block in role.plugin.blocks(NUM_FRAMES):  # type: ignore[attr-defined]
        # everything that can carry a gradient does
        last = frames_of(request.with_(latents_BCTHW=noise), block, cache=cache)
        (velocity,) = role.predict([last])
        x0 = last.latents_BCTHW - last.timestep[:, None, :, None, None] / 1000 * velocity
        (cache,) = role.extend_cache([last.with_(latents_BCTHW=x0)])
    role.zero_grad()
    role.forward_backward([last], cases.squared_error)
    return torch.zeros_like(noise) if noise.grad is None else noise.grad


@pytest.mark.parametrize("layout", [{}, {"pp_size": 2}])
def test_no_gradient_reaches_earlier_blocks(
    layout: dict[str, Any], seeded: torch.Generator
) -> None:
    weights, (request,) = cases.random_weights(seeded.initial_seed()), clips(seeded, 1)
    num_ranks = ParallelDims(**layout).model_parallel_size
    gradient = sum(run_ranks(num_ranks, last_block, weights, request, layout))
    assert isinstance(gradient, Tensor)
    assert not gradient[:, :, :6].any()
    assert gradient[:, :, 6:].any(dim=(1, 3, 4)).all()


class PeakBytes(TorchDispatchMode):
    """The most bytes that results of operations held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return out

    def _watch(self, tensor: Tensor) -> None:
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        self.now += 0 if self._users[key] else size
        self.peak = max(self.peak, self.now)
        self._users[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        self.now -= 0 if self._users[key] else size


def saved_and_peak(weights: cases.Weights, request: Request, steps: int) -> tuple[int, int]:
    """In a rank: tensors saved for a backward pass, and the most bytes held, in a rollout."""
    role = make_role(weights, RULES["sink"], ParallelDims())
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 1
        return tensor

    gc.collect()
    cache = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), PeakBytes() as held:
        for block in role.plugin.blocks(NUM_FRAMES):  # type: ignore[attr-defined]
            x = frames_of(request, block)
            for _ in range(steps):
                (velocity,) = role.predict([x.with_(cache=cache)])
                x = x.with_(latents_BCTHW=x.latents_BCTHW - 0.1 * velocity)
            (cache,) = role.extend_cache([x.with_(cache=cache)])
    return saved, held.peak


def test_a_rollout_keeps_no_graph_whatever_its_steps(seeded: torch.Generator) -> None:
    weights, (request,) = cases.random_weights(seeded.initial_seed()), clips(seeded, 1)
    found = [run_ranks(1, saved_and_peak, weights, request, steps)[0] for steps in (2, 6)]
    assert found[0] == found[1]
    assert found[0][0] == 0 and found[0][1] > 0


def cache_sizes(weights: cases.Weights, rule: Rule, request: Request) -> list[tuple[int, int]]:
    """In a rank: frames and bytes held after each block; nothing is held once nothing refers."""
    role = make_role(weights, rule, ParallelDims())
    sizes, ref = [], None
    for block in role.plugin.blocks(NUM_FRAMES):  # type: ignore[attr-defined]
        (ref,) = role.extend_cache([frames_of(request, block, cache=ref)])
        cache = role._delivery._caches.find(ref)
        assert cache is not None
        assert not any(
            t.requires_grad for b in cache.blocks for kv in b.layers.values() for t in kv
        )
        sizes.append((len(cache.frames), cache.num_bytes))
    assert len(role._delivery._caches._alive) == 1, "an older cache is still held"
    del ref, cache
    assert not role._delivery._caches._alive
    return sizes


def test_the_window_bounds_the_cache(seeded: torch.Generator) -> None:
    weights, (request,) = cases.random_weights(seeded.initial_seed()), clips(seeded, 1)
    (sizes,) = run_ranks(1, cache_sizes, weights, RULES["frames"], request)
    frame = 2 * 4 * 3 * cases.BATCH * 32 * 4  # k and v, layers, tokens, batch, hidden, fp32
    # a window of 3 with the block itself in it: two sink frames and nothing else
    assert sizes == [(min(i, 2), min(i, 2) * frame) for i in range(1, NUM_FRAMES + 1)]
    (sizes,) = run_ranks(1, cache_sizes, weights, RULES["chunks"], request)
    assert sizes[-1] == (NUM_FRAMES, NUM_FRAMES * frame)


# -- what is refused, and what a cache means for conditions ----------------------------------------
def refusals(weights: cases.Weights, request: Request) -> None:
    role = make_role(weights, RULES["chunks"], ParallelDims())
    other = make_role(weights, RULES["chunks"], ParallelDims())
    block = range(3)
    (ref,) = role.extend_cache([frames_of(request, block)])
    other.extend_cache([frames_of(request, block)])
    with pytest.raises(ValueError, match="not of this role"):
        other.predict([frames_of(request, block, cache=ref)])
    (again,) = role.predict([frames_of(request, block, cache=pickle.loads(pickle.dumps(ref)))])
    (plain,) = role.predict([frames_of(request, block, cache=ref)])
    assert torch.equal(again, plain)
    with pytest.raises(DataError, match="teacher-forced"):
        role.predict([request.with_(cache=ref)])
    with pytest.raises(ConfigError, match="wan_causal"):
        cases.make_role(weights, ParallelDims()).extend_cache([frames_of(request, block)])


def test_what_cannot_be_is_refused(seeded: torch.Generator) -> None:
    weights, (request,) = cases.random_weights(seeded.initial_seed()), clips(seeded, 1)
    run_ranks(1, functools.partial(refusals, weights, request))


def test_conditions_of_the_whole_video_are_cut_to_the_block(seeded: torch.Generator) -> None:
    plugin = make_plugin(Rule(3), in_channels=3 + 4 + 3)  # image to video
    request = make_request(seeded, 3)
    still = torch.randn(2, 3, 9, 2, 6, generator=seeded)
    request = request.with_(condition={**request.condition, "condition_latents_BCTHW": still})
    for start in (0, 3, 6):
        found = plugin.inputs(request.with_(cache=KVCache((), start))).latents_BCTHW
        assert torch.equal(found[:, :3], request.latents_BCTHW)
        assert torch.equal(found[:, 7:], still[:, :, start : start + 3])
        mask = torch.zeros(2, 4, 3, 2, 6)
        mask[:, :, 0] = float(start == 0)
        assert torch.equal(found[:, 3:7], mask)
    with pytest.raises(DataError, match="frames 7 to 9"):
        plugin.inputs(request.with_(cache=KVCache((), 7)))


def test_a_given_first_frame_is_that_of_the_first_block(seeded: torch.Generator) -> None:
    plugin = make_plugin(Rule(3))
    plugin.expand_timesteps = True
    request = make_request(seeded, 3)
    first = torch.randn(2, 3, 1, 2, 6, generator=seeded)
    request = request.with_(condition={**request.condition, "first_frame_latents_BCTHW": first})
    begun = plugin.inputs(request)
    assert torch.equal(begun.latents_BCTHW[:, :, :1], first)
    assert not begun.timestep[:, 0].any()
    later = plugin.inputs(request.with_(cache=KVCache((), 3)))
    assert torch.equal(later.latents_BCTHW, request.latents_BCTHW)
    assert torch.equal(later.timestep, request.timestep)
