"""A directory that is there whole or not at all: stage, hash, fsync, rename, mark.

A step is written to ``.staging-<name>`` beside its place. Every file's size and SHA-256 go into
``manifest.json``, all files and the directory are fsynced, one ``rename`` puts the directory in its
place and an empty ``COMPLETE`` file marks it. A step that exists already is never overwritten: it
is moved aside until the new one is in place. Reading never unpickles anything whose hash has not
been compared with the manifest.

Many ranks may write into one staging directory; each hashes the files it is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megagen.core.errors import CheckpointError
from megagen.core.log import get_logger

log = get_logger(__name__)

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
_STEP = re.compile(r"^step_(\d{8,})$")


@dataclass(frozen=True)
class FileHash:
    """One file of a checkpoint: path relative to its directory, size in bytes, SHA-256 hex."""

    path: str
    size: int
    sha256: str


def step_name(step: int) -> str:
    """Directory name of a step: ``step_00000200``."""
    return f"step_{step:08d}"


def staging_path(target: Path) -> Path:
    """Where ``target`` is written before it is committed."""
    return target.parent / f".staging-{target.name}"


def hash_file(root: Path, path: Path) -> FileHash:
    """Size and SHA-256 of ``path``, fsynced on the way."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return FileHash(str(path.relative_to(root)), size, digest.hexdigest())


def files_of(root: Path) -> list[Path]:
    """All files under ``root`` in a fixed order, the manifest and the mark left out."""
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name not in (MANIFEST, COMPLETE))


def commit(target: Path, hashes: Iterable[FileHash]) -> None:
    """Put the staged directory of ``target`` in its place, atomically. One process calls this.

    Args:
        target: final directory; its staging directory holds all files.
        hashes: one entry for each file there.
    """
    staging = staging_path(target)
    entries = [vars(h) for h in sorted(hashes, key=lambda h: h.path)]
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1))
    hash_file(staging, manifest)
    for directory in {staging, *(p.parent for p in files_of(staging))}:
        _fsync_directory(directory)
    aside = target.parent / f".replaced-{target.name}"
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    staging.rename(target)
    _fsync_directory(target.parent)
    (target / COMPLETE).touch()
    _fsync_directory(target)
    shutil.rmtree(aside, ignore_errors=True)


def recover(root: Path) -> None:
    """Mend what a killed writer left. One process calls this before anything is read.

    Staging directories go; a step moved aside comes back unless its successor is whole; a step that
    was renamed but not yet marked is marked when its manifest holds, and removed otherwise.
    """
    for leftover in root.glob(".staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for aside in root.glob(".replaced-*"):
        target = root / aside.name.removeprefix(".replaced-")
        if (target / COMPLETE).exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    for _, path in steps(root):
        if not (path / COMPLETE).exists():
            (path / COMPLETE).touch()
            try:
                verify(path)
            except CheckpointError as error:
                log.warning("interrupted checkpoint removed: %s", error)
                shutil.rmtree(path, ignore_errors=True)


def verify(directory: Path, *, hashes: bool = True) -> None:
    """Check a committed directory against its manifest.

    Args:
        directory: a committed directory.
        hashes: compare SHA-256 too, not only presence and size.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    if not (directory / COMPLETE).exists():
        raise CheckpointError(
            "is not marked complete: its writer was interrupted.",
            remedy="Use another step.",
            where=str(directory),
        )
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"has no readable {MANIFEST} ({error}).",
            remedy="Use another step.",
            where=str(directory),
        ) from None
    for entry in files:
        path = directory / entry["path"]
        if not path.is_file():
            raise CheckpointError("is missing.", remedy="Use another step.", where=str(path))
        if path.stat().st_size != entry["size"]:
            found = f"has {path.stat().st_size} bytes, the manifest says {entry['size']}."
            raise CheckpointError(found, remedy="Use another step.", where=str(path))
        if hashes and hash_file(directory, path).sha256 != entry["sha256"]:
            raise CheckpointError(
                "differs from its SHA-256 in the manifest: it is corrupt.",
                remedy="Use another step.",
                where=str(path),
            )


def steps(root: Path) -> list[tuple[int, Path]]:
    """The steps under ``root`` that bear a step's name, newest first, complete or not."""
    found = [(int(m[1]), p) for p in root.glob("step_*") if (m := _STEP.match(p.name))]
    return sorted(found, reverse=True)


def newest_valid(root: Path) -> Path | None:
    """The newest step that verifies; what was passed over is logged with its reason.

    Returns:
        The directory, or None where there is no step at all.

    Raises:
        CheckpointError: steps are there and none is valid: a silent fresh start would lose the run.
    """
    problems = []
    for _, path in steps(root):
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("checkpoint passed over: %s", error)
            problems.append(str(error))
        else:
            return path
    if problems:
        raise CheckpointError(
            f"holds checkpoints, none of them valid: {' '.join(problems)}",
            remedy="Restore one, or choose another output_dir to start anew.",
            where=str(root),
        )
    return None


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` complete steps; 0 keeps all."""
    complete = [p for _, p in steps(root) if (p / COMPLETE).exists()]
    for path in complete[keep:] if keep else []:
        (path / COMPLETE).unlink()  # first no longer valid, then gone
        shutil.rmtree(path, ignore_errors=True)


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
