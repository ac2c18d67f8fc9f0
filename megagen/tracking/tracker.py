"""Metrics of a run: ``metrics.jsonl`` always, TensorBoard and wandb beside it.

A tracker may fail, training may not: an adapter that raises is dropped with one warning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megagen.core.errors import SetupError
from megagen.core.log import get_logger

log = get_logger(__name__)


class Tracker(Protocol):
    """Something that takes scalars and files of a step."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_video(self, name: str, path: Path, step: int, caption: str) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """``metrics.jsonl``: one JSON object a step, numbers unrounded.

    Args:
        path: the file; lines of steps after ``start_step`` (a crashed run's) are cut off.
        start_step: steps done so far.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if _step_of(line) <= start_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append ``{"step": step, **metrics}``."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def log_video(self, name: str, path: Path, step: int, caption: str) -> None:
        """Videos lie in the run folder already."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker:
    """TensorBoard event files under ``tracker/``."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise SetupError(
                "tensorboard is not installed.",
                remedy="pip install 'megagen[track]', or remove it from the list.",
                where="training.tracker.trackers",
            ) from None
        self._writer = SummaryWriter(str(directory))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_video(self, name: str, path: Path, step: int, caption: str) -> None:
        """The path and caption as text: the video itself lies in the run folder."""
        self._writer.add_text(name, f"{caption}: {path}", step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbTracker:
    """One wandb run; its id is kept in the run folder so that a resumed run continues it."""

    def __init__(self, directory: Path, project: str, name: str, entity: str, config: Any) -> None:
        try:
            import wandb
        except ImportError:
            raise SetupError(
                "wandb is not installed.",
                remedy="pip install 'megagen[track]', or remove it from the list.",
                where="training.tracker.trackers",
            ) from None
        directory.mkdir(parents=True, exist_ok=True)
        id_file = directory / "wandb_id"
        run_id = id_file.read_text() if id_file.exists() else wandb.util.generate_id()
        id_file.write_text(run_id)
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            name=name or None,
            entity=entity or None,
            id=run_id,
            resume="allow",
            dir=str(directory),
            config=config,
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One wandb step."""
        self._run.log(dict(metrics), step=step)

    def log_video(self, name: str, path: Path, step: int, caption: str) -> None:
        """Upload the video."""
        self._run.log({name: self._wandb.Video(str(path), caption=caption)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackers:
    """All trackers of a run, on rank 0; elsewhere an empty one.

    Args:
        always: trackers whose errors are the run's (``metrics.jsonl``).
        optional: trackers that are dropped when they raise.
    """

    def __init__(self, always: list[Tracker], optional: list[Tracker]) -> None:
        self._always, self._optional = always, optional

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Send scalars to all."""
        for tracker in self._always:
            tracker.log_metrics(metrics, step)
        self._each("log_metrics", metrics, step)

    def log_video(self, name: str, path: Path, step: int, caption: str) -> None:
        """Send a video to all."""
        self._each("log_video", name, path, step, caption)

    def close(self) -> None:
        """Close all."""
        for tracker in self._always:
            tracker.close()
        self._each("close")

    def _each(self, method: str, *args: Any) -> None:
        for tracker in list(self._optional):
            try:
                getattr(tracker, method)(*args)
            except Exception as error:  # a tracker's failure must not stop the run
                log.warning("%s dropped: %s", type(tracker).__name__, error)
                self._optional.remove(tracker)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line torn by a crash goes
