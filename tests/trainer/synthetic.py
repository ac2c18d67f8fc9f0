"""A small dataset in FastVideo's columns, written with pyarrow alone, and a config on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

LATENT_SHAPE = (4, 2, 6, 4)  # C T H W: 12 tokens of patch 1x2x2
TEXT_SHAPE = (5, 8)  # L D


def write_dataset(folder: Path, num_samples: int = 24, seed: int = 0) -> Path:
    """Random latents and text embeddings."""
    random = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {}
    for i in range(num_samples):
        row: dict[str, Any] = {
            "id": f"sample{i}",
            "file_name": f"{i}.mp4",
            "caption": f"clip {i}",
            "media_type": "video",
            "width": 8,
            "height": 12,
            "num_frames": 2,
            "duration_sec": 0.25,
            "fps": 8.0,
        }
        for name, shape in (("vae_latent", LATENT_SHAPE), ("text_embedding", TEXT_SHAPE)):
            array = random.standard_normal(shape).astype(np.float32)
            row |= {f"{name}_bytes": array.tobytes(), f"{name}_shape": list(shape)}
            row[f"{name}_dtype"] = "float32"
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "data.parquet", row_group_size=8)
    return folder


def config_tree(data: Path, output_dir: Path, **training: Any) -> dict[str, Any]:
    """A tiny Wan, fp32, SFT."""
    return {
        "models": {
            "student": {
                "_target_": "wan",
                "architecture": {
                    "num_layers": 4,
                    "num_attention_heads": 4,
                    "attention_head_dim": 12,
                    "ffn_dim": 64,
                    "in_channels": 4,
                    "out_channels": 4,
                    "text_dim": TEXT_SHAPE[1],
                    "freq_dim": 16,
                    "latents_mean": None,
                    "latents_std": None,
                },
            }
        },
        "method": {"_target_": "finetune", "weighting_scheme": "logit_normal"},
        "training": {
            "data": {
                "data_path": str(data),
                "micro_batch_size": 2,
                "global_batch_size": 8,
                "text_len": TEXT_SHAPE[0],
                "caption_dropout": 0.2,
                "caption_dropout_to": "zeros",
            },
            "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.95]},
            "loop": {"max_train_steps": 5},
            "checkpoint": {"output_dir": str(output_dir)},
            "precision": "fp32",
            "seed": 3,
            **training,
        },
        "callbacks": {"grad_clip": {"max_grad_norm": 0.5}, "ema": {"decay": 0.9}},
    }


def write_config(file: Path, tree: dict[str, Any]) -> Path:
    """The tree as YAML."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree))
    return file
