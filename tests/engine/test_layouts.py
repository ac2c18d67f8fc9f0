"""Five updates under each layout against a plain torch loop over diffusers' own network."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests import seeds
from tests.engine import cases

NUM_STEPS = 5
TP2 = {"tp_size": 2}
SP = {**TP2, "sequence_parallel": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "single": (1, {}, {}),
    "tp2": (2, TP2, {}),
    "tp2_sp": (2, SP, {}),
    "tp2_sp_recompute": (2, SP, {"recompute": "full"}),
    "cp2_a2a": (2, {"cp_size": 2}, {}),
    "cp2_all_gather": (2, {"cp_size": 2, "cp_comm_type": "all_gather"}, {}),
    "cp2_ring": (2, {"cp_size": 2, "cp_comm_type": "p2p"}, {}),
    "cp4_a2a_ring": (4, {"cp_size": 4, "cp_comm_type": "a2a+p2p", "cp_a2a_size": 2}, {}),
    "pp2": (2, {"pp_size": 2}, {}),
    "pp2_uneven": (2, {"pp_size": 2, "pipeline_layers": (3, 1)}, {"recompute": "selective"}),
    "pp2_vpp2": (2, {"pp_size": 2, "virtual_pp_size": 2}, {}),
    "dp2": (2, {}, {}),
    "dp2_overlap": (2, {}, OVERLAP),
    "dp2_plain_optimizer": (2, {}, {"use_distributed_optimizer": False}),
    "tp2_pp2": (4, {**TP2, "pp_size": 2}, {}),
    "tp2_sp_pp2_vpp2": (4, {**SP, "pp_size": 2, "virtual_pp_size": 2}, {"recompute": "full"}),
    "tp2_cp2": (4, {**TP2, "cp_size": 2}, {}),
    "tp2_sp_cp2_ring": (4, {**SP, "cp_size": 2, "cp_comm_type": "p2p"}, {}),
    "cp2_dp2_overlap": (4, {"cp_size": 2}, OVERLAP),
    "pp2_dp2_vpp2_overlap": (4, {"pp_size": 2, "virtual_pp_size": 2}, OVERLAP),
}


@functools.cache
def reference() -> tuple[Any, Any]:
    """Fresh weights and the plain loop's curve from them."""
    weights = cases.random_weights(seeds.SHARED)
    return weights, cases.plain_curve(weights, NUM_STEPS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_five_updates_equal_a_plain_loop(name: str) -> None:
    num_ranks, dims, options = LAYOUTS[name]
    settings = dict(options)
    if "use_distributed_optimizer" in settings:
        is_distributed = settings.pop("use_distributed_optimizer")
        fields = {**cases.ADAMW.__dict__, "use_distributed_optimizer": is_distributed}
        settings["optimizer"] = type(cases.ADAMW)(**fields)
    weights, (losses, norms, final) = reference()
    found = run_ranks(
        num_ranks,
        functools.partial(cases.curve, **settings),
        weights,
        ParallelDims(**dims),
        NUM_STEPS,
    )
    for rank_losses, rank_norms, _ in found:
        cases.close(rank_losses, losses)
        cases.close(rank_norms, norms)
    assert cases.worst(cases.merge([part for _, _, part in found]), final) < 1e-4
