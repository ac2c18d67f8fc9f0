"""The ring between the producer and two consumers, and what happens where it is not kept to."""

from __future__ import annotations

import pytest

from tests import seeds
from tests.kernels.cuda.emulated import Emulated

pytestmark = pytest.mark.timeout(900)  # the first one waits for g++
IMPATIENT, TOO_FAR, TOO_EARLY, FORGETFUL, WRONG_PHASE = range(1, 6)


def walk(built: Emulated, fault: int, seed: int, lists: int = 6, longest: int = 40) -> str | None:
    built.configure(seed)
    problem = built.machine.emulator_protocol(fault, seed, lists, longest)
    return None if problem is None else problem.decode()


@pytest.mark.parametrize("longest", [0, 3, 40])
def test_every_entry_reaches_its_owner_and_nobody_waits_forever(
    built: Emulated, longest: int
) -> None:
    for _ in range(8):
        seed = seeds.fresh()
        assert walk(built, 0, seed, longest=longest) is None, seed


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (IMPATIENT, "hold|arrival|own entries|nobody"),
        (TOO_FAR, "nobody can go on"),
        (TOO_EARLY, "hold"),
        (FORGETFUL, "nobody can go on"),
        (WRONG_PHASE, "hold|arrival|other side"),
    ],
)
def test_faults_are_noticed(built: Emulated, fault: int, words: str) -> None:
    problems = [walk(built, fault, seed) for seed in range(12)]
    noticed = [p for p in problems if p is not None]
    assert noticed, "no schedule showed the fault"
    assert any(word in p for p in noticed for word in words.split("|")), noticed
