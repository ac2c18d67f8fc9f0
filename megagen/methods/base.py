"""What a training method is: four moments over roles.

``draw`` (every random number of the step, before any forward), ``targets`` (passes without gradient
over other roles), ``loss`` (student or critic output against the targets, per micro-batch),
``update`` (which roles step). Random draws depend on the run's seed, the step and the samples'
positions alone, so all ranks of a model-parallel group agree without talking and a resumed step is
the same step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.head import Head
from megagen.engine.role import LossFn, Role
from megagen.engine.settings import OptimizerSettings
from megagen.models.base import ModelPlugin, Passes, Request
from megagen.models.heads import HeadsLoad


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


class Samples(Protocol):
    """The run's dataset, sample by sample; a sample's key is its number there."""

    def key_groups(self) -> list[list[int]]:
        """Every key; one list for each shape of latents."""

    def batch_of(self, keys: Sequence[int]) -> Batch:
        """These samples, all of one shape; ``positions`` are the keys."""

    def provenance(self) -> dict[str, Any]:
        """What the samples are, as JSON."""


@dataclass(frozen=True)
class Preparation:
    """What is to be done before the first step, as rank 0 found it.

    Args:
        idle: roles of ``models`` that the run can do without; they are not built.
        work: the method's own.
    """

    idle: tuple[str, ...] = ()
    work: Any = None


@dataclass(frozen=True)
class RunFacts:
    """What a method may know of the run beside its roles and options.

    Args:
        output_dir: the run folder.
        unconditional: embeddings ``[L, D]`` of the ``empty`` and the ``negative`` prompt, as far as
            the dataset has them.
        optimizer: ``training.optimizer`` over all steps of the run, for what a method trains beside
            its roles.
        samples: the dataset; None where there is none.
        identity: what a role's first weights are, as JSON: equal where they are.
        data_place: (data rank, data ranks) of this rank.
        is_writer: whether this is the rank that writes files for its data rank.
        preparation: what ``survey`` found.
    """

    output_dir: Path = Path()
    unconditional: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: OptimizerSettings | None = None
    samples: Samples | None = None
    identity: Callable[[str], dict[str, Any]] | None = None
    data_place: tuple[int, int] = (0, 1)
    is_writer: bool = True
    preparation: Preparation = Preparation()


class TrainingMethod(ABC):
    """An algorithm over named roles.

    Args:
        roles: the run's networks by role name.
        options: this method's own options.
        streams: the run's seeded streams.
        facts: what else the run knows.
    """

    Options: ClassVar[type[StrictOptions]]
    options: Any
    required_roles: ClassVar[tuple[str, ...]] = ("student",)
    optional_roles: ClassVar[tuple[str, ...]] = ()
    trained_roles: ClassVar[tuple[str, ...]] = ("student",)

    def __init__(
        self,
        roles: Mapping[str, Role],
        options: StrictOptions,
        streams: Streams,
        facts: RunFacts | None = None,
    ) -> None:
        self.check_roles(tuple(roles))
        self.roles, self.options, self.streams = roles, options, streams
        self.facts = facts or RunFacts()

    @classmethod
    def check_roles(cls, names: Sequence[str]) -> None:
        """Raise ``ConfigError`` where ``models`` lacks a role of this method or has too many."""
        missing = [r for r in cls.required_roles if r not in names]
        extra = [r for r in names if r not in cls.required_roles + cls.optional_roles]
        if missing or extra:
            may = f" (and perhaps {', '.join(cls.optional_roles)})" if cls.optional_roles else ""
            raise ConfigError(
                f"{cls.__name__} works on the roles {', '.join(cls.required_roles)}{may}; "
                f"found {', '.join(names)}.",
                remedy="Add or remove roles.",
                where="models",
            )

    @classmethod
    def check(cls, options: Any, plugins: Mapping[str, ModelPlugin]) -> None:
        """Raise ``ConfigError`` where the options do not suit the models; no rank has started."""
        cls.check_roles(tuple(plugins))
        channels = {name: plugin.in_channels for name, plugin in plugins.items()}
        if len(set(channels.values())) > 1:
            raise ConfigError(
                f"work on latents of different channels: {channels}.",
                remedy="Take networks of one latent space.",
                where="models",
            )

    @classmethod
    def needs_latents(cls, options: Any) -> bool:
        """Whether the dataset must hold latents, and not texts alone."""
        return True

    @classmethod
    def needs_ema(cls, options: Any) -> bool:
        """Whether the student must have a moving average (``callbacks.ema``)."""
        return False

    @classmethod
    def survey(
        cls, options: Any, plugins: Mapping[str, ModelPlugin], streams: Streams, facts: RunFacts
    ) -> Preparation:
        """What is to be done before the first step. Rank 0 alone looks; nothing is built yet."""
        return Preparation()

    @classmethod
    def num_updates(cls, options: Any, role: str, num_steps: int) -> int:
        """Updates of ``role`` in a run of ``num_steps``: what its learning rate runs over."""
        return num_steps

    @classmethod
    def optimizer_options(cls, options: Any, role: str) -> dict[str, Any]:
        """Keys of ``training.optimizer`` that the method's own options set for ``role``."""
        return {}

    @classmethod
    def passes(cls, options: Any) -> dict[str, Passes]:
        """What a step asks of each role: for plans and measured FLOP/s."""
        return {name: Passes(training=1.0) for name in cls.trained_roles}

    @classmethod
    def heads_load(cls, options: Any, plugins: Mapping[str, ModelPlugin]) -> HeadsLoad | None:
        """What is trained beside the roles, for plans; None: nothing."""
        return None

    def prepare(self) -> Mapping[str, Role]:
        """Do what ``survey`` found, before the first step; collective.

        Returns:
            The roles that are needed from here on.
        """
        return self.roles

    @abstractmethod
    def train_step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """One step over this data rank's micro-batches; ``step`` counts from 0."""

    @property
    def heads(self) -> Mapping[str, Head]:
        """What is trained beside the roles; kept in checkpoints under these names."""
        return {}

    # -- helpers shared by methods -----------------------------------------------------------------
    @property
    def student(self) -> Role:
        """The network that is trained."""
        return self.roles["student"]

    def regress(self, requests: Sequence[Request], loss_fn: LossFn) -> StepResult:
        """One update of the student by the mean of a loss over ``requests``."""
        self.student.zero_grad()
        losses = self.student.forward_backward(requests, loss_fn)
        info = self.student.step()
        metrics = mean_metrics(losses, "loss") | {
            "grad_norm/student": info.grad_norm,
            "lr/student": info.learning_rate,
        }
        metrics["loss/total"] = metrics.pop("loss/loss")
        return StepResult(metrics, skipped=("student",) if info.skipped else ())


def mean_metrics(losses: Sequence[Mapping[str, Tensor | float]], prefix: str) -> dict[str, float]:
    """Mean over micro-batches of each loss term, as ``<prefix>/<name>`` floats."""
    if not losses:
        return {}
    return {
        f"{prefix}/{name}": sum(float(term[name]) for term in losses) / len(losses)
        for name in losses[0]
    }
