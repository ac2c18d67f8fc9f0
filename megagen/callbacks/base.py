"""Hooks around the training loop. A hook observes; what moves tensors belongs to loop or engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from megagen.core.options import StrictOptions

if TYPE_CHECKING:
    from megagen.trainer import Trainer


class Callback:
    """Base class: every hook does nothing.

    Args:
        options: the callback's own options.
    """

    Options: ClassVar[type[StrictOptions]] = StrictOptions

    def __init__(self, options: StrictOptions) -> None:
        self.options = options

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first step (after a resume); ``trainer.step`` steps are done."""

    def on_training_step_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """After each step; ``metrics`` are the step's, already averaged."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step, before the last checkpoint is written."""
