"""Whole KD runs: paths are made, the teacher is let go, the student trains; killed, and resumed."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megagen import builder
from megagen.cli.main import main
from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from megagen.core.errors import ConfigError
from megagen.data.ode_cache import OdeCache
from megagen.engine.role import Role
from megagen.parallel.launch import run_ranks
from megagen.tracking.build import build_trackers
from megagen.trainer import Trainer
from tests.trainer.synthetic import (
    LATENT_SHAPE,
    TEXT_SHAPE,
    config_tree,
    write_config,
    write_dataset,
)
from tests.trainer.test_runs import read_metrics

RECIPES = Path(__file__).parents[2] / "configs" / "wan"
NUM_SAMPLES = 10
STEPS = 4
METRICS = ("loss/total", "grad_norm/student", "lr/student")
ONE_LAYOUT: tuple[int, dict[str, Any]] = (1, {})
TWO_LAYOUTS: tuple[int, dict[str, Any]] = (
    2,
    {"student": {"tp_size": 2, "sequence_parallel": True}, "teacher": {"pp_size": 2}},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("data"), NUM_SAMPLES)
    negative = torch.randn(TEXT_SHAPE, generator=torch.Generator().manual_seed(1))
    save_file({"negative": negative}, folder / "unconditional.safetensors")
    return folder


def config(
    data: Path,
    output: Path,
    paths: Path,
    layouts: dict[str, Any] | None = None,
    *,
    steps: int = STEPS,
    target: str = "kd",
    drop_teacher: bool = False,
    as_it_is: bool = False,
    **method: Any,
) -> Any:
    """A tiny Wan and its teacher, on texts alone; ``as_it_is``: not causal."""
    tree = config_tree(data, output)
    student = tree["models"]["student"]
    causal = "causal" in target and not as_it_is
    model = {"_target_": "wan_causal", "num_frames_per_block": 1} if causal else {}
    tree["models"] = {"student": {**student, **model}, "teacher": {**student, "trainable": False}}
    for name, layout in (layouts or {}).items():
        tree["models"][name] = {**tree["models"][name], "distributed": layout}
    if drop_teacher:
        del tree["models"]["teacher"]
    tree["method"] = {
        "_target_": target,
        "teacher_path_cache": str(paths),
        "t_list": [1000, 937.5, 833.3, 625, 0],
        "teacher_inference_steps": 8,
        "teacher_guidance_scale": 3.0,
        "path_batch_size": 2,
        "path_dtype": "fp32",
        **method,
    }
    tree["training"]["data"] |= {
        "caption_dropout": 0.0,
        "global_batch_size": 4,
        "preprocessed_data_type": "text_only",
        "latent_shape": list(LATENT_SHAPE),
    }
    tree["training"]["loop"]["max_train_steps"] = steps
    tree["training"]["checkpoint"]["training_state_checkpointing_steps"] = 2
    tree["pipeline"] = {"flow_shift": 5.0}
    return load_run_config(write_config(output.parent / f"{output.name}.yaml", tree))


def run(*given: Any, ranks: int = 1, **changes: Any) -> list[float]:
    """The curve of a run."""
    made = config(*given, **changes)
    try:
        run_training(made, ranks=ranks, fork=True)
    except SystemExit as stop:
        pytest.fail(f"the run ended with code {stop.code}")
    return curve(Path(made.training.checkpoint.output_dir))


def curve(output: Path) -> list[float]:
    return [metrics[key] for metrics in read_metrics(output) for key in METRICS]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """A run's curve and its paths."""
    folder = tmp_path_factory.mktemp("whole")
    return run(data, folder / "run", folder / "paths"), folder / "paths"


def same_paths(a: Path, b: Path) -> bool:
    timesteps = json.loads((a / "paths.json").read_text())["timesteps"]
    for key in range(NUM_SAMPLES):
        one, other = (OdeCache(f, timesteps).read(key, timesteps) for f in (a, b))
        if (one.id, one.caption) != (other.id, other.caption):
            return False
        if not torch.allclose(one.states_KCTHW, other.states_KCTHW, rtol=1e-4, atol=1e-5):
            return False
    return True


def test_two_layouts_make_the_same_paths_and_updates(
    data: Path, tmp_path: Path, whole: tuple[list[float], Path]
) -> None:
    ranks, layouts = TWO_LAYOUTS
    found = run(data, tmp_path / "run", tmp_path / "paths", layouts, ranks=ranks)
    assert found == pytest.approx(whole[0], rel=1e-4)
    assert same_paths(tmp_path / "paths", whole[1])


