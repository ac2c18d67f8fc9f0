"""A whole run of self-forcing from texts alone, under three layouts, stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megagen.cli.main import main
from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from tests.trainer.synthetic import write_config
from tests.trainer.test_dmd2_runs import THREE_LAYOUTS, curve, data, tree_of
from tests.trainer.test_runs import read_metrics

__all__ = ["data"]  # a fixture

RECIPES = Path(__file__).parents[2] / "configs" / "wan"
ONE = (1, {})


def rollout_tree(data: Path, output: Path, layouts: Any) -> dict[str, Any]:
    """Three tiny Wans, the student causal."""
    tree = tree_of(data, output, layouts, text_only=True)
    tree["models"]["student"] |= {"_target_": "wan_causal", "num_frames_per_block": 2}
    tree["method"] = {
        "_target_": "self_forcing",
        "dmd_denoising_steps": [1000, 750, 500, 250],
        "warp_denoising_step": True,
        "same_step_across_blocks": True,
        "context_noise": 20.0,
        "num_training_frames": 5,
        "generator_update_interval": 2,
        "real_score_guidance_scale": 3.0,
        "fake_score_learning_rate": 4e-3,
    }
    tree["training"]["data"] |= {"latent_shape": [4, 3, 4, 4]}
    tree["training"]["checkpoint"]["training_state_checkpointing_steps"] = 0
    return tree


def run(
    data: Path, output: Path, layout: Any, *, steps: int = 4, precision: str = "fp32"
) -> list[dict[str, float]]:
    ranks, layouts = layout
    tree = rollout_tree(data, output, layouts)
    tree["training"]["precision"] = precision
    tree["training"]["loop"]["max_train_steps"] = steps
    file = write_config(output.parent / f"{output.name}.yaml", tree)
    run_training(load_run_config(file), ranks=ranks, fork=True)
    return read_metrics(output)


def test_three_layouts_stopped_and_resumed(data: Path, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole", THREE_LAYOUTS)
    assert [m["update_student"] for m in whole] == [0, 1, 0, 1]
    assert curve(whole) == pytest.approx(curve(run(data, tmp_path / "one", ONE)), rel=1e-5)
    rounded = run(data, tmp_path / "bf16", THREE_LAYOUTS, precision="bf16")
    assert curve(rounded) == pytest.approx(curve(whole), rel=0.05)
    run(data, tmp_path / "parts", THREE_LAYOUTS, steps=3)
    assert curve(run(data, tmp_path / "parts", THREE_LAYOUTS)) == curve(whole)


@pytest.mark.parametrize(
    ("recipe", "ranks", "said"),
    [
        ("diffusion_forcing_1.3b", 8, ["1419.00 M parameters"]),
        # keys and values of 28080 tokens (no block looks back at the last one), 30 layers of 1536,
        # in bf16: 5.18 GB; two passes of the teacher over 64 samples in each fifth step, on 8
        # replicas
        ("self_forcing_1.3b", 64, ["[16, 21, 60, 104]", "caches 5.18", "42966.279 TFLOP"]),
    ],
)
def test_recipes(
    recipe: str, ranks: int, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Without the hub: the architecture is a preset's."""
    file = RECIPES / f"{recipe}.yaml"
    words = ["train", "--config", str(file), "--dry-run", "--world-size", str(ranks)]
    for role in load_run_config(file).models:
        words += [f"--models.{role}.init_from", "none"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code
    printed = capfd.readouterr().out
    assert all(words in printed for words in said)
