"""Small real inputs: folders of mp4 clips, and datasets as FastVideo writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from megagen.data.video import write_video

SIZES = ((24, 32, 8), (32, 24, 13), (24, 24, 9))  # height, width, frames


def write_clips(folder: Path, count: int, generator: torch.Generator) -> Path:
    """``count`` noise clips of three sizes with sidecar captions; every fifth in a sub-folder."""
    for i in range(count):
        height, width, frames = SIZES[i % 3]
        pixels = torch.randint(0, 256, (frames, height, width, 3), generator=generator)
        place = folder / "more" if i % 5 == 4 else folder
        write_video(place / f"clip{i:03d}.mp4", pixels.to(torch.uint8), 8)
        (place / f"clip{i:03d}.txt").write_text(f"clip number {i} moving left")
    return folder


def options(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Options of a quick ``preprocess`` into three buckets."""
    return {
        "input_dir": str(folder),
        "output_dir": str(output),
        "codec": {"name": "space_to_depth", "patch": 4},
        "text_encoder": {"name": "hashed", "dim": 8, "max_length": 7},
        "buckets": ["8x24x32", "4x24x32", "12x32x24", "8x24x24"],
        "samples_per_file": 4,
        "negative_prompt": "blurry",
        "num_threads": 1,
        **changes,
    }


def foreign_rows(
    count: int, shape: tuple[int, ...], generator: torch.Generator, text_dim: int = 6
) -> list[dict[str, Any]]:
    """Rows as FastVideo's text-to-video preprocessing makes them."""
    rows = []
    for i in range(count):
        latents = torch.randn(shape, generator=generator).numpy()
        text = torch.randn(3 + i % 4, text_dim, generator=generator).numpy()
        rows.append(
            {
                "id": f"video{i}",
                **_columns("vae_latent", latents),
                **_columns("text_embedding", text),
                "file_name": f"video{i}.mp4",
                "caption": f"caption {i}",
                "media_type": "video",
                "width": shape[-1] * 8,
                "height": shape[-2] * 8,
                "num_frames": 4 * shape[1] - 3,
                "duration_sec": 1.0,
                "fps": 16.0,
            }
        )
    return rows


def write_foreign(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One parquet file with one row group, dictionary-encoded: ``pq.write_table``'s defaults."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
    return path


def stored(row: dict[str, Any], name: str) -> torch.Tensor:
    """A tensor of a row as the test wrote it."""
    flat = np.frombuffer(row[f"{name}_bytes"], dtype=np.float32)
    return torch.from_numpy(flat.reshape(row[f"{name}_shape"]).copy())


def _columns(name: str, value: np.ndarray) -> dict[str, Any]:
    return {
        f"{name}_bytes": value.tobytes(),
        f"{name}_shape": list(value.shape),
        f"{name}_dtype": str(value.dtype),
    }
