"""Consistency distillation: a student that goes from any point of an ODE path to the path's end.

Song et al., arXiv 2303.01469, algorithm 2, on a shifted grid 0 = s_0 < ... < s_N = 1. A sample is
noised to s_m, the guided teacher's ODE is solved for one step of k places (Luo et al., arXiv
2310.04378, section 4.3) down to x' at s_n, n = m - k, and with d a distance

    minimise  w(s_m) d(f(x_m, s_m), stop(f'(x', s_n))),   f(x, s) = x - s v(x, s).

f is x itself at s = 0, the boundary condition that ties paths to their ends. f' is the student's
moving average, or the student (Song and Dhariwal, arXiv 2310.14189, section 3.2).

Legend: B batch, C channels, T latent frames, H W latent size, K chunks of frames that share a
timestep (here one: the whole video), N places of the grid above 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from megagen.core import process
from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.role import Role
from megagen.fastgen.flow_matching import expand_like
from megagen.methods.base import RunFacts, StepResult, TrainingMethod
from megagen.methods.few_step import Share, draw_keys, noised, predict_x0, sigma_of, x0_of
from megagen.methods.scores import Unconditional, UncondOptions
from megagen.models.base import ModelPlugin, Passes, Request
from megagen.sampling import flow


class ConsistencyOptions(StrictOptions):
    """Options of ``ConsistencyMethod``.

    Attributes:
        grid_steps: N, steps of the grid of timesteps from noise to data (FastVideo's discrete_cd_N,
            which leaves out the last one, to 0).
        skip_steps: k, places of the grid that the teacher's one step goes down; 1 to N.
        grid_flow_shift: shift of the grid, > 0; None: the student's ``flow_shift``.
        student_step_per: what one choice of the trained timestep is for: a sample, a micro_batch or
            the step.
        solver: of the teacher's step: euler, or heun (two evaluations; euler where it ends at 0).
        teacher_guidance_scale: 1 makes no unconditional pass.
        cfg_uncond: what unconditional passes see.
        target_weights: of f': the ema of ``callbacks.ema``, or the student's as they are.
        distance: d over the D elements of a chunk: l2, ||x - y||^2 / D, or pseudo_huber,
            sqrt(||x - y||^2 / D + c^2) - c (Song and Dhariwal, section 3.3, divided by sqrt(D)).
        huber_c: c of pseudo_huber, > 0.
        loss_weighting: w: none, or inverse_step, 1 / (s_m - s_n) scaled to mean 1 over the draws
            (Song and Dhariwal, section 3.1).
    """

    grid_steps: int = Field(48, ge=1)
    skip_steps: int = Field(1, ge=1)
    grid_flow_shift: float | None = Field(None, gt=0)
    student_step_per: Share = "sample"
    solver: Literal["euler", "heun"] = "euler"
    teacher_guidance_scale: float = Field(1.0, ge=0)
    cfg_uncond: UncondOptions = UncondOptions()
    target_weights: Literal["ema", "student"] = "ema"
    distance: Literal["l2", "pseudo_huber"] = "l2"
    huber_c: float = Field(0.00054, gt=0)
    loss_weighting: Literal["none", "inverse_step"] = "none"

    def sigmas(self, plugins: Mapping[str, ModelPlugin]) -> list[float]:
        """The grid from the noisiest level that all networks serve down to 0.

        Raises:
            ConfigError: it is shorter than a step, or a network does not serve its lower end.
        """
        for name, plugin in plugins.items():
            low, high = plugin.timestep_range
            if low > 0:
                raise ConfigError(
                    f"serves timesteps from {low:g} to {high:g}: paths would not reach their ends.",
                    remedy="Give an expert that serves the low ones, or a network without experts.",
                    where=f"models.{name}.expert",
                )
        shift = self.grid_flow_shift
        grid = flow.shifted_sigmas(
            self.grid_steps, plugins["student"].flow_shift if shift is None else shift
        )
        top = min(plugin.timestep_range[1] for plugin in plugins.values())
        served = [sigma for sigma in grid if 1000 * sigma <= top]
        if self.skip_steps >= len(served):
            raise ConfigError(
                f"is {self.skip_steps}; the grid has {len(served) - 1} steps below timestep "
                f"{top:g}.",
                remedy="Take a smaller number, or more grid_steps.",
                where="method.skip_steps",
            )
        return served


class ConsistencyMethod(TrainingMethod):
    """One step of the teacher's ODE, and the student's ends of the path before and after it."""

    Options = ConsistencyOptions
    options: ConsistencyOptions
    required_roles = ("student", "teacher")

    def __init__(
        self,
        roles: Mapping[str, Role],
        options: ConsistencyOptions,
        streams: Streams,
        facts: RunFacts | None = None,
    ) -> None:
        super().__init__(roles, options, streams, facts)
        if self.needs_ema(options) and self.student.ema is None:
            raise ConfigError(
                "is ema, but the student has no moving average.",
                remedy="Add callbacks.ema, or set this to student.",
                where="method.target_weights",
            )
        self.unconditional = Unconditional(
            options.cfg_uncond,
            self.facts.unconditional,
            needed=options.teacher_guidance_scale != 1,
        )
        sigmas = options.sigmas({name: role.plugin for name, role in roles.items()})
        # networks see float32
        self.timesteps_N = (1000 * torch.tensor(sigmas, dtype=torch.float64)).float()
        self.weights_N = self.step_weights()

    @classmethod
    def check(cls, options: Any, plugins: Mapping[str, ModelPlugin]) -> None:
        """The grid has a step that all networks serve."""
        super().check(options, plugins)
        options.sigmas(plugins)

    @classmethod
    def needs_ema(cls, options: Any) -> bool:
        """The target's weights."""
        return options.target_weights == "ema"

    @classmethod
    def passes(cls, options: Any) -> dict[str, Passes]:
        """The student is asked for the target too; guidance and heun double the teacher's."""
        of_teacher = 1 + (options.teacher_guidance_scale != 1)
        return {
            "student": Passes(1.0, 1.0),
            "teacher": Passes(float(of_teacher * (1 + (options.solver == "heun")))),
        }

    # -- the algorithm -----------------------------------------------------------------------------
    def train_step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Draw, one step of the teacher, the ends of its paths, update of the student."""
        noisy = [self.draw(batch, step) for batch in batches]
        targets = self.targets(self.solve(noisy))
        pairs = zip(noisy, targets, strict=True)
        requests = [r.with_(extra={**r.extra, "target_BCTHW": x0}) for r, x0 in pairs]
        return self.regress(requests, self.loss)

    def draw(self, batch: Batch, step: int) -> Request:
        """The noised samples at s_m, the timestep of s_n, and w: all random numbers of a step."""
        x0_BCTHW = self.student.plugin.normalize(batch.clean_latents().float())
        x0_BCTHW = x0_BCTHW.to(process.device())
        eps = self.streams.normal("noise", step, batch.positions, batch.latent_shape)
        lengths = [len(chunk) for chunk in self.chunks(batch.latent_shape[1])]
        place_BK = self.draw_place(batch, step, len(lengths))
        below_BK = place_BK + self.options.skip_steps
        return noised(
            x0_BCTHW,
            eps.to(x0_BCTHW),
            over_frames(self.timesteps_N[place_BK], lengths).to(x0_BCTHW.device),
            self.condition(batch, step, x0_BCTHW),
            {
                "timestep_below": over_frames(self.timesteps_N[below_BK], lengths).to(x0_BCTHW),
                "weight_BK": self.weights_N[place_BK].to(x0_BCTHW),
            },
        )

    def draw_place(self, batch: Batch, step: int, num_chunks: int) -> Tensor:
        """The place of the grid that each chunk is noised to, from the noisiest on, ``[B, K]``."""
        keys = draw_keys(self.options.student_step_per, batch.positions)
        count = len(self.weights_N)
        return self.streams.integers("consistency/place", step, keys, 0, count, [num_chunks])

    def solve(self, noisy: Sequence[Request]) -> list[Request]:
        """The teacher's ODE from s_m down to s_n, without gradient."""
        first = self.velocities(noisy)
        below = [stepped(r, v) for r, v in zip(noisy, first, strict=True)]
        if self.options.solver == "euler":
            return below
        found = []
        for start, end, v, w in zip(noisy, below, first, self.velocities(below), strict=True):
            reaches_data = expand_like(sigma_of(end) == 0, v)  # no network knows the velocity there
            found.append(stepped(start, torch.where(reaches_data, v, (v + w) / 2)))
        return found

    def velocities(self, requests: Sequence[Request]) -> list[Tensor]:
        """The guided teacher's; both passes of all micro-batches go through it in one go."""
        teacher, scale = self.roles["teacher"], self.options.teacher_guidance_scale
        if scale == 1:
            return teacher.predict(requests)
        found = teacher.predict([*requests, *map(self.without_prompt, requests)])
        pairs = zip(found[: len(requests)], found[len(requests) :], strict=True)
        return [flow.guide(cond, uncond, scale) for cond, uncond in pairs]

    def targets(self, below: Sequence[Request]) -> list[Tensor]:
        """f'(x', s_n), without gradient."""
        if self.options.target_weights == "student":
            return predict_x0(self.student, below)
        assert self.student.ema is not None
        with self.student.ema.swapped():
            return predict_x0(self.student, below)

    def loss(self, velocity_BCTHW: Tensor, request: Request) -> dict[str, Tensor]:
        """``w d(f(x_m, s_m), target)``, mean over samples and frames, fp32."""
        error = x0_of(velocity_BCTHW.float(), request) - request.extra["target_BCTHW"]
        lengths = [len(chunk) for chunk in self.chunks(error.shape[2])]
        parts = [part.square().mean((1, 2, 3, 4)) for part in error.split(lengths, dim=2)]
        distance_BK = torch.stack(parts, dim=1)
        if self.options.distance == "pseudo_huber":
            c = self.options.huber_c
            # sqrt(d + c^2) - c, without cancellation
            distance_BK = distance_BK / ((distance_BK + c**2).sqrt() + c)
        share_K = distance_BK.new_tensor(lengths) / sum(lengths)
        return {"loss": (share_K * request.extra["weight_BK"] * distance_BK).sum(1).mean()}

    def step_weights(self) -> Tensor:
        """w of each place of the grid that can be drawn, counted from the noisiest."""
        skip, sigmas_N = self.options.skip_steps, self.timesteps_N.double() / 1000
        weights = torch.ones_like(sigmas_N[skip:])
        if self.options.loss_weighting == "inverse_step":
            weights = 1 / (sigmas_N[:-skip] - sigmas_N[skip:])
        return (weights / weights.mean()).float()

    # -- what a causal student does otherwise ------------------------------------------------------
    def chunks(self, num_frames: int) -> list[range]:
        """Frames that share a timestep: all."""
        return [range(num_frames)]

    def condition(self, batch: Batch, step: int, x0_BCTHW: Tensor) -> Mapping[str, Tensor]:
        """What all networks are told beside the noised sample."""
        return batch.condition

    def without_prompt(self, request: Request) -> Request:
        """The request of an unconditional pass."""
        return self.unconditional(request)


def stepped(request: Request, velocity: Tensor) -> Request:
    """``x + (s_n - s_m) v``, the request at the timestep below it."""
    below = request.with_(timestep=request.extra["timestep_below"])
    x = request.latents_BCTHW
    change = expand_like(sigma_of(below) - sigma_of(request), x)
    return below.with_(latents_BCTHW=(x.double() + change * velocity.double()).to(x.dtype))


def over_frames(x_BK: Tensor, lengths: Sequence[int]) -> Tensor:
    """Values of chunks for each of their frames, ``[B, T]``; ``[B]`` where there is one chunk."""
    if len(lengths) == 1:
        return x_BK[:, 0]
    return x_BK.repeat_interleave(torch.tensor(lengths), dim=1)
