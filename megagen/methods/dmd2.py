"""DMD2: a few-step student whose samples, noised, are distributed as the teacher's.

Yin et al., arXiv 2405.14867. With ``x0`` the student's sample, ``x_t = (1 - sigma) x0 + sigma eps``
at a random score timestep, ``real`` the guided teacher's x0 at ``x_t`` and ``fake`` that of the
critic, a network that keeps learning the student's samples by flow matching:

    student:  minimise <x0, stop(g)>,  g = (fake - real) / mean|x0 - real|
    critic:   minimise ||v(x_t) - (eps - x0)||^2

Legend: B batch, C channels, T frames, H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megagen.core import process
from megagen.core.log import get_logger
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.role import Role
from megagen.fastgen.flow_matching import rf_alpha, rf_sigma
from megagen.fastgen.losses import dsm_loss, vsd_loss
from megagen.methods import few_step, scores
from megagen.methods.base import RunFacts, StepResult, TrainingMethod, mean_metrics
from megagen.methods.dmd2_options import DMD2Options
from megagen.methods.few_step import RolloutDraw, noised, x0_of
from megagen.methods.scores import Unconditional
from megagen.models.base import ModelPlugin, Request

log = get_logger(__name__)


@dataclass(frozen=True)
class Draw:
    """All random numbers of one micro-batch for one of the two losses.

    Args:
        rollout: of the student; None where the other loss's samples are taken.
        timestep_B: of the scores.
        noise_BCTHW: of the scores' inputs.
    """

    rollout: RolloutDraw | None
    timestep_B: Tensor
    noise_BCTHW: Tensor


class DMD2Method(TrainingMethod):
    """Distribution matching with a student, a frozen teacher and a critic."""

    Options = DMD2Options
    required_roles = ("student", "teacher", "critic")
    trained_roles = ("student", "critic")

    def __init__(
        self,
        roles: Mapping[str, Role],
        options: DMD2Options,
        streams: Streams,
        facts: RunFacts | None = None,
    ) -> None:
        super().__init__(roles, options, streams, facts)
        self.options = options
        plugins = {name: role.plugin for name, role in roles.items()}
        self.served = scores.score_range(options, plugins)
        self.shift = plugins["student"].flow_shift
        self.rollout = options.rollout(self.shift)
        log.info("student timesteps: %s", ", ".join(f"{t:g}" for t in self.rollout.timesteps))
        self.real_guidance, self.fake_guidance = options.real_guidance, options.fake_guidance
        is_guided = (self.real_guidance.scale, self.fake_guidance.scale) != (1, 1)
        self.unconditional = Unconditional(
            options.cfg_uncond, self.facts.unconditional, needed=is_guided
        )

    @classmethod
    def check(cls, options: DMD2Options, plugins: Mapping[str, ModelPlugin]) -> None:
        """The list of steps, and the timesteps that all three networks serve."""
        super().check(options, plugins)
        options.check(plugins)

    @classmethod
    def needs_latents(cls, options: DMD2Options) -> bool:
        """Only where the student starts from data."""
        return options.starts_from_data

    @classmethod
    def num_updates(cls, options: DMD2Options, role: str, num_steps: int) -> int:
        """The student's are rarer."""
        return options.num_updates(role, num_steps)

    @classmethod
    def optimizer_options(cls, options: DMD2Options, role: str) -> dict[str, Any]:
        """``fake_score_*`` are the critic's."""
        return options.critic_optimizer() if role == "critic" else {}

    # -- the algorithm -----------------------------------------------------------------------------
    def train_step(self, batches: Sequence[Batch], step: int) -> StepResult:
        """Student and critic against each other's weights of before the step; then both move."""
        o = self.options
        moves_student = (step + 1) % o.generator_update_interval == 0
        moves_critic = o.critic_on_student_steps or not moves_student
        own_rollout = not (o.share_rollout and moves_student)
        student_draws = [self.draw(b, step, "student", True) for b in batches if moves_student]
        critic_draws = [self.draw(b, step, "critic", own_rollout) for b in batches if moves_critic]

        metrics: dict[str, float] = {"update_student": float(moves_student)}
        samples: list[Tensor] = []
        if moves_student:
            losses, samples = self.student_pass(student_draws)
            metrics |= mean_metrics(losses, "loss")
        if moves_critic:
            if own_rollout:
                samples = self.generate(critic_draws)
            metrics |= mean_metrics(self.critic_pass(samples, critic_draws, batches), "loss")
        return self.update(metrics, moves_student, moves_critic)

    def draw(self, batch: Batch, step: int, loss: str, with_rollout: bool) -> Draw:
        """Every random number of ``loss`` for one micro-batch."""
        latents: Any = batch.latent_shape
        if self.options.starts_from_data:
            latents = self.student.plugin.normalize(batch.clean_latents().float())
        positions, streams = batch.positions, self.streams
        rollout = None
        if with_rollout:
            rollout = self.rollout.draw(
                streams, f"{loss}/rollout", step, positions, batch.condition, latents
            )
        timestep_B = scores.score_timestep(
            streams,
            f"{loss}/score_timestep",
            step,
            positions,
            self.options,
            shift=self.shift,
            served=self.served,
        )
        noise = streams.normal(f"{loss}/score_noise", step, positions, batch.latent_shape)
        return Draw(rollout, timestep_B, noise.to(process.device()))

    def generate(self, draws: Sequence[Draw]) -> list[Tensor]:
        """The student's samples x0, without gradient."""
        inputs = self.rollout.inputs(self.student, [d.rollout for d in draws if d.rollout])
        return few_step.predict_x0(self.student, inputs)

    def student_pass(self, draws: Sequence[Draw]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Rollout, scores, and the student's gradient; its losses and samples."""
        inputs = self.rollout.inputs(self.student, [d.rollout for d in draws if d.rollout])
        samples: list[Tensor] = []

        def targets(velocities: list[Tensor]) -> list[dict[str, Tensor]]:
            samples.extend(x0_of(v, r) for v, r in zip(velocities, inputs, strict=True))
            return self.score(samples, inputs, draws)

        self.student.zero_grad()
        losses = self.student.forward_score_backward(inputs, targets, self.student_loss)
        return losses, samples

    def score(
        self, samples: Sequence[Tensor], inputs: Sequence[Request], draws: Sequence[Draw]
    ) -> list[dict[str, Tensor]]:
        """What teacher and critic take the samples for, once they are noised."""
        noisy = [
            noised(x0, draw.noise_BCTHW, draw.timestep_B, request.condition)
            for x0, request, draw in zip(samples, inputs, draws, strict=True)
        ]
        critic, teacher = self.roles["critic"], self.roles["teacher"]
        fake = scores.guided_x0(critic, noisy, self.fake_guidance, self.unconditional)
        real = scores.guided_x0(teacher, noisy, self.real_guidance, self.unconditional)
        return [{"fake": f, "real": r} for f, r in zip(fake, real, strict=True)]

    def student_loss(
        self, velocity: Tensor, request: Request, target: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Half the mean square of g, with g / n as the gradient of x0; DMD, arXiv 2311.18828."""
        x0, real, fake = (
            scores.last_frames(tensor, self.options.gradient_frames)
            for tensor in (x0_of(velocity, request), target["real"], target["fake"])
        )
        per_sample = self.options.vsd_normalizer == "sample"
        loss = vsd_loss(x0, real, fake, normalizer="sample" if per_sample else "global", fp32=True)
        return {"loss": loss, "generator": loss}

    def critic_pass(
        self, samples: Sequence[Tensor], draws: Sequence[Draw], batches: Sequence[Batch]
    ) -> list[dict[str, Tensor]]:
        """The critic learns the student's samples."""
        requests = []
        for x0, draw, batch in zip(samples, draws, batches, strict=True):
            eps = draw.noise_BCTHW
            target = {"x0": x0, "eps": eps}
            requests.append(noised(x0, eps, draw.timestep_B, batch.condition, target))
        critic = self.roles["critic"]
        critic.zero_grad()
        return critic.forward_backward(requests, self.critic_loss)

    def critic_loss(self, velocity: Tensor, request: Request) -> dict[str, Tensor]:
        """Denoising score matching of the student's samples, fp32."""
        space, t = self.options.fake_score_pred_type, few_step.sigma_of(request)
        loss = dsm_loss(
            space,
            scores.in_space(space, velocity, request),
            x0=request.extra["x0"],
            eps=request.extra["eps"],
            t=t,
            alpha_fn=rf_alpha,
            sigma_fn=rf_sigma,
            fp32=True,
        )
        return {"loss": loss, "fake_score": loss}

    def update(
        self, metrics: dict[str, float], moves_student: bool, moves_critic: bool
    ) -> StepResult:
        """Step the roles that have gradients; the student's average moves with the student."""
        metrics.pop("loss/loss", None)
        metrics["loss/total"] = sum(v for k, v in metrics.items() if k.startswith("loss/"))
        skipped = []
        for name, moves in (("critic", moves_critic), ("student", moves_student)):
            if not moves:
                continue
            info = self.roles[name].step()
            metrics |= {f"grad_norm/{name}": info.grad_norm, f"lr/{name}": info.learning_rate}
            skipped += [name] if info.skipped else []
        return StepResult(metrics, skipped=tuple(skipped))
