"""The trackers that a config asks for."""

from __future__ import annotations

from pathlib import Path

from megagen.config.schema import RunConfig
from megagen.tracking.tracker import (
    JsonlTracker,
    TensorBoardTracker,
    Tracker,
    Trackers,
    WandbTracker,
)


def build_trackers(config: RunConfig, start_step: int) -> Trackers:
    """``metrics.jsonl`` and ``training.tracker.trackers``, for rank 0.

    Args:
        config: the run's config.
        start_step: steps done so far.
    """
    output_dir = Path(config.training.checkpoint.output_dir)
    options = config.training.tracker
    optional: list[Tracker] = []
    for name in options.trackers:
        directory = output_dir / "tracker" / name
        if name == "tensorboard":
            optional.append(TensorBoardTracker(directory))
        else:
            tree = config.model_dump(mode="json", by_alias=True)
            optional.append(
                WandbTracker(
                    directory, options.project_name, options.run_name, options.entity, tree
                )
            )
    return Trackers([JsonlTracker(output_dir / "metrics.jsonl", start_step)], optional)
