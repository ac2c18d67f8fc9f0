"""Rewriting a dataset with big row groups into one that can be read row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megagen.core.errors import DataError
from megagen.data.parquet import first_line, open_parquet
from megagen.data.schema import ROW_GROUP_BYTES, sync_file


def repack(source: str | Path, target: str | Path) -> int:
    """Copy every parquet file of ``source`` to ``target`` with row groups of about 1 MiB.

    One pass in the memory of one row group; files already there are kept, so it can be stopped and
    started again. Columns and values stay as they are.

    Returns:
        Number of rows in ``target``.

    Raises:
        DataError: no parquet file in ``source``, or a corrupt one.
    """
    root, goal = Path(source), Path(target)
    files = sorted(root.rglob("*.parquet"))
    if not files:
        raise DataError("has no parquet file.", remedy="Name a dataset.", where=str(source))
    rows = 0
    for path in files:
        new = goal / path.relative_to(root)
        if not new.is_file():
            _repack_file(path, new)
        rows += open_parquet(new).metadata.num_rows
    return rows


def _repack_file(path: Path, new: Path) -> None:
    file = open_parquet(path)
    new.parent.mkdir(parents=True, exist_ok=True)
    temporary = new.with_name(f".{new.name}.tmp")
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(temporary, file.schema_arrow, **options) as writer:
        for rows in _groups(file, path):
            writer.write_table(rows, row_group_size=max(rows.num_rows, 1))
    sync_file(temporary)
    temporary.replace(new)


def _groups(file: pq.ParquetFile, path: Path) -> Iterator[pa.Table]:
    """Rows gathered until they make a row group."""
    waiting: list[pa.RecordBatch] = []
    try:
        for batch in file.iter_batches(batch_size=1, use_threads=False):
            waiting.append(batch)
            if sum(b.nbytes for b in waiting) >= ROW_GROUP_BYTES:
                yield pa.Table.from_batches(waiting)
                waiting = []
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be read ({first_line(error)}).", remedy="Fetch it again.", where=str(path)
        ) from None
    if waiting:
        yield pa.Table.from_batches(waiting)
