"""DMD2 by adapters: three roles on one copy of the base do what three copies do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from tests import seeds
from tests.trainer.synthetic import TEXT_SHAPE, config_tree, write_config, write_dataset
from tests.trainer.test_runs import read_metrics

METRICS = ("loss/total", "loss/fake_score", "grad_norm/student", "grad_norm/critic")
STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with its unconditional embedding, and a base."""
    folder = tmp_path_factory.mktemp("dmd2_lora")
    write_dataset(folder / "data")
    generator = torch.Generator().manual_seed(seeds.fresh())
    negative = torch.randn(TEXT_SHAPE, generator=generator)
    save_file({"negative": negative}, folder / "data" / "unconditional.safetensors")
    architecture = config_tree(folder, folder)["models"]["student"]["architecture"]
    shape = {k: v for k, v in architecture.items() if not k.startswith("latents_")}
    model = WanTransformer3DModel(**{**shape, "num_layers": 2})
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "base")
    return folder


def run(
    place: Path, name: str, ranks: int = 1, *, share: bool, steps: int = STEPS, **layout: Any
) -> list[float]:
    """Losses and norms of every step."""
    tree = config_tree(place / "data", place / name, distributed=layout)
    lora = {"rank": 4, "share_base": share}
    common = {"_target_": "wan", "init_from": str(place / "base")}
    teacher = {**common, "trainable": False}
    if share:
        teacher["lora"] = {"share_base": True}
    tree["models"] = {
        "critic": {**common, "lora": {**lora, "target_modules": ["to_q", "ffn"]}},
        "teacher": teacher,
        "student": {**common, "lora": lora},
    }
    tree["method"] = {
        "_target_": "dmd2",
        "rollout_mode": "data_latent",
        "dmd_denoising_steps": [1000, 750, 500, 250],
        "generator_update_interval": 2,
        "real_score_guidance_scale": 3.0,
    }
    tree["training"]["data"] |= {"caption_dropout": 0.0, "global_batch_size": 4}
    tree["training"]["loop"] = {"max_train_steps": steps}
    config = load_run_config(write_config(place / f"{name}.yaml", tree), {})
    run_training(config, ranks=ranks, fork=True)
    metrics = read_metrics(place / name)
    return [m[key] for m in metrics for key in METRICS if key in m]


def test_a_shared_base_changes_no_number(place: Path) -> None:
    apart = run(place, "apart", share=False)
    assert len(apart) > 2 * STEPS
    assert run(place, "together", share=True) == apart
    run(place, "halves", share=True, steps=2)
    assert run(place, "halves", share=True) == apart
    tp = run(place, "tp2_sp", 2, share=True, tp_size=2, sequence_parallel=True)
    assert tp == pytest.approx(apart, rel=1e-5)
