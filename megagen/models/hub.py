"""Where a checkpoint's files are: a local diffusers directory, or a hub id that is downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagen.core.errors import CheckpointError


def local_directory(source: str | Path, patterns: Sequence[str], *, where: str = "") -> Path:
    """``source`` itself where it is a directory, else the snapshot of the hub repository it names.

    Args:
        source: a directory, or ``owner/name``.
        patterns: files to download, as globs.
        where: config key, for the error.

    Raises:
        CheckpointError: neither, or the download failed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(
            f"no directory {str(source)!r}.",
            remedy="Give a diffusers directory, or a hub id owner/name.",
            where=where,
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        raise CheckpointError(
            f"no directory {str(source)!r}, and the hub does not give it: {error}",
            remedy="Check the name, the network and the access token.",
            where=where,
        ) from None


def component_directory(
    source: str | Path,
    subfolder: str | None,
    default: str,
    patterns: Sequence[str],
    *,
    where: str = "",
) -> Path:
    """The directory of one part (``transformer``) of a pipeline; ``source`` where it is that.

    Args:
        source: a pipeline's or a part's directory, or a hub id.
        subfolder: the part, where said.
        default: the part looked for otherwise.
        patterns: files of the part to download.
        where: config key, for the error.
    """
    name = subfolder if subfolder is not None else default
    wanted = [*patterns, *(f"{name}/{p}" for p in patterns), "*.json", "*/*.json"]
    root = local_directory(source, wanted, where=where)
    if subfolder is None and not (root / name).is_dir():
        return root
    if not (root / name).is_dir():
        if root.name == name and (root / "config.json").is_file():
            return root
        raise CheckpointError(
            f"{root} has no folder {name!r}.",
            remedy="Correct subfolder (or expert), or init_from.",
            where=where,
        )
    return root / name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ``CheckpointError`` names the file where it is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError("no such file.", where=str(path)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"not readable as JSON ({error}).", remedy="Fetch it again.", where=str(path)
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object.", remedy="Fetch it again.", where=str(path))
    return value
