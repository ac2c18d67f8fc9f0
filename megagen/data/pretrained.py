"""Loading other libraries' pretrained parts; their failures become errors a user can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megagen.core.errors import DataError


def load_pretrained(
    cls: Any,
    path: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """``cls.from_pretrained`` of a local directory or a hub id.

    Args:
        cls: a diffusers or transformers class.
        path: a directory, or a hub id where no such directory exists.
        subfolder: folder within ``path``; None: ``path`` itself.
        revision: git revision of a hub id.
        options: passed on.

    Raises:
        DataError: the directory lacks the part, or the hub cannot be reached.
    """
    where = f"{path}/{subfolder}" if subfolder else path
    if Path(path).is_dir() and not Path(where).is_dir():
        found = sorted(p.name for p in Path(path).iterdir() if p.is_dir())
        raise DataError(
            f"the directory has no {subfolder!r} folder (it has {found}).",
            remedy="Name the directory of a whole diffusers pipeline, or set the subfolder.",
            where=path,
        )
    if subfolder is not None:
        options["subfolder"] = subfolder
    if revision is not None:
        options["revision"] = revision
    try:
        return cls.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"cannot load {cls.__name__}: {str(error).strip().splitlines()[0]}",
            remedy="Name a local directory as diffusers saves it, or a hub id that can be reached.",
            where=where,
        ) from error
