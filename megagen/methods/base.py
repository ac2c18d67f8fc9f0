"""What a training method is: four moments over roles.

``draw`` (every random number of the step, before any forward), ``targets`` (passes without gradient
over other roles), ``loss`` (student or critic output against the targets, per micro-batch),
``update`` (which roles step). Random draws depend on the run's seed, the step and the samples'
positions alone, so all ranks of a model-parallel group agree without talking and a resumed step is
the same step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.role import Role


@dataclass
class StepResult:
    """What one training step reports.

    Args:
        metrics: scalars by name (``loss/total``, ``grad_norm/student``, ``lr/student``...), this
            data rank's mean over its micro-batches; the trainer averages ``loss/*`` over data
            ranks.
        skipped: roles whose update was skipped because a loss or gradient was not finite.
    """

    metrics: dict[str, float]
    skipped: tuple[str, ...] = field(default=())


class TrainingMethod(ABC):
    """An algorithm over named roles.

    Args:
        roles: the run's networks by role name.
        options: this method's own options.
        streams: the run's seeded streams.
    """

    Options: ClassVar[type[StrictOptions]]
    required_roles: ClassVar[tuple[str, ...]] = ("student",)
    trained_roles: ClassVar[tuple[str, ...]] = ("student",)

    def __init__(self, roles: Mapping[str, Role], options: StrictOptions, streams: Streams) -> None:
        self.check_roles(tuple(roles))
        self.roles, self.streams = roles, streams

    @classmethod
    def check_roles(cls, names: Sequence[str]) -> None:
        """Raise ``ConfigError`` where ``models`` lacks a role of this method or has too many."""
        missing = [r for r in cls.required_roles if r not in names]
        extra = [r for r in names if r not in cls.required_roles]
        if missing or extra:
            raise ConfigError(
                f"{cls.__name__} works on the roles {', '.join(cls.required_roles)}; "
                f"found {', '.join(names)}.",
                remedy="Add or remove roles.",
                where="models",
            )

    @abstractmethod
    def train_step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """One step over this data rank's micro-batches; ``step`` counts from 0."""

    # -- helpers shared by methods -----------------------------------------------------------------
    @property
    def student(self) -> Role:
        """The network that is trained."""
        return self.roles["student"]


def mean_metrics(losses: Sequence[Mapping[str, Tensor | float]], prefix: str) -> dict[str, float]:
    """Mean over micro-batches of each loss term, as ``<prefix>/<name>`` floats."""
    if not losses:
        return {}
    return {
        f"{prefix}/{name}": sum(float(term[name]) for term in losses) / len(losses)
        for name in losses[0]
    }
