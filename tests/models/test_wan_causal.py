"""Causal Wan's whole-video passes against diffusers' blocks under an explicit mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.registry import resolve
from megagen.models import MODELS
from megagen.models.base import Request
from megagen.models.wan import WanModel
from megagen.models.wan_causal import WanCausalModel
from megagen.models.wan_causal.options import CausalOptions
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests.engine import cases
from tests.models.wan_causal_cases import Reference, Rule, make_plugin, make_request, make_role

RULES = {
    "chunks": Rule(3),
    "frames": Rule(1),
    "first_alone": Rule(2, first_alone=True),
    "window": Rule(2, window=3),
    "window_first_alone": Rule(3, first_alone=True, window=4),
    "sink": Rule(2, window=4, sink=1),
    "sink_of_two": Rule(1, window=3, sink=2),
    "relative": Rule(2, window=4, sink=1, is_relative=True),
    "relative_first_alone": Rule(2, first_alone=True, window=5, sink=2, is_relative=True),
}
SINK = RULES["sink"]
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
SP = {"tp_size": 2, "sequence_parallel": True}


def run(
    weights: cases.Weights,
    rule: Rule,
    layout: dict[str, Any],
    requests: list[Request],
    settings: dict[str, Any],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """In a rank: predictions, and gradients of this rank's stages."""
    role = make_role(weights, rule, ParallelDims(**layout), **settings)
    predictions = role.predict(requests)
    role.zero_grad()
    role.forward_backward(requests, cases.squared_error)
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(role._ddp, None, pg_collection=role.mesh.pg)
    return predictions, cases.whole(role, lambda p: p.main_grad)


def reference(
    weights: cases.Weights, rule: Rule, requests: list[Request]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    model = Reference(weights, rule)
    predictions = []
    for request in requests:
        velocity = model(request)
        (cases.squared_error(velocity, request)["loss"] / len(requests)).backward()
        predictions.append(velocity.detach())
    return predictions, model.gradients()


def requests_of(generator: torch.Generator, *, has_clean: bool = True) -> list[Request]:
    """One plain, of 7 frames, and one teacher-forced; no count of frames or tokens comes even."""
    return [
        make_request(generator, 7),
        make_request(generator, 5 if has_clean else 7, batch=1, has_clean=has_clean),
    ]


def check(found: list[Any], expected: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    for predictions, _ in found:
        for ours, theirs in zip(predictions, expected[0], strict=True):
            assert cases.relative(ours, theirs) <= 1e-5
    gradients: dict[str, Tensor] = {}
    for _, own in found:
        gradients |= own
    assert cases.worst_gradient(gradients, expected[1]) <= 1e-4


@pytest.mark.parametrize("name", RULES)
def test_equals_diffusers_blocks_under_a_mask(name: str, seeded: torch.Generator) -> None:
    weights, requests = cases.random_weights(seeded.initial_seed()), requests_of(seeded)
    found = run_ranks(1, run, weights, RULES[name], {}, requests, {})
    check(found, reference(weights, RULES[name], requests))


LAYOUTS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"tp_size": 2}, "relative", FULL),
    (SP, "sink", SELECTIVE),
    ({"cp_size": 2}, "relative", SELECTIVE),
    ({"cp_size": 2, "cp_comm_type": "all_gather"}, "sink", FULL),
    ({"pp_size": 2}, "relative", FULL),
    ({"pp_size": 2, "virtual_pp_size": 2}, "sink", {}),
    ({**SP, "pp_size": 2}, "sink", FULL),
    ({**SP, "cp_size": 2}, "relative", {}),
]


@pytest.mark.parametrize(("layout", "name", "settings"), LAYOUTS)
def test_layouts(
    layout: dict[str, Any], name: str, settings: dict[str, Any], seeded: torch.Generator
) -> None:
    weights, requests = cases.random_weights(seeded.initial_seed()), requests_of(seeded)
    num_ranks = ParallelDims(**layout).model_parallel_size
    found = run_ranks(num_ranks, run, weights, RULES[name], layout, requests, settings)
    check(found, reference(weights, RULES[name], requests))


