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
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megagen.core import process
from megagen.core.log import get_logger
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.engine.head import Head
from megagen.engine.role import Role
from megagen.fastgen.flow_matching import rf_alpha, rf_sigma
from megagen.fastgen.losses import dsm_loss, vsd_loss
from megagen.methods import few_step, scores
from megagen.methods.adversarial import Adversary, RealDraw
from megagen.methods.base import RunFacts, StepResult, TrainingMethod, mean_metrics
from megagen.methods.dmd2_options import DMD2Options
from megagen.methods.few_step import noised, x0_of
from megagen.methods.scores import Unconditional
from megagen.models.base import ModelPlugin, Passes, Request
from megagen.models.heads import HeadsLoad

log = get_logger(__name__)

Condition = Mapping[str, Tensor]


@dataclass(frozen=True)
class Draw:
    """All random numbers of one micro-batch for one of the two losses.

    Args:
        rollout: from ``draw_rollout``; None where the other loss's samples are taken.
        timestep_B: of the scores.
        noise_BCTHW: of the scores' inputs.
        real: data for the discriminator.
    """

    rollout: Any
    timestep_B: Tensor
    noise_BCTHW: Tensor
    real: RealDraw | None = None


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
        self.options: DMD2Options = options
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
        self.adversary: Adversary | None = None
        if options.has_discriminator:
            base = self.facts.optimizer
            assert base is not None, "a discriminator needs the run's optimizer settings"
            settings = replace(base, total_steps=options.num_updates("critic", base.total_steps))
            self.adversary = Adversary(options, roles, streams, settings)

    @classmethod
    def check(cls, options: DMD2Options, plugins: Mapping[str, ModelPlugin]) -> None:
        """The list of steps, and the timesteps that all three networks serve."""
        super().check(options, plugins)
        options.check(plugins)

    @classmethod
    def needs_latents(cls, options: DMD2Options) -> bool:
        """Where the student starts from data, or is compared with them."""
        return options.starts_from_data or options.has_discriminator

    @classmethod
    def num_updates(cls, options: DMD2Options, role: str, num_steps: int) -> int:
        """The student's are rarer."""
        return options.num_updates(role, num_steps)

    @classmethod
    def passes(cls, options: DMD2Options) -> dict[str, Passes]:
        """A rollout has several forward passes of the student; guidance doubles the teacher's."""
        return options.passes()

    @classmethod
    def heads_load(
        cls, options: DMD2Options, plugins: Mapping[str, ModelPlugin]
    ) -> HeadsLoad | None:
        """The discriminator's."""
        return options.heads_load(plugins)

    @classmethod
    def optimizer_options(cls, options: DMD2Options, role: str) -> dict[str, Any]:
        """``fake_score_*`` are the critic's."""
        return options.critic_optimizer() if role == "critic" else {}

    @property
    def heads(self) -> Mapping[str, Head]:
        """The discriminator's."""
        return {"discriminator": self.adversary.head} if self.adversary else {}

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
        rollout = self.draw_rollout(batch, step, f"{loss}/rollout") if with_rollout else None
        timestep_B, noise = self.draw_scores(batch, step, loss)
        drawn = Draw(rollout, timestep_B, noise)
        if self.adversary is None or loss == "student":
            return drawn
        if not self.options.gan_use_same_t_noise:
            timestep_B, noise = self.draw_scores(batch, step, "real")
        real = self.adversary.draw(self.data(batch), timestep_B, noise, step, batch.positions)
        return replace(drawn, real=real)

    def draw_rollout(self, batch: Batch, step: int, purpose: str) -> Any:
        """The random numbers of the student's samples."""
        start = self.data(batch) if self.options.starts_from_data else batch.latent_shape
        given = (step, batch.positions, batch.condition, start)
        return self.rollout.draw(self.streams, purpose, *given)

    def draw_scores(self, batch: Batch, step: int, purpose: str) -> tuple[Tensor, Tensor]:
        """Score timesteps ``[B]`` and noise ``[B, C, T, H, W]``."""
        streams, positions = self.streams, batch.positions
        timestep_B = scores.score_timestep(
            streams,
            f"{purpose}/score_timestep",
            step,
            positions,
            self.options,
            shift=self.shift,
            served=self.served,
        )
        noise = streams.normal(f"{purpose}/score_noise", step, positions, batch.latent_shape)
        return timestep_B, noise.to(process.device())

    def data(self, batch: Batch) -> Tensor:
        """The micro-batch's clean latents, normalised."""
        latents = self.student.plugin.normalize(batch.clean_latents().float())
        return latents.to(process.device())

    def generate(self, draws: Sequence[Draw]) -> list[Tensor]:
        """The student's samples x0, without gradient."""
        inputs = self.rollout.inputs(self.student, [draw.rollout for draw in draws])
        return few_step.predict_x0(self.student, inputs)

    def student_pass(self, draws: Sequence[Draw]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
        """Rollout, scores, and the student's gradient; its losses and samples."""
        inputs = self.rollout.inputs(self.student, [draw.rollout for draw in draws])
        samples: list[Tensor] = []

        def targets(velocities: list[Tensor]) -> list[dict[str, Tensor]]:
            samples.extend(x0_of(v, r) for v, r in zip(velocities, inputs, strict=True))
            return self.score(samples, [request.condition for request in inputs], draws)

        def loss(velocity: Tensor, request: Request, target: Mapping[str, Tensor]) -> Any:
            return self.sample_loss(x0_of(velocity, request), target)

        self.student.zero_grad()
        return self.student.forward_score_backward(inputs, targets, loss), samples

    def score(
        self, samples: Sequence[Tensor], conditions: Sequence[Condition], draws: Sequence[Draw]
    ) -> list[dict[str, Tensor]]:
        """What teacher and critic take the samples for, once they are noised."""
        noisy = [
            noised(x0, draw.noise_BCTHW, draw.timestep_B, condition)
            for x0, condition, draw in zip(samples, conditions, draws, strict=True)
        ]
        critic, teacher = self.roles["critic"], self.roles["teacher"]
        fake = scores.guided_x0(critic, noisy, self.fake_guidance, self.unconditional)
        real = scores.guided_x0(teacher, noisy, self.real_guidance, self.unconditional)
        targets = [{"fake": f, "real": r} for f, r in zip(fake, real, strict=True)]
        if self.adversary is not None:
            gradients, losses = self.adversary.sample_gradient(noisy)
            for target, gradient, loss in zip(targets, gradients, losses, strict=True):
                target |= {"gradient": gradient, "gan_gen": loss}
        return targets

    def sample_loss(self, x0: Tensor, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Half the mean square of g, with g / n as the gradient of x0; DMD, arXiv 2311.18828.

        The adversarial term enters by its gradient; its value is reported beside.
        """
        x0, real, fake = (
            scores.last_frames(tensor, self.options.gradient_frames)
            for tensor in (x0, target["real"], target["fake"])
        )
        per_sample = self.options.vsd_normalizer == "sample"
        loss = vsd_loss(x0, real, fake, normalizer="sample" if per_sample else "global", fp32=True)
        terms = {"loss": loss, "generator": loss}
        if "gradient" in target:
            gradient = scores.last_frames(target["gradient"], self.options.gradient_frames)
            terms |= {"loss": loss + (x0 * gradient).sum(), "gan_gen": target["gan_gen"]}
        return terms

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
        losses = critic.forward_backward(requests, self.critic_loss)
        if self.adversary is not None:
            reals = [draw.real for draw in draws if draw.real is not None]
            judged = self.adversary.learn(requests, reals)
            losses = [{**own, **more} for own, more in zip(losses, judged, strict=True)]
        return losses

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
        o = self.options
        weights = {"loss/gan_gen": o.gan_loss_weight_gen, "loss/r1": o.gan_r1_reg_weight}
        metrics["loss/total"] = sum(
            weights.get(k, 1.0) * v for k, v in metrics.items() if k.startswith("loss/")
        )
        movers: dict[str, Role | Head] = {}
        if moves_critic:
            movers |= {"critic": self.roles["critic"], **self.heads}
        if moves_student:
            movers["student"] = self.student
        skipped = []
        for name, mover in movers.items():
            info = mover.step()
            metrics |= {f"grad_norm/{name}": info.grad_norm, f"lr/{name}": info.learning_rate}
            skipped += [name] if info.skipped else []
        return StepResult(metrics, skipped=tuple(skipped))