def test_resume_is_bitwise_and_needs_no_teacher(
    data: Path, tmp_path: Path, whole: tuple[list[float], Path]
) -> None:
    expected, paths = whole
    run(data, tmp_path / "run", paths, steps=2)
    assert run(data, tmp_path / "run", paths, drop_teacher=True) == expected


def test_killed_while_paths_are_made(
    data: Path, tmp_path: Path, whole: tuple[list[float], Path]
) -> None:
    paths, ranks = tmp_path / "paths", 2
    child = multiprocessing.get_context("fork").Process(
        target=lambda: (os.setsid(), run(data, tmp_path / "killed", paths, ranks=ranks))
    )
    child.start()
    limit = time.monotonic() + 120
    while child.is_alive() and not list(paths.glob("samples/*.safetensors")):
        assert time.monotonic() < limit
        time.sleep(0.005)
    assert child.pid is not None
    os.killpg(child.pid, signal.SIGKILL)
    child.join()
    kept = {file: file.stat().st_mtime_ns for file in paths.glob("samples/*.safetensors")}
    assert kept
    assert run(data, tmp_path / "run", paths) == pytest.approx(whole[0], rel=1e-5)
    assert all(file.stat().st_mtime_ns == at for file, at in kept.items())
    assert same_paths(paths, whole[1])


def roles_of_a_run(run_config: Any) -> tuple[list[str], list[str], bool]:
    """In a rank: roles built, roles kept, whether the teacher's memory is given back."""
    run_parts = builder.build_run(run_config, builder.build_plugins(run_config))
    built = list(run_parts.roles)
    teacher: Role | None = run_parts.roles.get("teacher")
    chunk = None if teacher is None else weakref.ref(teacher.chunks[0])
    del teacher
    trainer = Trainer(run_parts, lambda step: build_trackers(run_config, step))
    trainer.run()
    gc.collect()
    return built, list(trainer.run_parts.roles), chunk is None or chunk() is None


def test_the_teacher_is_let_go_and_then_not_built(data: Path, tmp_path: Path) -> None:
    for number, built in enumerate((["student", "teacher"], ["student"])):
        made = config(data, tmp_path / f"run{number}", tmp_path / "paths", steps=1)
        assert run_ranks(1, roles_of_a_run, made) == [(built, ["student"], True)]


def test_a_causal_student_on_the_same_paths(
    data: Path, tmp_path: Path, whole: tuple[list[float], Path]
) -> None:
    expected = run(data, tmp_path / "run", whole[1], target="kd_causal")
    layouts = {"student": {"tp_size": 2}}
    again = run(
        data, tmp_path / "two", whole[1], layouts, ranks=2, target="kd_causal", drop_teacher=False
    )
    assert again == pytest.approx(expected, rel=1e-4)


def test_a_bidirectional_student_in_chunks(
    data: Path, tmp_path: Path, whole: tuple[list[float], Path]
) -> None:
    found = run(data, tmp_path / "run", whole[1], target="kd_causal", chunk_size=1, as_it_is=True)
    assert len(found) == len(whole[0]) and found != whole[0]


def test_what_is_wrong_is_said_before_anything_is_made(
    data: Path, tmp_path: Path, whole: tuple[list[float], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(match: str, paths: Path, **changes: Any) -> None:
        with pytest.raises((ConfigError, SystemExit)) as stop:
            run_training(config(data, tmp_path / "run", paths, **changes), ranks=1, fork=True)
        assert match in str(stop.value) or match in capfd.readouterr().err

    refused("nearest are [1000, 937.5", tmp_path / "new", t_list=[999, 937, 0])
    refused("10 of 10 paths are missing", tmp_path / "new", drop_teacher=True)
    refused("teacher_guidance_scale [3.0, 3.0]", whole[1], teacher_guidance_scale=4.0)
    refused("did you mean 'teacher_inference_steps'", whole[1], teacher_inference_step=4)
    assert not list(tmp_path.glob("new/samples/*"))


@pytest.mark.parametrize("name", ["kd_t2v_1.3b", "kd_causal_1.3b"])
def test_the_recipes(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Without the hub: the architecture is a preset's."""
    words = ["train", "--config", str(RECIPES / f"{name}.yaml"), "--dry-run", "--world-size", "4"]
    for role in ("student", "teacher"):
        words += [f"--models.{role}.init_from", "none"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capfd.readouterr().out
    assert not stop.value.code
    assert said.count("1419.00 M parameters") == 2
