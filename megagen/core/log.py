"""Logging: stdlib loggers under ``megagen``, one line per event, rank 0 unless asked otherwise."""

from __future__ import annotations

import logging
import sys
from functools import cache

from megagen.core import process


class _MainRankOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or process.is_main()


def setup(level: int = logging.INFO) -> None:
    """Send megagen's log to stderr. Called by the command line, never by the library."""
    logger = logging.getLogger("megagen")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
        )
        handler.addFilter(_MainRankOnly())
        logger.addHandler(handler)
        logger.propagate = False


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: ``get_logger(__name__)``."""
    return logging.getLogger(name)


@cache
def warn_once(name: str, message: str) -> None:
    """Log a warning the first time this exact message is given (a fallback and its reason)."""
    logging.getLogger(name).warning(message)
