"""Whole runs of consistency distillation: two layouts, a moving target, killed and resumed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanTransformer3DModel

from megagen.cli.main import main
from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from megagen.core.errors import ConfigError
from tests.trainer.synthetic import config_tree, write_config
from tests.trainer.test_dmd2_runs import data
from tests.trainer.test_runs import read_metrics

__all__ = ["data"]  # a fixture

RECIPE = Path(__file__).parents[2] / "configs" / "wan" / "consistency_causal_1.3b.yaml"
STEPS = 5
METRICS = ("loss/total", "grad_norm/student", "lr/student")
ONE_LAYOUT: tuple[int, dict[str, Any]] = (1, {})
TWO_LAYOUTS: tuple[int, dict[str, Any]] = (
    2,
    {"student": {"tp_size": 2, "sequence_parallel": True}, "teacher": {"pp_size": 2}},
)
CAUSAL = {"_target_": "wan_causal", "num_frames_per_block": 1}


def tree_of(data: Path, output: Path, layouts: dict[str, Any], *, is_causal: bool) -> Any:
    """Two tiny Wans of other weights."""
    tree = config_tree(data, output)
    tiny = {**tree["models"]["student"], **(CAUSAL if is_causal else {})}
    tree["models"] = {"student": tiny, "teacher": {**tiny, "trainable": False}}
    for name, layout in layouts.items():
        tree["models"][name] = {**tree["models"][name], "distributed": layout}
    tree["method"] = {
        "_target_": "consistency_causal" if is_causal else "consistency",
        "grid_steps": 8,
        "skip_steps": 2,
        "teacher_guidance_scale": 3.0,
        "distance": "pseudo_huber",
    }
    tree["training"]["data"] |= {"global_batch_size": 4}
    tree["training"]["optimizer"]["eps"] = 1e-4
    tree["training"]["loop"]["max_train_steps"] = STEPS
    tree["callbacks"]["ema"] = {"decay": 0.6, "start_iter": 1}
    tree["pipeline"] = {"flow_shift": 5.0}
    return tree


def run(
    data: Path,
    output: Path,
    layout: tuple[int, dict[str, Any]],
    *,
    is_causal: bool = True,
    save_every: int = 0,
    **dotted: Any,
) -> list[float]:
    """The curve of a run."""
    ranks, layouts = layout
    tree = tree_of(data, output, layouts, is_causal=is_causal)
    tree["training"]["checkpoint"]["training_state_checkpointing_steps"] = save_every
    file = write_config(output.parent / f"{output.name}.yaml", tree)
    changes = {key.replace("__", "."): value for key, value in dotted.items()}
    try:
        run_training(load_run_config(file, changes), ranks=ranks, fork=True)
    except SystemExit as stop:
        pytest.fail(f"the run ended with code {stop.code}")
    return [metrics[key] for metrics in read_metrics(output) for key in METRICS]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run(data, tmp_path_factory.mktemp("whole") / "run", TWO_LAYOUTS)


def test_two_layouts_and_one(data: Path, tmp_path: Path, whole: list[float]) -> None:
    found = run(data, tmp_path / "one", ONE_LAYOUT)
    assert len(found) == STEPS * len(METRICS)
    assert found == pytest.approx(whole, rel=1e-5)


def test_the_target_moves_with_the_average(data: Path, tmp_path: Path, whole: list[float]) -> None:
    """Up to its start it is the student; then it lags behind."""
    found = run(data, tmp_path / "run", TWO_LAYOUTS, method__target_weights="student")
    same = 2 * len(METRICS)
    assert found[:same] == whole[:same]
    assert found[same] != pytest.approx(whole[same], rel=1e-4)


def test_killed_and_resumed(data: Path, tmp_path: Path, whole: list[float]) -> None:
    """The average is part of what is resumed: the target needs it."""
    output = tmp_path / "killed"
    child = multiprocessing.get_context("fork").Process(
        target=lambda: (os.setsid(), run(data, output, TWO_LAYOUTS, save_every=1))
    )
    child.start()
    saved = output / "checkpoints" / "step_00000003"
    limit = time.monotonic() + 120
    while child.is_alive() and not saved.is_dir() and time.monotonic() < limit:
        time.sleep(0.02)
    assert child.pid is not None
    os.killpg(child.pid, signal.SIGKILL)
    child.join()
    assert run(data, output, TWO_LAYOUTS) == whole


def test_adapters_on_the_teachers_base(data: Path, tmp_path: Path) -> None:
    """Their average takes their place; the teacher never sees any of them."""
    tiny = config_tree(data, tmp_path)["models"]["student"]["architecture"]
    shape = {key: value for key, value in tiny.items() if not key.startswith("latents_")}
    WanTransformer3DModel(**shape).save_pretrained(tmp_path / "base")
    base = {f"models__{role}__init_from": str(tmp_path / "base") for role in ("student", "teacher")}
    own = {**base, "models__student__lora": {"rank": 2}}
    apart = run(data, tmp_path / "apart", ONE_LAYOUT, is_causal=False, **own)
    shared = {
        **base,
        "models__student__lora": {"rank": 2, "share_base": True},
        "models__teacher__lora": {"share_base": True},
    }
    assert run(data, tmp_path / "shared", ONE_LAYOUT, is_causal=False, **shared) == apart


def test_a_bidirectional_student_in_bf16(data: Path, tmp_path: Path) -> None:
    exact = run(data, tmp_path / "fp32", TWO_LAYOUTS, is_causal=False)
    one = run(data, tmp_path / "one", ONE_LAYOUT, is_causal=False)
    assert one == pytest.approx(exact, rel=1e-5)
    rounded = run(data, tmp_path / "bf16", TWO_LAYOUTS, is_causal=False, training__precision="bf16")
    assert rounded == pytest.approx(exact, rel=0.05)


def test_what_contradicts_itself_is_refused(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(match: str, drop: str = "", **dotted: Any) -> None:
        tree = tree_of(data, tmp_path / "run", {}, is_causal=True)
        tree["callbacks"].pop(drop, None)
        file = write_config(tmp_path / "bad.yaml", tree)
        config = load_run_config(file, {k.replace("__", "."): v for k, v in dotted.items()})
        with pytest.raises((ConfigError, SystemExit)) as stop:
            run_training(config, ranks=1, fork=True)
        assert match in str(stop.value) or match in capfd.readouterr().err

    refused("did you mean 'skip_steps'", method__skip_step=1)
    refused("the grid has 8 steps", method__skip_steps=9)
    refused("method.distance: found 'l1'", method__distance="l1")
    refused("teacher.trainable: is true", models__teacher__trainable=True)
    refused("makes blocks of [2, 2]", models__teacher__num_frames_per_block=2)
    refused("Add callbacks.ema", drop="ema")
    refused("no embedding", method__cfg_uncond__text="empty")


def test_the_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    """Without the run that it begins with: the architecture is a preset's."""
    words = ["train", "--config", str(RECIPE), "--dry-run", "--world-size", "8"]
    for role in ("student", "teacher"):
        words += [f"--models.{role}.init_from", "none"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capfd.readouterr().out
    assert not stop.value.code
    assert said.count("WanCausalModel, 1419.00 M parameters") == 2
