"""Every method takes a step with every family of networks, or says why it cannot.

A new method or family gets a line in the tables below.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from megagen.core.errors import ConfigError
from megagen.methods import METHODS
from megagen.models import MODELS
from tests.trainer.synthetic import LATENT_SHAPE, config_tree, write_config, write_dataset
from tests.trainer.test_runs import read_metrics

STEPS = {"dmd_denoising_steps": [1000, 500]}
KD = {**STEPS, "snap": True, "teacher_inference_steps": 4}
FROZEN: dict[str, dict[str, Any]] = {"teacher": {"trainable": False}}
DISTILLED: dict[str, dict[str, Any]] = {**FROZEN, "critic": {}}
CONSISTENCY = {"teacher_guidance_scale": 2.0, "cfg_uncond": {"text": "zero"}}
OF_METHOD: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "consistency": (CONSISTENCY, FROZEN),
    "consistency_causal": (CONSISTENCY, FROZEN),
    "diffusion_forcing": ({}, {}),
    "dmd2": ({**STEPS, "rollout_mode": "simulate"}, DISTILLED),
    "finetune": ({}, {}),
    "kd": (KD, FROZEN),
    "kd_causal": (KD, FROZEN),
    "self_forcing": (STEPS, DISTILLED),
    "teacher_forcing": ({}, {}),
}
"""Options, and the roles beside the student."""
OF_FAMILY: dict[str, dict[str, Any]] = {"wan": {}, "wan_causal": {"num_frames_per_block": 1}}
"""Options of a tiny student."""
SCORES = {"wan_causal": "wan"}
"""Family of the other roles, where it is not the student's: they see whole videos."""
SAME = {"consistency_causal"}
"""Methods whose other roles are of the student's family in any case."""
IMPOSSIBLE = {
    ("consistency_causal", "wan"): "sees all frames at once",
    ("self_forcing", "wan"): "sees all frames at once",
    ("teacher_forcing", "wan"): "sees all frames at once",
}


def test_the_tables_are_complete() -> None:
    assert OF_METHOD.keys() == METHODS.keys()
    assert OF_FAMILY.keys() == MODELS.keys()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), 4)


@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize("method", OF_METHOD)
def test_a_step(method: str, family: str, data: Path, tmp_path: Path) -> None:
    take_a_step(method, family, data, tmp_path)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("consistency_causal", "wan_causal"),
        ("dmd2", "wan"),
        ("kd_causal", "wan_causal"),
        ("self_forcing", "wan_causal"),
        ("teacher_forcing", "wan_causal"),
    ],
)
def test_a_step_of_a_sparse_student(method: str, family: str, data: Path, tmp_path: Path) -> None:
    vsa = {"sparsity": 0.5, "tile": [1, 1, 2]}
    take_a_step(method, family, data, tmp_path, attention={"backend": "vsa", "vsa": vsa})


def take_a_step(method: str, family: str, data: Path, tmp_path: Path, **student: Any) -> None:
    tree = config_tree(data, tmp_path / "run")
    options, others = OF_METHOD[method]
    tiny = tree["models"]["student"]
    tree["models"]["student"] = {**tiny, "_target_": family, **OF_FAMILY[family], **student}
    for name, keys in others.items():
        other = family if method in SAME else SCORES.get(family, family)
        tree["models"][name] = {**tiny, "_target_": other, **OF_FAMILY[other], **keys}
    tree["method"] = {"_target_": method, **options}
    if method.startswith("kd"):
        tree["method"]["teacher_path_cache"] = str(tmp_path / "paths")
    tree["training"]["data"] |= {"global_batch_size": 2, "caption_dropout": 0.0}
    tree["training"]["loop"]["max_train_steps"] = 1
    config = load_run_config(write_config(tmp_path / "run.yaml", tree))
    why = IMPOSSIBLE.get((method, family))
    if why is not None:
        with pytest.raises(ConfigError, match=why):
            run_training(config, ranks=1, fork=True)
        return
    run_training(config, ranks=1, fork=True)
    (metrics,) = read_metrics(tmp_path / "run")
    norms = [v for k, v in metrics.items() if k.startswith("grad_norm/")]
    assert math.isfinite(metrics["loss/total"]) and all(n > 0 for n in norms)
    assert len(norms) == 1 + ("critic" in others)
    assert LATENT_SHAPE[1] > 1, "a video of one frame would not tell the families apart"
