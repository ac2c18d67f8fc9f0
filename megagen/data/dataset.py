"""Datasets on disk: ours (with ``dataset.json``) and FastVideo's (parquet files, no manifest).

All files are opened once at the start, so that a missing, truncated or foreign one is found before
any training. What is found is an index: for each bucket (shape of latents), where its samples are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megagen.core.errors import ConfigError, DataError
from megagen.core.log import warn_once
from megagen.data.batch import LatentShape
from megagen.data.manifest import UNCONDITIONAL, Manifest, read_manifest
from megagen.data.options import DataOptions
from megagen.data.parquet import WHOLE_GROUP_BYTES, first_line, open_parquet
from megagen.data.schema import CLIP, FIRST_FRAME, LATENT, TEXT, tensor_columns

DEFAULT_TEXT_LEN = 512


@dataclass(frozen=True)
class Entries:
    """The samples of one bucket, repeats included.

    Attributes:
        latent_shape: ``(C, T, H, W)`` after the cut to ``num_latent_t``.
        files: index of each sample's file, int32.
        rows: its row there, int32.
        keys: a number that no other entry of the dataset has, int64.
    """

    latent_shape: LatentShape
    files: np.ndarray
    rows: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """An indexed dataset.

    Attributes:
        files: parquet files.
        buckets: sorted by shape.
        tensors: tensors that all files have.
        text_len: tokens of padded text.
        unconditional: ``empty`` and ``negative`` embeddings [L, D], as far as there are any.
    """

    files: tuple[Path, ...]
    buckets: tuple[Entries, ...]
    tensors: tuple[str, ...]
    text_len: int
    unconditional: dict[str, Tensor]


@dataclass
class _Index:
    files: list[Path] = field(default_factory=list)
    buckets: dict[LatentShape, list[tuple[int, np.ndarray, np.ndarray]]] = field(
        default_factory=dict
    )
    columns: set[str] | None = None
    num_keys: int = 0
    text_lens: list[int] = field(default_factory=list)


def open_dataset(options: DataOptions, where: str = "training.data") -> Dataset:
    """Index everything that ``options.data_path`` names.

    Raises:
        ConfigError: no data_path, or one that does not exist.
        DataError: a file is missing, corrupt or without the columns needed; nothing is left to use.
    """
    sources = options.sources()
    if not sources:
        raise ConfigError(
            "is not given.", remedy="Name a dataset directory.", where=f"{where}.data_path"
        )
    index = _Index()
    for folder, repeats in sources.items():
        _add_source(index, Path(folder), repeats, options, where)
    if not index.buckets:
        raise DataError(
            "has no sample of the size asked for.",
            remedy="Look at num_frames, num_height and num_width.",
            where=f"{where}.data_path",
        )
    return Dataset(
        files=tuple(index.files),
        buckets=tuple(_entries(shape, parts) for shape, parts in sorted(index.buckets.items())),
        tensors=_tensors(index.columns or set(), options),
        text_len=options.text_len or max(index.text_lens, default=DEFAULT_TEXT_LEN),
        unconditional=_unconditional(options, list(sources)),
    )


def _add_source(
    index: _Index, folder: Path, repeats: int, options: DataOptions, where: str
) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"found {str(folder)!r}; no such directory.",
            remedy="Name a dataset that megagen preprocess or FastVideo wrote.",
            where=f"{where}.data_path",
        )
    manifest = read_manifest(folder)
    if manifest is not None:
        index.text_lens.append(manifest.text_len)
    expected = _expected(folder, manifest)
    for path, (num_rows, size) in expected.items():
        shapes = _check_file(path, num_rows, size, options, index)
        number = len(index.files)
        index.files.append(path)
        for shape, rows in shapes.items():
            for _ in range(repeats):
                keys = np.arange(index.num_keys, index.num_keys + len(rows), dtype=np.int64)
                index.num_keys += len(rows)
                index.buckets.setdefault(shape, []).append((number, rows, keys))


def _expected(folder: Path, manifest: Manifest | None) -> dict[Path, tuple[int, int]]:
    """File -> (rows, bytes) by the manifest; (-1, -1) where none says."""
    if manifest is not None:
        entries = [entry for bucket in manifest.buckets for entry in bucket.files]
        return {folder / entry.file: (entry.rows, entry.size) for entry in entries}
    found = sorted(folder.rglob("*.parquet"))
    files = [p for p in found if not any(x.startswith(".") for x in p.relative_to(folder).parts)]
    if (folder / ".progress").is_dir():
        raise DataError(
            "its preprocessing is not finished.",
            remedy="Give the megagen preprocess command again.",
            where=str(folder),
        )
    if not files:
        raise DataError(
            "has no parquet file.",
            remedy="Name a dataset that megagen preprocess or FastVideo wrote.",
            where=str(folder),
        )
    return dict.fromkeys(files, (-1, -1))


def _check_file(
    path: Path, num_rows: int, size: int, options: DataOptions, index: _Index
) -> dict[LatentShape, np.ndarray]:
    """Latent shape -> rows of a file, after looking at its footer and small columns."""
    if not path.is_file():
        raise DataError("is missing.", remedy="Preprocess again.", where=str(path))
    file = open_parquet(path)
    names = set(file.schema_arrow.names)
    needed = [*tensor_columns(TEXT), *_pixel_sizes(options)]
    if not options.is_text_only:
        needed += tensor_columns(LATENT)
    if options.preprocessed_data_type == "i2v":
        needed += tensor_columns(FIRST_FRAME)
    if lacking := [name for name in needed if name not in names]:
        raise DataError(
            f"has no column {lacking[0]!r} (it has {sorted(names)}).",
            remedy="Use a dataset with this data type's columns.",
            where=str(path),
        )
    found = (file.metadata.num_rows, path.stat().st_size)
    if num_rows >= 0 and found != (num_rows, size):
        raise DataError(
            f"has {found[0]} rows in {found[1]} bytes, {num_rows} in {size} were written.",
            remedy="Fetch or preprocess it again.",
            where=str(path),
        )
    index.columns = names if index.columns is None else index.columns & names
    _warn_of_big_groups(file, path)
    return _rows_by_shape(file, path, options)


def _rows_by_shape(
    file: pq.ParquetFile, path: Path, options: DataOptions
) -> dict[LatentShape, np.ndarray]:
    if options.is_text_only:
        whole = _cut(options.latent_shape, options, path, 0)
        return {whole: np.arange(file.metadata.num_rows, dtype=np.int32)}
    sizes = _pixel_sizes(options)
    shape_column = tensor_columns(LATENT)[1]
    try:
        table = file.read(columns=[shape_column, *sizes], use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be read ({first_line(error)}).",
            remedy="Fetch or preprocess it again.",
            where=str(path),
        ) from None
    rows: dict[LatentShape, list[int]] = {}
    columns = {key: table.column(key).to_pylist() for key in sizes}
    for row, shape in enumerate(table.column(shape_column).to_pylist()):
        if any(columns[key][row] != value for key, value in sizes.items()):
            continue
        rows.setdefault(_cut(shape, options, path, row), []).append(row)
    return {shape: np.array(numbers, dtype=np.int32) for shape, numbers in rows.items()}


def _pixel_sizes(options: DataOptions) -> dict[str, int]:
    """Column -> the only value wanted of it; texts alone have no size."""
    if options.is_text_only:
        return {}
    wanted = {
        "num_frames": options.num_frames,
        "height": options.num_height,
        "width": options.num_width,
    }
    return {key: value for key, value in wanted.items() if value is not None}


def _cut(shape: Sequence[int] | None, options: DataOptions, path: Path, row: int) -> LatentShape:
    sizes = list(shape or [])
    if len(sizes) == 5 and sizes[0] == 1:
        sizes = sizes[1:]
    if len(sizes) != 4 or min(sizes) < 1:
        raise DataError(
            f"row {row} has latents of shape {shape}, not [C, T, H, W].",
            remedy="Preprocess it again.",
            where=str(path),
        )
    C, T, H, W = sizes
    return C, min(T, options.num_latent_t or T), H, W


def _warn_of_big_groups(file: pq.ParquetFile, path: Path) -> None:
    metadata = file.metadata
    groups = (metadata.row_group(g) for g in range(metadata.num_row_groups))
    if any(g.num_rows > 1 and g.total_byte_size > WHOLE_GROUP_BYTES for g in groups):
        warn_once(
            __name__,
            f"{path.parent}: parquet files with big row groups: reading one row decodes those "
            "before it. megagen.data.repack.repack(source, target) rewrites a dataset once.",
        )


def _entries(shape: LatentShape, parts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Entries:
    files = [np.full(len(rows), number, dtype=np.int32) for number, rows, _ in parts]
    return Entries(
        latent_shape=shape,
        files=np.concatenate(files),
        rows=np.concatenate([rows for _, rows, _ in parts]),
        keys=np.concatenate([keys for _, _, keys in parts]),
    )


def _tensors(columns: set[str], options: DataOptions) -> tuple[str, ...]:
    if options.is_text_only:
        return (TEXT,)
    wanted = [] if options.preprocessed_data_type == "t2v" else [FIRST_FRAME, CLIP]
    return (LATENT, TEXT, *(n for n in wanted if columns.issuperset(tensor_columns(n))))


def _unconditional(options: DataOptions, folders: Sequence[str]) -> dict[str, Tensor]:
    for path in _unconditional_paths(options, folders):
        try:
            return {name: t.float() for name, t in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"cannot be read ({first_line(error)}).",
                remedy="Preprocess again.",
                where=str(path),
            ) from None
    return {}


def _unconditional_paths(options: DataOptions, folders: Sequence[str]) -> Iterator[Path]:
    if options.unconditional_path is not None:
        yield Path(options.unconditional_path)
        return
    yield from (p for p in (Path(f) / UNCONDITIONAL for f in folders) if p.is_file())
