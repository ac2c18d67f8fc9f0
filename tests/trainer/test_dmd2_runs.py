"""Whole DMD2 runs: three roles, two of them trained, each under a layout of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from megagen.checkpoint.weights import CheckpointStore
from megagen.cli.main import main
from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from megagen.core.errors import ConfigError
from megagen.models.wan import WanModel
from tests.trainer.synthetic import (
    LATENT_SHAPE,
    TEXT_SHAPE,
    config_tree,
    write_config,
    write_dataset,
)
from tests.trainer.test_runs import read_metrics

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "wan" / "dmd2_t2v_1.3b.yaml"
STEPS = 6
METRICS = ("loss/total", "loss/generator", "loss/fake_score", "grad_norm/student")
METRICS += ("grad_norm/critic", "lr/student", "lr/critic", "update_student")
ONE_LAYOUT = (1, {})
THREE_LAYOUTS = (
    2,
    {
        "student": {"tp_size": 2, "sequence_parallel": True},
        "teacher": {"pp_size": 2},
        "critic": {"cp_size": 2},
    },
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_dataset(tmp_path_factory.mktemp("data"))
    negative = torch.randn(TEXT_SHAPE, generator=torch.Generator().manual_seed(1))
    save_file({"negative": negative}, folder / "unconditional.safetensors")
    return folder


def tree_of(data: Path, output: Path, layouts: Any, *, text_only: bool) -> dict[str, Any]:
    """Three tiny Wans."""
    tree = config_tree(data, output)
    student = tree["models"]["student"]
    tree["models"] = {
        "student": student,
        "teacher": {**student, "trainable": False},
        "critic": {**student, "optimizer": {"betas": [0.0, 0.9], "max_grad_norm": 0.25}},
    }
    for name, layout in layouts.items():
        tree["models"][name] = {**tree["models"][name], "distributed": layout}
    tree["method"] = {
        "_target_": "dmd2",
        "rollout_mode": "simulate" if text_only else "data_latent",
        "dmd_denoising_steps": [1000, 750, 500, 250],
        "warp_denoising_step": True,
        "generator_update_interval": 2,
        "real_score_guidance_scale": 3.0,
        "fake_score_learning_rate": 4e-3,
    }
    tree["training"]["data"] |= {"caption_dropout": 0.0, "global_batch_size": 4}
    if text_only:
        tree["training"]["data"] |= {
            "preprocessed_data_type": "text_only",
            "latent_shape": list(LATENT_SHAPE),
        }
    return tree


def run(
    data: Path,
    output: Path,
    layout: Any,
    *,
    text_only: bool,
    steps: int = STEPS,
    save_every: int = 0,
    precision: str = "fp32",
    **method: Any,
) -> list[dict[str, float]]:
    ranks, layouts = layout
    tree = tree_of(data, output, layouts, text_only=text_only)
    tree["training"]["precision"] = precision
    tree["method"] |= method
    tree["training"]["checkpoint"]["training_state_checkpointing_steps"] = save_every
    tree["training"]["loop"]["max_train_steps"] = steps
    file = write_config(output.parent / f"{output.name}.yaml", tree)
    try:
        run_training(load_run_config(file), ranks=ranks, fork=True)
    except SystemExit as stop:
        pytest.fail(f"the run ended with code {stop.code}")
    return read_metrics(output)


def curve(metrics: list[dict[str, float]]) -> list[float]:
    return [m[k] for m in metrics for k in METRICS if k in m]


@pytest.fixture(scope="module")
def one_rank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return run(data, tmp_path_factory.mktemp("one") / "run", ONE_LAYOUT, text_only=True)


def test_metrics_and_cadence(one_rank: list[dict[str, float]]) -> None:
    for number, metrics in enumerate(one_rank):
        moves = number % 2 == 1
        assert metrics["update_student"] == moves
        assert ("loss/generator" in metrics) == ("grad_norm/student" in metrics) == moves
        assert metrics["lr/critic"] == 4e-3
        assert metrics.get("lr/student", 1e-2) == 1e-2
        generator = metrics.get("loss/generator", 0.0)
        assert metrics["loss/total"] == pytest.approx(metrics["loss/fake_score"] + generator)


def test_resume_is_bitwise_and_the_average_moves_with_the_student(
    data: Path, tmp_path: Path, one_rank: list[dict[str, float]]
) -> None:
    output = tmp_path / "run"
    run(data, output, ONE_LAYOUT, text_only=True, steps=3)
    assert curve(run(data, output, ONE_LAYOUT, text_only=True, save_every=1)) == curve(one_rank)
    weights, averages = (
        [tensors(output, step, kind) for step in (3, 4, 5)] for kind in ("weights", "ema")
    )
    for found in (weights, averages):
        assert not torch.equal(found[0], found[1])  # step 4 moves the student
        assert torch.equal(found[1], found[2])  # step 5 does not


def tensors(output: Path, step: int, kind: Any) -> torch.Tensor:
    """Some of a student's tensors in a checkpoint, flat."""
    directory = output / "checkpoints" / f"step_{step:08d}"
    tree = yaml.safe_load((output / "run.yaml").read_text())
    architecture = tree["models"]["student"]["architecture"]
    plugin = WanModel(WanModel.Options(architecture=architecture))
    store = CheckpointStore(directory, plugin, "student", kind)
    names = [name for name in store.names() if name.startswith("blocks.0.ffn")]
    return torch.cat([store.read(name, None, 0, 1).flatten() for name in names])


