"""What the demo's page says around its figures."""

from __future__ import annotations

from dataclasses import dataclass

FIGURES = (
    "Digit accuracy: a classifier that never saw the held-out handwriting reads the caption's "
    "digit. Direction accuracy: the ink moves one pixel a frame the way the caption says. Frechet "
    "distance: classifier features of all frames against held-out real clips; real training clips "
    "give the value that perfect samples would have. The teacher is solved by guided Euler steps "
    "(two passes a step); the student needs no guidance. Milliseconds a clip: wall-clock, in "
    "batches on all cores. Diversity: spread of features within a digit, relative to real clips. "
    "Known captions: those of the training; all other rows are asked in other words, "
    "which no training caption has."
)
_CLIPS = (
    "The same captions everywhere. No training saw them, nor the handwriting of the real clips."
)


@dataclass(frozen=True)
class Words:
    """Text of one page, and which rows its moving picture shows.

    Args:
        title: of the terminal's table.
        about: what was done.
        figures: what the columns mean.
        clips: what the grids show.
        progress: what the curves of the figures show.
        gif: titles of the rows in ``clips.gif``, from left to right.
        begins: runs whose last checkpoint alone is marked, by the run's name.
    """

    title: str = "Moving digits"
    about: str = (
        "Real handwritten digits (scikit-learn's load_digits) made into captioned mp4 clips, "
        "preprocessed, and captions from which a small Wan video diffusion transformer makes such "
        "clips. A student is distilled from it (knowledge distillation, then DMD2) that makes them "
        "in 4 steps, or 2, in place of 48."
    )
    figures: str = FIGURES
    clips: str = _CLIPS
    progress: str = (
        "Figures at the end of knowledge distillation (kd) and at steps of DMD2; dashed: the "
        "teacher at its most steps."
    )
    gif: tuple[str, ...] = (
        "real, held out",
        "teacher, 48 steps",
        "teacher, 4 steps",
        "student, 4 steps",
    )
    begins: tuple[str, ...] = ("kd",)
