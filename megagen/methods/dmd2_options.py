"""Keys of DMD2, FastVideo's and ours, and what follows from them.

Self-forcing has the same keys and adds its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from megagen.core.options import Betas
from megagen.engine.settings import LRScheduler
from megagen.fastgen.guidance import Guidance
from megagen.methods.adversarial import GANOptions
from megagen.methods.few_step import Rollout, SampleType, Share, check_in_range, step_list
from megagen.methods.scores import ScoreTimeOptions, Space, UncondOptions, score_range
from megagen.models.base import ModelPlugin, Passes


class DMD2Options(ScoreTimeOptions, GANOptions):
    """Options of ``DMD2Method``.

    Attributes:
        rollout_mode: what the student starts from: data_latent (noised data) or simulate (pure
            noise, walked down by its own steps; needs no latents).
        t_list: the student's timesteps in 0..1000, going down, and a final 0.
        dmd_denoising_steps: FastVideo's form of ``t_list``, without the 0.
        student_sample_steps: number of the student's steps, where given checked against the list.
        warp_denoising_step: the numbers of the list are places on the unshifted grid.
        student_sample_type: how a step down is noised: sde (fresh noise) or ode.
        student_step_per: what one choice of the trained timestep is for: a sample, a micro_batch
            (FastVideo) or the step, under which a simulated rollout ends where it is trained; None:
            a sample of data, the step in simulation.
        generator_update_interval: the student is updated in every so many-th step.
        critic_on_student_steps: update the critic in those steps too (FastVideo), or only in the
            others (FastGen).
        share_rollout: the critic learns from the samples of the student's own update; false: from
            a rollout of its own (FastVideo).
        real_score_guidance_scale: of the teacher; 1 makes no unconditional pass.
        real_score_guidance_interval: lowest and highest t / 1000 where it applies; None: all.
        real_score_guidance_rescale: share in 0..1 whose deviation is set to the conditional one's.
        fake_score_guidance_scale: of the critic in the student's loss.
        cfg_uncond: what unconditional passes see.
        vsd_normalizer: ``mean|x0 - real|`` of each sample, or of the micro_batch (FastVideo).
        gradient_frames: the student learns from the last so many latent frames; None: from all.
        fake_score_pred_type: what the critic's error is measured in.
        fake_score_learning_rate: peak rate of the critic; None: ``training.optimizer``'s.
        fake_score_betas: of the critic; None: ``training.optimizer``'s.
        fake_score_lr_scheduler: of the critic; None: ``training.optimizer``'s.
    """

    rollout_mode: Literal["data_latent", "simulate"]
    t_list: list[float] | None = None
    dmd_denoising_steps: list[float] | None = None
    student_sample_steps: int | None = Field(None, ge=1)
    warp_denoising_step: bool = False
    student_sample_type: SampleType = "sde"
    student_step_per: Share | None = None
    generator_update_interval: int = Field(1, ge=1)
    critic_on_student_steps: bool = True
    share_rollout: bool = True
    real_score_guidance_scale: float = Field(1.0, ge=0)
    real_score_guidance_interval: tuple[float, float] | None = None
    real_score_guidance_rescale: float = Field(0.0, ge=0, le=1)
    fake_score_guidance_scale: float = Field(1.0, ge=0)
    cfg_uncond: UncondOptions = UncondOptions()
    vsd_normalizer: Literal["sample", "micro_batch"] = "sample"
    gradient_frames: int | None = Field(None, ge=1)
    fake_score_pred_type: Space = "flow"
    fake_score_learning_rate: float | None = Field(None, gt=0)
    fake_score_betas: Betas | None = None
    fake_score_lr_scheduler: LRScheduler | None = None

    @property
    def starts_from_data(self) -> bool:
        """Whether the student's inputs are noised data."""
        return self.rollout_mode == "data_latent"

    def rollout(self, shift: float) -> Rollout:
        """How the student's inputs are made; ``shift`` is the student's.

        Raises:
            ConfigError: the list of steps is none.
        """
        timesteps = step_list(
            self.t_list,
            self.dmd_denoising_steps,
            self.student_sample_steps,
            warp=self.warp_denoising_step,
            shift=shift,
        )
        return Rollout(timesteps, self.student_sample_type, self.share)

    @property
    def share(self) -> Share:
        """What one choice of the trained timestep is for."""
        return self.student_step_per or ("sample" if self.starts_from_data else "step")

    @property
    def rollout_passes(self) -> float:
        """Passes of a rollout beside that of the trained step, on average."""
        if self.starts_from_data:
            return 0.0
        steps = self.dmd_denoising_steps or (self.t_list or [0.0])[:-1]
        return (len(steps) - 1) / (2 if self.share == "step" else 1)

    @property
    def real_guidance(self) -> Guidance:
        """Of the teacher."""
        return Guidance(
            self.real_score_guidance_scale,
            self.real_score_guidance_interval,
            self.real_score_guidance_rescale,
        )

    @property
    def fake_guidance(self) -> Guidance:
        """Of the critic."""
        return Guidance(self.fake_score_guidance_scale)

    def critic_optimizer(self) -> dict[str, Any]:
        """Keys of ``training.optimizer`` that are given for the critic."""
        found = {
            "learning_rate": self.fake_score_learning_rate,
            "betas": self.fake_score_betas,
            "lr_scheduler": self.fake_score_lr_scheduler,
        }
        return {key: value for key, value in found.items() if value is not None}

    def num_updates(self, role: str, num_steps: int) -> int:
        """Updates of a role in ``num_steps``; at least 1."""
        of_student = num_steps // self.generator_update_interval
        if role == "student":
            return max(1, of_student)
        return num_steps if self.critic_on_student_steps else max(1, num_steps - of_student)

    def passes(self) -> dict[str, Passes]:
        """Per sample and step, on average; a replayed forward counts as recomputation."""
        of_student = 1 / self.generator_update_interval
        of_critic = 1.0 if self.critic_on_student_steps else 1 - of_student
        is_shared = self.share_rollout and self.critic_on_student_steps
        own_rollouts = of_critic - (of_student if is_shared else 0.0)
        down = self.rollout_passes
        guided = (
            1 + (self.real_score_guidance_scale != 1),
            1 + (self.fake_score_guidance_scale != 1),
        )
        found = {
            "student": Passes(
                down * (of_student + own_rollouts) + own_rollouts, of_student, is_scored=True
            ),
            "teacher": Passes(guided[0] * of_student),
            "critic": Passes(guided[1] * of_student, of_critic),
        }
        if self.has_discriminator:
            name = self.discriminator.feature_source
            judged = (2 + (self.gan_r1_reg_weight > 0)) * of_critic
            forward = found[name].forward + judged + 2 * of_student
            found[name] = found[name]._replace(forward=forward)
        return found

    def check(self, plugins: Mapping[str, ModelPlugin]) -> None:
        """Raise ``ConfigError`` where steps and scores are not what the networks serve."""
        self.check_gan(plugins)
        score_range(self, plugins)
        student = plugins["student"]
        check_in_range(
            self.rollout(student.flow_shift).timesteps,
            student.timestep_range,
            from_noise=not self.starts_from_data,
        )
