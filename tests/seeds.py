"""Seeds of random inputs: others in each run, shown with a failing test, repeated on demand."""

from __future__ import annotations

import os
import secrets


def fresh() -> int:
    """For one test, which prints it; ``MEGAGEN_TEST_SEED`` repeats it."""
    seed = int(os.environ.get("MEGAGEN_TEST_SEED", secrets.randbelow(2**31)))
    print(f"MEGAGEN_TEST_SEED={seed}")
    return seed


SHARED = fresh()
"""Of what several tests share and only the first of them makes: pytest's header names it."""
