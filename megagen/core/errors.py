"""Errors a user can act on.

Each one names the thing (a config key, a file), the value found and the remedy. The command line
prints them as one paragraph without a traceback and exits with code 2. A programmer's mistake is an
``AssertionError`` or ``ValueError`` and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MegagenError(Exception):
    """Base of every error that is the user's to mend.

    Args:
        message: one or two sentences: what is wrong, and the value found.
        remedy: what would be right, or what to run.
        where: the config key path or the file concerned.
    """

    exit_code = 2

    def __init__(self, message: str, *, remedy: str = "", where: str = "") -> None:
        self.message, self.remedy, self.where = message, remedy, where
        head = f"{where}: {message}" if where else message
        super().__init__(f"{head} {remedy}".strip())


class ConfigError(MegagenError):
    """A run config key is unknown, has a value out of range, or contradicts another key."""


class CheckpointError(MegagenError):
    """A checkpoint or weights directory is missing, incomplete, corrupt or of another shape."""


class DataError(MegagenError):
    """A dataset, clip or cache cannot be used."""


class SetupError(MegagenError):
    """Something that the run needs is not installed or not present on this machine."""


def suggest(name: str, allowed: Iterable[str]) -> str:
    """One clause that helps with a misspelt ``name``: the nearest allowed names, or all of them.

    >>> suggest("tp_sise", ["tp_size", "cp_size"])
    "did you mean 'tp_size'?"
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"allowed: {', '.join(names)}." if names else "nothing is allowed here."
