"""Single rows of parquet files, read with as little decoding as the files allow.

A parquet file is compressed page by page and its smallest unit of reading is the row group. Ours
hold about 1 MiB (``schema.ROW_GROUP_BYTES``), so a row group is read whole and kept in a small
cache. A file with one big row group (FastVideo writes those) is streamed row by row up to the row
wanted, with only the columns wanted.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megagen.core.errors import DataError

WHOLE_GROUP_BYTES = 8 << 20  # a row group up to this size is decoded whole
_OPEN_FILES = 32  # per thread


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a file and read its footer.

    Raises:
        DataError: missing, empty, truncated or not parquet.
    """
    try:
        return pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be opened as parquet ({first_line(error)}).",
            remedy="Fetch or preprocess it again, or remove it.",
            where=str(path),
        ) from None


class RowReader:
    """Random access to the rows of many files; safe to use from several threads.

    Args:
        columns: what to read of a row.
        cache_bytes: memory for decoded row groups; 0: none.

    Attributes:
        rows_decoded: rows materialised so far.
        bytes_decoded: their size in memory.
    """

    def __init__(self, columns: Sequence[str], cache_bytes: int) -> None:
        self.columns, self.cache_bytes = list(columns), cache_bytes
        self.rows_decoded = self.bytes_decoded = 0
        self._cache: OrderedDict[tuple[Path, int, int], pa.Table] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()
        self._files = threading.local()

    def read(self, path: Path, row: int) -> dict[str, Any]:
        """The columns of a row; binary ones as ``pyarrow.Buffer``, None where null.

        Raises:
            DataError: the row cannot be read, naming the file and the row.
        """
        try:
            table, index = self._table(path, row)
            return {name: _value(table.column(name), index) for name in table.column_names}
        except (OSError, pa.ArrowException, ValueError, IndexError) as error:
            raise DataError(
                f"row {row} cannot be read ({first_line(error)}).",
                remedy="Fetch or preprocess the file again, or remove it.",
                where=str(path),
            ) from None

    def _table(self, path: Path, row: int) -> tuple[pa.Table, int]:
        """(decoded rows, index of ``row`` among them)."""
        file, ends = self._file(path)
        group = bisect_right(ends, row)
        offset = row - (ends[group - 1] if group else 0)
        whole = self._is_small(file, group)
        key = (path, group, -1 if whole else offset)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key], offset if whole else 0
        if whole:
            table = file.read_row_group(group, columns=self.columns, use_threads=False)
            self._count(table)
        else:
            table = self._stream_to(file, group, offset)
        self._keep(key, table)
        return table, offset if whole else 0

    def _stream_to(self, file: pq.ParquetFile, group: int, offset: int) -> pa.Table:
        batches = file.iter_batches(
            batch_size=1, row_groups=[group], columns=self.columns, use_threads=False
        )
        for index, batch in enumerate(batches):
            self._count(batch)
            if index == offset:
                return pa.Table.from_batches([batch])
        raise IndexError(f"row group {group} ends before its row {offset}")

    def _is_small(self, file: pq.ParquetFile, group: int) -> bool:
        metadata = file.metadata.row_group(group)
        if metadata.num_rows == 1:
            return True
        return bool(metadata.total_byte_size <= WHOLE_GROUP_BYTES)

    def _file(self, path: Path) -> tuple[pq.ParquetFile, list[int]]:
        """This thread's handle, and where each row group ends."""
        files: OrderedDict[Path, tuple[pq.ParquetFile, list[int]]] | None
        files = getattr(self._files, "open", None)
        if files is None:
            files = self._files.open = OrderedDict()
        if path not in files:
            file = open_parquet(path)
            groups = range(file.metadata.num_row_groups)
            ends = list(accumulate(file.metadata.row_group(g).num_rows for g in groups))
            files[path] = (file, ends)
            if len(files) > _OPEN_FILES:
                files.popitem(last=False)[1][0].close()
        files.move_to_end(path)
        return files[path]

    def _count(self, rows: pa.Table | pa.RecordBatch) -> None:
        with self._lock:
            self.rows_decoded += rows.num_rows
            self.bytes_decoded += rows.nbytes

    def _keep(self, key: tuple[Path, int, int], table: pa.Table) -> None:
        size = table.nbytes
        if size > self.cache_bytes:
            return
        with self._lock:
            if key not in self._cache:
                self._cache[key] = table
                self._cached += size
            while self._cached > self.cache_bytes:
                self._cached -= self._cache.popitem(last=False)[1].nbytes


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _value(column: pa.ChunkedArray, index: int) -> Any:
    scalar = column[index]
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return scalar.as_buffer() if scalar.is_valid else None
    return scalar.as_py()