def test_three_layouts_killed_and_resumed(
    data: Path, tmp_path: Path, one_rank: list[dict[str, float]]
) -> None:
    whole = run(data, tmp_path / "whole", THREE_LAYOUTS, text_only=True)
    assert curve(whole) == pytest.approx(curve(one_rank), rel=1e-5)
    output = tmp_path / "killed"
    child = multiprocessing.get_context("fork").Process(
        target=lambda: (os.setsid(), run(data, output, THREE_LAYOUTS, text_only=True, save_every=1))
    )
    child.start()
    saved = output / "checkpoints" / "step_00000002"
    limit = time.monotonic() + 120
    while child.is_alive() and not saved.is_dir() and time.monotonic() < limit:
        time.sleep(0.02)
    assert child.pid is not None
    os.killpg(child.pid, signal.SIGKILL)
    child.join()
    assert curve(run(data, output, THREE_LAYOUTS, text_only=True)) == curve(whole)


def test_bf16_is_close_to_fp32(
    data: Path, tmp_path: Path, one_rank: list[dict[str, float]]
) -> None:
    found = run(data, tmp_path / "run", THREE_LAYOUTS, text_only=True, precision="bf16")
    assert curve(found) == pytest.approx(curve(one_rank), rel=0.05)


def test_with_latents_and_a_discriminator(data: Path, tmp_path: Path) -> None:
    """Resumed under the same three layouts, and under one."""
    options: dict[str, Any] = {
        "gan_loss_weight_gen": 0.5,
        "gan_r1_reg_weight": 1.0,
        "discriminator": {"width": 8, "learning_rate": 5e-3},
    }
    whole = run(data, tmp_path / "whole", THREE_LAYOUTS, text_only=False, steps=4, **options)
    for ranks, layout, exact in (("same", THREE_LAYOUTS, True), ("one", ONE_LAYOUT, False)):
        output = tmp_path / ranks
        run(data, output, THREE_LAYOUTS, text_only=False, steps=2, **options)
        found = run(data, output, layout, text_only=False, steps=4, **options)
        keys = ("loss/gan_disc", "loss/gan_gen", "loss/r1", "grad_norm/discriminator")
        ours, expected = (
            [*curve(metrics), *(m[k] for m in metrics for k in keys if k in m)]
            for metrics in (found, whole)
        )
        assert ours == (expected if exact else pytest.approx(expected, rel=1e-5))


def test_what_contradicts_itself_is_refused(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(match: str, **dotted: Any) -> None:
        file = write_config(
            tmp_path / "bad.yaml", tree_of(data, tmp_path / "run", {}, text_only=True)
        )
        config = load_run_config(file, {k.replace("__", "."): v for k, v in dotted.items()})
        with pytest.raises((ConfigError, SystemExit)) as stop:
            run_training(config, ranks=1, fork=True)
        assert match in str(stop.value) or match in capfd.readouterr().err

    refused("teacher.trainable: is true", models__teacher__trainable=True)
    refused("is text_only", method__rollout_mode="data_latent")
    refused("Give it in one place", models__critic__optimizer__learning_rate=1e-3)
    refused("no discriminator", method__gan_r1_reg_weight=1.0)
    refused("no embedding", method__cfg_uncond__text="empty")
    with pytest.raises(ConfigError, match="needs latent_shape"):
        tree = tree_of(data, tmp_path / "run", {}, text_only=True)
        del tree["training"]["data"]["latent_shape"]
        load_run_config(write_config(tmp_path / "bad.yaml", tree))


def test_the_recipe(capfd: pytest.CaptureFixture[str]) -> None:
    """Without the hub: the architecture is a preset's."""
    words = ["train", "--config", str(RECIPE), "--dry-run", "--world-size", "4"]
    for role in ("student", "teacher", "critic"):
        words += [f"--models.{role}.init_from", "none"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capfd.readouterr().out
    assert not stop.value.code
    assert "[16, 20, 56, 104]" in said
    assert said.count("1419.00 M parameters") == 3
