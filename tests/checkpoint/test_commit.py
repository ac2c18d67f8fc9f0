"""A checkpoint is there whole or not at all, whatever happens while it is written."""

import os
import shutil
from pathlib import Path

import pytest

from megagen.checkpoint import commit
from megagen.core.errors import CheckpointError


def write(root: Path, step: int, payload: bytes = b"x" * 1000) -> Path:
    target = root / commit.step_name(step)
    staging = commit.staging_path(target)
    (staging / "state").mkdir(parents=True)
    (staging / "state" / "a.bin").write_bytes(payload)
    (staging / "trainer.json").write_text("{}")
    commit.commit(target, [commit.hash_file(staging, p) for p in commit.files_of(staging)])
    return target


def test_commit_verifies_and_is_found(tmp_path: Path) -> None:
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    commit.verify(newest)
    assert commit.newest_valid(tmp_path) == newest
    assert not list(tmp_path.glob(".*"))


def test_fresh_start_where_there_is_nothing(tmp_path: Path) -> None:
    assert commit.newest_valid(tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "state/a.bin").write_bytes(b"x" * 999 + b"y"), "SHA-256"),
        (lambda p: (p / "state/a.bin").write_bytes(b"x" * 999), "bytes"),
        (lambda p: (p / "state/a.bin").unlink(), "missing"),
        (lambda p: (p / commit.MANIFEST).unlink(), "manifest"),
        (lambda p: (p / commit.MANIFEST).write_text("{"), "manifest"),
        (lambda p: (p / commit.COMPLETE).unlink(), "interrupted"),
    ],
)
def test_damage_is_named_and_passed_over(tmp_path: Path, damage, message: str) -> None:
    good, bad = write(tmp_path, 5), write(tmp_path, 10)
    damage(bad)
    with pytest.raises(CheckpointError, match=message):
        commit.verify(bad)
    assert commit.newest_valid(tmp_path) == good
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match="none of them valid"):
        commit.newest_valid(tmp_path)


def test_rewriting_a_step_keeps_one_of_the_two(tmp_path: Path, monkeypatch) -> None:
    old = write(tmp_path, 5, b"old")
    real = Path.rename
    for survive in (0, 1):  # die before the old step is moved aside, and between the two renames
        renames = []

        def rename(self: Path, to: Path, limit: int = survive, log: list = renames) -> Path:
            if len(log) == limit:
                raise KeyboardInterrupt
            log.append(to)
            return real(self, to)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", rename)
            write(tmp_path, 5, b"new")
        commit.recover(tmp_path)
        assert commit.newest_valid(tmp_path) == old
        assert (old / "state/a.bin").read_bytes() == b"old"
        assert not list(tmp_path.glob(".*"))
    assert (write(tmp_path, 5, b"new") / "state/a.bin").read_bytes() == b"new"


def test_a_renamed_but_unmarked_step_is_marked_if_whole(tmp_path: Path) -> None:
    whole, torn = write(tmp_path, 5), write(tmp_path, 10)
    (whole / commit.COMPLETE).unlink()
    (torn / commit.COMPLETE).unlink()
    (torn / "state/a.bin").write_bytes(b"")
    commit.recover(tmp_path)
    assert commit.newest_valid(tmp_path) == whole and not torn.exists()


def test_killed_at_any_moment_never_goes_back(tmp_path: Path) -> None:
    """A child commits steps and is killed; what it said was done is there, byte for byte."""
    import random
    import signal
    import time

    delays = random.Random(0)
    reached = 0
    for _ in range(8):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            step = reached
            while True:
                step += 1
                write(tmp_path, step, str(step).encode() * 20_000)
                os.write(writer, b"%d\n" % step)
        time.sleep(delays.uniform(0.02, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writer)
        said = os.read(reader, 1 << 20).split()
        os.close(reader)
        reached = max(reached, int(said[-1]) if said else 0)
        commit.recover(tmp_path)
        found = commit.newest_valid(tmp_path)
        number = int(found.name.removeprefix("step_")) if found else 0
        assert number in (reached, reached + 1)
        if found:
            assert (found / "state/a.bin").read_bytes() == str(number).encode() * 20_000
        reached = number
    assert reached > 0


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    commit.prune(tmp_path, 0)
    assert [s for s, _ in commit.steps(tmp_path)] == [4, 3, 2, 1]
    commit.prune(tmp_path, 2)
    assert [s for s, _ in commit.steps(tmp_path)] == [4, 3]
