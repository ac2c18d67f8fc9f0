"""Knowledge distillation: a few-step student learns where the teacher's ODE paths end.

Luhman and Luhman, arXiv 2101.02388; the initialisation of DMD2's and CausVid's students. With x_t a
state of the teacher's path at one of the student's timesteps and x_0 the path's end:

    minimise 1/2 ||x0(x_t, t) - x_0||^2,   x0(x_t, t) = x_t - sigma v(x_t, t).

The paths are made once, before the first step, and kept on disk (``ode_paths``); the teacher is let
go then, and is not built at all where they are complete.

Legend: B batch, C channels, T latent frames, H W latent size, K timesteps of the student.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.log import get_logger
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.role import Role
from megagen.methods import ode_paths
from megagen.methods.base import (
    Preparation,
    RunFacts,
    StepResult,
    TrainingMethod,
)
from megagen.methods.few_step import Share, check_in_range, draw_keys, x0_of
from megagen.methods.ode_paths import TEACHERS, PathMaker, PathPlan, PathReader
from megagen.methods.path_options import PathOptions
from megagen.models.base import ModelPlugin, Request

log = get_logger(__name__)


class KDOptions(PathOptions):
    """Options of ``KDMethod``: ``PathOptions`` and the following.

    Attributes:
        student_step_per: what one choice of the trained timestep is for: a sample, a micro_batch
            (FastVideo) or the step.
    """

    student_step_per: Share = "sample"


class KDMethod(TrainingMethod):
    """Regression of the student's x0 to the ends of the teacher's paths."""

    Options = KDOptions
    options: KDOptions
    required_roles = ("student",)
    optional_roles = TEACHERS

    def __init__(
        self,
        roles: Mapping[str, Role],
        options: KDOptions,
        streams: Streams,
        facts: RunFacts | None = None,
    ) -> None:
        super().__init__(roles, options, streams, facts)
        plan = self.facts.preparation.work
        assert isinstance(plan, PathPlan), "survey comes before"
        self.plan, self.paths = plan, PathReader(options, plan)
        log.info("student timesteps: %s", ", ".join(f"{t:g}" for t in plan.wanted))

    # -- before the first step ---------------------------------------------------------------------
    @classmethod
    def check(cls, options: Any, plugins: Mapping[str, ModelPlugin]) -> None:
        """The list of steps is on the teacher's grid; all networks serve what they are asked."""
        super().check(options, plugins)
        grid = options.grid(plugins)
        steps = [1000 * grid[place] for place in options.places(plugins)]
        check_in_range(steps, plugins["student"].timestep_range, from_noise=False)
        teachers = [plugins[name] for name in TEACHERS if name in plugins]
        for sigma in grid[:-1] if teachers else ():
            if not any(p.timestep_range[0] < 1000 * sigma <= p.timestep_range[1] for p in teachers):
                raise ConfigError(
                    f"no teacher serves timestep {1000 * sigma:g} of its path.",
                    remedy="Give both experts, as models.teacher and models.teacher_2.",
                    where="models",
                )

    @classmethod
    def needs_latents(cls, options: Any) -> bool:
        """Paths begin with noise."""
        return False

    @classmethod
    def survey(
        cls, options: Any, plugins: Mapping[str, ModelPlugin], streams: Streams, facts: RunFacts
    ) -> Preparation:
        """Which paths are missing; where none is, the teacher is idle."""
        plan = ode_paths.survey(options, plugins, streams, facts)
        idle = () if any(plan.missing) else tuple(name for name in TEACHERS if name in plugins)
        return Preparation(idle, plan)

    def prepare(self) -> Mapping[str, Role]:
        """Make the missing paths and let the teacher go."""
        teachers = [self.roles[name] for name in TEACHERS if name in self.roles]
        if teachers:
            PathMaker(self.options, teachers, self.streams, self.facts, self.plan).make_missing()
        self.roles = {"student": self.student}
        del teachers
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.roles

    # -- the algorithm -----------------------------------------------------------------------------
    def train_step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Draw, forward and backward over the micro-batches, update the student."""
        result = self.regress([self.draw(batch, step) for batch in batches], self.loss)
        result.metrics["kd_step_idx"] = result.metrics.pop("loss/step_idx")
        return result

    def draw(self, batch: Batch, step: int) -> Request:
        """The student's input and target: states of the paths at the timesteps drawn."""
        states_BKCTHW, x0_BCTHW = self.paths.read(batch)
        place = self.draw_step(batch, step).to(x0_BCTHW.device)  # [B] or [B, T]
        timesteps_K = torch.tensor(self.paths.timesteps, dtype=torch.float32, device=place.device)
        return Request(
            latents_BCTHW=states_at(states_BKCTHW, place),
            timestep=timesteps_K[place],
            condition=batch.condition,
            extra={"x0_BCTHW": x0_BCTHW, "step_idx": place.float().mean()},
        )

    def draw_step(self, batch: Batch, step: int) -> Tensor:
        """Which of the student's timesteps each sample is trained at, ``[B]`` in 0..K-1."""
        return self.integers(batch, step)

    def integers(self, batch: Batch, step: int, shape: Sequence[int] = ()) -> Tensor:
        """Numbers in 0..K-1, ``[B, *shape]``."""
        keys = draw_keys(self.options.student_step_per, batch.positions)
        return self.streams.integers("kd/step", step, keys, 0, len(self.paths.timesteps), shape)

    def loss(self, velocity_BCTHW: Tensor, request: Request) -> dict[str, Tensor]:
        """``1/2 mean (x0(x_t, t) - x_0)^2`` over all latent elements, fp32."""
        error = x0_of(velocity_BCTHW.float(), request) - request.extra["x0_BCTHW"]
        return {"loss": 0.5 * error.square().mean(), "step_idx": request.extra["step_idx"]}


def states_at(states_BKCTHW: Tensor, place: Tensor) -> Tensor:
    """Of each sample's states that at ``place`` ``[B]``, or each frame from its own, ``[B, T]``."""
    B, _, C, T, H, W = states_BKCTHW.shape
    place_BT = place.view(B, -1).expand(B, T)
    index = place_BT.view(B, 1, 1, T, 1, 1).expand(B, 1, C, T, H, W)
    return states_BKCTHW.gather(1, index)[:, 0]
