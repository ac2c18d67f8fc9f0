"""``dataset.json``: what a dataset holds and was made with. Written last: it marks a whole one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megagen.core.errors import ConfigError, DataError
from megagen.core.options import StrictOptions, parse_options

MANIFEST = "dataset.json"
UNCONDITIONAL = "unconditional.safetensors"
QUARANTINE = "quarantine.jsonl"


class FileEntry(StrictOptions):
    """One parquet file: path relative to the dataset, rows, bytes."""

    file: str
    rows: int
    size: int


class BucketEntry(StrictOptions):
    """One bucket: pixel size, latent shape ``[C, T, H, W]``, files."""

    num_frames: int
    height: int
    width: int
    latent_shape: tuple[int, int, int, int]
    num_samples: int
    files: list[FileEntry]


class Manifest(StrictOptions):
    """Everything in ``dataset.json``.

    Attributes:
        codec, text_encoder: specs for ``build_codec`` and ``build_text_encoder``.
        text_len, text_dim: shape of a padded text embedding.
        tensors: names of the tensors in each row.
        negative_prompt: the text behind ``negative`` in ``unconditional.safetensors`` (``empty`` is
            beside it), both [text_len, text_dim].
        latent_mean, latent_std: per channel over all samples, of raw latents.
        num_quarantined: clips left out; ``quarantine.jsonl`` has their names and reasons.
    """

    format: Literal["megagen-dataset"] = "megagen-dataset"
    version: Literal[1] = 1
    codec: dict[str, Any]
    text_encoder: dict[str, Any]
    text_len: int
    text_dim: int
    tensors: list[str]
    negative_prompt: str
    latent_mean: list[float]
    latent_std: list[float]
    fps: float | None
    num_samples: int
    num_quarantined: int
    quarantine_reasons: dict[str, int]
    buckets: list[BucketEntry]


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a dataset directory, None where it has none (a FastVideo dataset).

    Raises:
        DataError: it is there and cannot be understood.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        return parse_options(Manifest, json.loads(path.read_text()), "")
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise DataError(
            f"cannot be understood ({error}).",
            remedy="Run megagen preprocess again, with this version.",
            where=str(path),
        ) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``dataset.json``."""
    write_text(folder / MANIFEST, json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
