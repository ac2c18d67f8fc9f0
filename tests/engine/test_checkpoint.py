"""State saved under one layout and read under another goes on as if nothing had been."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
from megatron.core import dist_checkpointing

from megagen.engine.settings import EMASettings
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests import seeds
from tests.engine import cases

HALF, NUM_STEPS = 2, 4
SETTINGS: dict[str, Any] = {
    "ema": EMASettings(0.7),
    "optimizer": dataclasses.replace(
        cases.ADAMW, lr_scheduler="linear", lr_warmup_steps=1, total_steps=6
    ),
}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, ParallelDims, dict[str, Any]]] = {
    "single": (1, ParallelDims(), {}),
    "tp2": (2, ParallelDims(tp_size=2), {}),
    "pp2": (2, ParallelDims(pp_size=2), {}),
    "dp2": (2, ParallelDims(), OVERLAP),
    "pp2_vpp2": (2, ParallelDims(pp_size=2, virtual_pp_size=2), {}),
    "tp2_sp_cp2": (4, ParallelDims(tp_size=2, sequence_parallel=True, cp_size=2), {}),
}


def train_and_save(weights: cases.Weights, directory: Path, name: str) -> Any:
    _, dims, options = LAYOUTS[name]
    role = cases.make_role(weights, dims, **SETTINGS, **options)
    points = [cases.update(role, step) for step in range(HALF)]
    dist_checkpointing.save({"student": role.sharded_state()}, str(directory))
    return points


def load_and_train(weights: cases.Weights, directory: Path, name: str) -> Any:
    _, dims, options = LAYOUTS[name]
    role = cases.make_role(weights, dims, **SETTINGS, **options)
    wanted = {"student": role.sharded_state(is_loading=True)}
    role.load_state(dist_checkpointing.load(wanted, str(directory))["student"])
    assert role.num_updates == HALF
    points = [cases.update(role, step) for step in range(HALF, NUM_STEPS)]
    with role.ema.swapped():
        return points, cases.whole(role, lambda p: p)


def uninterrupted(weights: cases.Weights) -> Any:
    role = cases.make_role(weights, ParallelDims(), **SETTINGS)
    points = [cases.update(role, step) for step in range(NUM_STEPS)]
    with role.ema.swapped():
        return points, cases.whole(role, lambda p: p)


@functools.cache
def reference() -> tuple[cases.Weights, Any]:
    weights = cases.random_weights(seeds.SHARED)
    return weights, run_ranks(1, uninterrupted, weights)[0]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("single", "single"),
        ("tp2", "single"),
        ("pp2", "tp2"),
        ("dp2", "single"),
        ("single", "dp2"),
        ("pp2_vpp2", "tp2_sp_cp2"),
    ],
)
def test_resume_under_another_layout(tmp_path: Path, saved: str, loaded: str) -> None:
    weights, (points, average) = reference()
    folder = tmp_path / "state"
    folder.mkdir()
    first = run_ranks(LAYOUTS[saved][0], train_and_save, weights, folder, saved)
    other = cases.random_weights(1)  # what is not loaded would show
    second = run_ranks(LAYOUTS[loaded][0], load_and_train, other, folder, loaded)
    for rank_first in first:
        for rank_second, _ in second:
            for found, expected in zip(rank_first + rank_second, points, strict=True):
                cases.close(found, expected)
    assert cases.worst(cases.merge([part for _, part in second]), average) < 1e-4
    if saved == loaded:
        assert first[0] + second[0][0] == points
        assert cases.worst(second[0][1], average) == 0