def test_more_ranks_than_tokens(seeded: torch.Generator) -> None:
    """A rank whose queries are all padding still takes part in the exchange of gradients."""
    weights = cases.random_weights(seeded.initial_seed())
    requests = [make_request(seeded, 3)]
    layout = {"cp_size": 4, "cp_comm_type": "all_gather"}  # 9 tokens: 3, 3, 3, 0
    found = run_ranks(4, run, weights, RULES["frames"], layout, requests, {})
    check(found, reference(weights, RULES["frames"], requests))


def test_recompute_changes_no_bit(seeded: torch.Generator) -> None:
    weights, requests = cases.random_weights(seeded.initial_seed()), requests_of(seeded)
    ((plain, gradients),) = run_ranks(1, run, weights, RULES["relative"], {}, requests, {})
    for settings in (FULL, SELECTIVE):
        ((found, again),) = run_ranks(1, run, weights, RULES["relative"], {}, requests, settings)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
        assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def one_block(weights: cases.Weights, request: Request) -> tuple[Tensor, Tensor]:
    (causal,) = make_role(weights, Rule(3), ParallelDims()).predict([request])
    (plain,) = cases.make_role(weights, ParallelDims()).predict([request])
    return causal, plain


def test_one_block_is_the_bidirectional_wan(seeded: torch.Generator) -> None:
    weights = cases.random_weights(seeded.initial_seed())
    ((causal, plain),) = run_ranks(1, one_block, weights, make_request(seeded, 3))
    assert torch.equal(causal, plain)


# -- the plugin ------------------------------------------------------------------------------------
def test_blocks_cover_the_video() -> None:
    plugin = make_plugin(Rule(3, first_alone=True))
    assert plugin.blocks(6) == [range(0, 1), range(1, 4), range(4, 6)]
    assert plugin.blocks(5, start=4) == [range(4, 7), range(7, 9)]
    assert make_plugin(Rule(3)).blocks(1) == [range(0, 1)]


def test_flops_count_what_is_seen() -> None:
    shape = (2, 3, 7, 2, 6)
    plain = WanModel(WanModel.Options(architecture=cases.ARCH))
    assert make_plugin(Rule(7)).flops(shape, 5) == plain.flops(shape, 5)
    seen = sum(len(SINK.seen(frame, 7)) for frame in range(7)) * 3 * 3
    less = 2 * 2 * 4 * 32 * (21 * 21 - seen)
    assert plain.flops(shape, 5) - make_plugin(SINK).flops(shape, 5) == pytest.approx(less)


def test_a_checkpoint_says_how_it_is_causal(tmp_path: Path) -> None:
    plugin = make_plugin(RULES["relative"])
    config = plugin.diffusers_config()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        WanTransformer3DModel.from_config(config)
    found = WanCausalModel(WanCausalModel.Options(init_from=str(tmp_path)))
    assert found.window == plugin.window
    changed = WanCausalModel.Options(init_from=str(tmp_path), sink_size=0)
    assert WanCausalModel(changed).window.sink_size == 0
    assert WanModel(WanModel.Options(init_from=str(tmp_path))).arch == plugin.arch
    again = WanCausalModel.Options(**plugin.portable_options())
    assert WanCausalModel(again).window == plugin.window
    assert resolve("wan_causal", MODELS) is WanCausalModel
    assert CausalOptions().local_attn_size == -1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"local_attn_size.*is 3.*Give 4 or more"):
        make_plugin(Rule(3, window=3, sink=1))
    with pytest.raises(ConfigError, match="patch_size"):
        make_plugin(Rule(3), patch_size=[2, 2, 2])
    for comm in ("p2p", "a2a+p2p"):
        dims = ParallelDims(cp_size=2, cp_comm_type=comm, cp_a2a_size=2)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="cp_comm_type"):
            make_plugin(SINK).check(dims, "models.student.distributed")
