"""The columns of a dataset: FastVideo's layout, so datasets go both ways.

A tensor ``x`` is three columns: ``x_bytes`` (row-major), ``x_shape`` and ``x_dtype``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

LATENT = "vae_latent"  # raw codec output [C, T, H, W]
TEXT = "text_embedding"  # [L, D], without padding
CLIP = "clip_feature"  # CLIP's hidden states of the first frame [257, 1280]
FIRST_FRAME = (
    "first_frame_latent"  # the first frame and zeros, encoded and *normalised* [C, T, H, W]
)
TENSORS = (LATENT, TEXT, CLIP, FIRST_FRAME)

SCALARS: dict[str, pa.DataType] = {
    "file_name": pa.string(),
    "caption": pa.string(),
    "media_type": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "num_frames": pa.int64(),
    "duration_sec": pa.float64(),
    "fps": pa.float64(),
}

ROW_GROUP_BYTES = 1 << 20  # a row group is read whole, so it holds about this much, or one row


def tensor_columns(name: str) -> tuple[str, str, str]:
    """The three columns of a tensor."""
    return f"{name}_bytes", f"{name}_shape", f"{name}_dtype"


def arrow_schema(tensors: Sequence[str]) -> pa.Schema:
    """Schema of rows with these tensors."""
    fields = [pa.field("id", pa.string())]
    for name in tensors:
        data, shape, dtype = tensor_columns(name)
        fields += [
            pa.field(data, pa.binary()),
            pa.field(shape, pa.list_(pa.int64())),
            pa.field(dtype, pa.string()),
        ]
    return pa.schema(fields + [pa.field(name, kind) for name, kind in SCALARS.items()])


def pack_tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    """The three values of a tensor, stored as fp32."""
    values = tensor.detach().float().contiguous().cpu().numpy()
    return dict(
        zip(tensor_columns(name), (values.tobytes(), list(values.shape), "float32"), strict=True)
    )


def unpack_tensor(data: memoryview | bytes, shape: Sequence[int], dtype: str) -> Tensor:
    """A tensor from its three values, as fp32 in memory of its own.

    Raises:
        ValueError: the number of bytes does not fit the shape and type.
    """
    kind = getattr(torch, dtype.removeprefix("torch.") or "float32", None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"unknown dtype {dtype!r}")
    count = 1
    for size in shape:
        count *= size
    if len(data) != count * kind.itemsize:
        raise ValueError(f"{len(data)} bytes do not fit the shape {list(shape)} of {dtype}")
    flat = torch.frombuffer(bytearray(data), dtype=kind) if count else torch.empty(0, dtype=kind)
    return flat.float().reshape(tuple(shape))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], tensors: Sequence[str]) -> None:
    """Write one parquet file: zstd, page checksums, small row groups; whole or not at all.

    Args:
        path: the target.
        rows: values of every column of ``arrow_schema(tensors)``.
        tensors: the tensors among them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(len(row[tensor_columns(name)[0]]) for row in rows for name in tensors)
    per_group = max(1, ROW_GROUP_BYTES * len(rows) // max(size, 1))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(
        pa.Table.from_pylist(list(rows), schema=arrow_schema(tensors)),
        temporary,
        row_group_size=per_group,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    sync_file(temporary)
    temporary.replace(path)


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
