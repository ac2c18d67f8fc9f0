"""Whole runs of ``megagen train``: the same numbers under every layout, after every resume.

The reference of the first test is a plain torch loop over diffusers' own class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from megagen.core.errors import CheckpointError
from tests.trainer.synthetic import config_tree, write_config, write_dataset

LAYOUTS = {
    "tp2": (2, {"tp_size": 2}),
    "tp2_sp": (2, {"tp_size": 2, "sequence_parallel": True}),
    "cp2": (2, {"cp_size": 2}),
    "cp2_all_gather": (2, {"cp_size": 2, "cp_comm_type": "all_gather"}),
    "cp2_ring": (2, {"cp_size": 2, "cp_comm_type": "p2p"}),
    "pp2": (2, {"pp_size": 2}),
    "pp2_vpp2": (2, {"pp_size": 2, "virtual_pp_size": 2}),
    "dp2": (2, {}),
    "dp2_overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "dp2_plain": (2, {"use_distributed_optimizer": False}),
    "tp2_pp2": (4, {"tp_size": 2, "pp_size": 2}),
    "tp2_cp2": (4, {"tp_size": 2, "cp_size": 2}),
    "cp2_dp2": (4, {"cp_size": 2}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def run(
    data: Path,
    output: Path,
    ranks: int = 1,
    distributed: dict[str, Any] | None = None,
    **dotted: Any,
) -> list[dict[str, float]]:
    """Train and give the lines of metrics.jsonl."""
    tree = config_tree(data, output, distributed=distributed or {})
    file = write_config(output.parent / f"{output.name}.yaml", tree)
    config = load_run_config(file, {k.replace("__", "."): v for k, v in dotted.items()})
    try:
        # always forked: a process group in the test process would outlive the test
        run_training(config, ranks=ranks, fork=True)
    except SystemExit as stop:
        pytest.fail(f"the run ended with code {stop.code}")
    return read_metrics(output)


def read_metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(metrics: list[dict[str, float]]) -> list[float]:
    return [m[k] for m in metrics for k in ("loss/total", "grad_norm/student")]


@pytest.fixture(scope="module")
def one_rank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return run(data, tmp_path_factory.mktemp("one") / "run")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_run_under_every_layout(layout: str, data: Path, tmp_path: Path, one_rank) -> None:
    ranks, distributed = LAYOUTS[layout]
    metrics = run(data, tmp_path / "run", ranks, distributed)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert curve(metrics) == pytest.approx(curve(one_rank), rel=1e-5)
    assert one_rank[0]["grad_norm/student"] > 0.5  # the clip acts


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recompute_changes_nothing(kind: str, data: Path, tmp_path: Path, one_rank) -> None:
    metrics = run(data, tmp_path / "run", training__recompute=kind)
    assert curve(metrics) == curve(one_rank)


def test_resume_is_bitwise(data: Path, tmp_path: Path, one_rank) -> None:
    output = tmp_path / "run"
    run(data, output, training__loop__max_train_steps=3)
    metrics = run(data, output)
    assert curve(metrics) == curve(one_rank)
    assert [p.name for p in sorted((output / "checkpoints").iterdir())] == [
        "step_00000003",
        "step_00000005",
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [("tp2_sp", "pp2"), ("pp2_vpp2", "tp2"), ("dp2", "tp2_cp2"), ("cp2_dp2", "dp2_overlap")],
)
def test_resume_under_another_layout(
    first: str, second: str, data: Path, tmp_path: Path, one_rank
) -> None:
    output = tmp_path / "run"
    run(data, output, *LAYOUTS[first], training__loop__max_train_steps=2)
    metrics = run(data, output, *LAYOUTS[second])
    assert curve(metrics) == pytest.approx(curve(one_rank), rel=1e-5)


def test_resume_of_a_parallel_run_on_its_own_layout_is_bitwise(data: Path, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole", *LAYOUTS["tp2_pp2"])
    output = tmp_path / "halves"
    run(data, output, *LAYOUTS["tp2_pp2"], training__loop__max_train_steps=2)
    assert curve(run(data, output, *LAYOUTS["tp2_pp2"])) == curve(whole)


@pytest.mark.parametrize("layout", ["dp2", "dp2_plain"])
def test_resume_in_bf16_is_bitwise(layout: str, data: Path, tmp_path: Path) -> None:
    """Some of a bf16 network's parameters are fp32."""
    bf16 = {"training__precision": "bf16"}
    whole = run(data, tmp_path / "whole", *LAYOUTS[layout], **bf16)
    output = tmp_path / "halves"
    run(data, output, *LAYOUTS[layout], **bf16, training__loop__max_train_steps=2)
    assert curve(run(data, output, *LAYOUTS[layout], **bf16)) == curve(whole)


def test_resume_in_bf16_under_another_layout(data: Path, tmp_path: Path) -> None:
    bf16 = {"training__precision": "bf16"}
    whole = run(data, tmp_path / "whole", *LAYOUTS["pp2"], **bf16)
    output = tmp_path / "halves"
    run(data, output, *LAYOUTS["pp2"], **bf16, training__loop__max_train_steps=2)
    found = run(data, output, *LAYOUTS["tp2_sp"], **bf16)
    assert curve(found) == pytest.approx(curve(whole), rel=0.02)


def test_a_run_folder_in_use_is_not_overwritten(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(data, output, training__loop__max_train_steps=1)
    before = (output / "metrics.jsonl").read_text()
    tree = config_tree(data, output)
    file = write_config(tmp_path / "again.yaml", tree)
    config = load_run_config(file, {"training.checkpoint.resume_from_checkpoint": ""})
    with pytest.raises(SystemExit) as stop:
        run_training(config, ranks=2, fork=True)
    assert stop.value.code == CheckpointError.exit_code
    assert (output / "metrics.jsonl").read_text() == before
