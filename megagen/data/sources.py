"""Where clips come from: a folder of videos and what captions lie beside them.

A caption is looked for in this order:

1. metadata files anywhere in the folder: ``captions``, ``metadata`` or ``videos2caption`` with the
   ending ``.csv``, ``.jsonl`` or ``.json`` (a list of objects). File names in them are relative to
   the metadata file or to a ``videos`` folder beside it; columns go by the aliases below.
2. a text file of the clip's name: ``clip.txt`` beside ``clip.mp4``.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagen.core.errors import DataError
from megagen.core.log import get_logger
from megagen.data.video import VIDEO_SUFFIXES

log = get_logger(__name__)

METADATA_STEMS = ("captions", "metadata", "videos2caption")
METADATA_SUFFIXES = (".csv", ".jsonl", ".json")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "video", "video_path", "filepath")
CAPTION_COLUMNS = ("caption", "text", "prompt", "cap", "description")


@dataclass(frozen=True)
class Clip:
    """One video file and its caption.

    Args:
        id: file name relative to the folder, without its ending where that is unambiguous.
        file_name: path relative to the folder, with forward slashes.
        path: where it is.
        caption: None where there is none, or an empty one.
    """

    id: str
    file_name: str
    path: Path
    caption: str | None


def find_clips(folder: str | Path) -> list[Clip]:
    """Every video in a folder and its sub-folders, and every one that its metadata names, sorted.

    Raises:
        DataError: no such folder, no video in it, or a metadata file that cannot be understood.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError("no such folder.", remedy="Name a folder of videos.", where=str(folder))
    named = _captions_by_metadata(root)
    files = {
        p for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and not _hidden(p, root)
    }
    names = sorted({p.relative_to(root).as_posix() for p in files if p.is_file()} | set(named))
    if not names:
        raise DataError(
            f"no video in the folder (looked for {', '.join(VIDEO_SUFFIXES)}).",
            remedy="Name a folder of videos.",
            where=str(folder),
        )
    stems = Counter(_without_suffix(name) for name in names)
    return [
        Clip(
            id=_without_suffix(name) if stems[_without_suffix(name)] == 1 else name,
            file_name=name,
            path=root / name,
            caption=named[name] if name in named else _sidecar(root / name),
        )
        for name in names
    ]


def _captions_by_metadata(root: Path) -> dict[str, str | None]:
    captions: dict[str, str | None] = {}
    for path in sorted(root.rglob("*")):
        wanted = path.stem.lower() in METADATA_STEMS and path.suffix.lower() in METADATA_SUFFIXES
        if not wanted or not path.is_file() or _hidden(path, root):
            continue
        for number, row in _rows(path):
            name = _file_name(path, number, row, root)
            if name in captions:
                log.warning("%s, entry %d: %s is named twice, the first counts", path, number, name)
                continue
            captions[name] = _caption(path, row)
    return captions


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(entry number from 1, entry) of a metadata file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows: list[Any]
        if path.suffix.lower() == ".csv":
            rows = list(csv.DictReader(text.splitlines(keepends=True)))
        elif path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(
            f"cannot be read ({error}).", remedy="Mend or remove the file.", where=str(path)
        ) from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            "is no list of objects.",
            remedy='Write [{"file_name": "a.mp4", "caption": "..."}, ...].',
            where=str(path),
        )
    return enumerate(rows, 1)


def _file_name(path: Path, number: int, row: Mapping[str, Any], root: Path) -> str:
    column = _column(path, row, FILE_COLUMNS, "the video file")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"entry {number} has an empty {column!r}.", where=str(path))
    beside, below = path.parent / value.strip(), path.parent / "videos" / value.strip()
    file = Path(os.path.normpath(below if below.is_file() and not beside.is_file() else beside))
    if not file.is_relative_to(os.path.normpath(root)):
        raise DataError(
            f"entry {number} names {value!r}, which is outside of {root}.",
            remedy="Name files relative to the metadata file.",
            where=str(path),
        )
    return file.relative_to(os.path.normpath(root)).as_posix()


def _caption(path: Path, row: Mapping[str, Any]) -> str | None:
    value = row[_column(path, row, CAPTION_COLUMNS, "the caption")]
    if isinstance(value, list):  # FastVideo's videos2caption.json holds lists of captions
        value = next((v for v in value if v), None)
    return (value.strip() or None) if isinstance(value, str) else None


def _column(path: Path, row: Mapping[str, Any], aliases: tuple[str, ...], what: str) -> str:
    found = next((name for name in aliases if name in row), None)
    if found is None:
        raise DataError(
            f"has no column for {what}; it has {[str(k) for k in row]}.",
            remedy=f"Name it one of {', '.join(aliases)}.",
            where=str(path),
        )
    return found


def _sidecar(path: Path) -> str | None:
    file = path.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s: cannot be read (%s), the clip counts as having no caption", file, error)
        return None


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _without_suffix(name: str) -> str:
    return name.rpartition(".")[0] or name
