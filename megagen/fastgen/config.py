"""Settings of the distillation pipelines: times, averages of weights, DMD2 and what we add to it.

Rectified flow with t in [0, 1], data at 0 and noise at 1. DMD2: Yin et al., arXiv 2405.14867.
Settings that contradict one another are rejected where the object that holds them is constructed,
assigned to or updated; nothing is known there of an assignment to a config nested within it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megagen.fastgen.config_base import ConfigBase

__all__ = [
    "DMDConfig",
    "DMDExtensions",
    "DistillationConfig",
    "EMAConfig",
    "ExtendedDMDConfig",
    "SampleTimestepConfig",
]

PredType = Literal["x0", "eps", "v", "flow"]
"""What a network predicts: data, noise, ``alpha eps - sigma x0``, or ``eps - x0``."""

TimeDistType = Literal["uniform", "logitnormal", "lognormal", "shifted", "polynomial"]
Divergence = Literal["rkl", "kl", "js", "sf", "neyman", "sh", "jf"]


class SampleTimestepConfig(ConfigBase):
    """How training times are drawn; the formulas stand at ``timesteps.sample_timesteps``.

    Attributes:
        time_dist_type: the distribution. Rectified-flow models were usually trained with
            ``shifted`` (Wan) or ``logitnormal`` (SD3, Flux, Qwen-Image).
        min_t: lowest time, ``0 <= min_t < max_t``.
        max_t: highest time, <= 1; also where a one-step student starts.
        shift: of ``shifted``, >= 1; 1 is uniform.
        p_mean: mean of the normal below ``logitnormal`` and ``lognormal``.
        p_std: its standard deviation, >= 0 (> 0 for ``lognormal``).
        t_list: the times along which a student of several steps samples, strictly decreasing within
            [0, 1] down to 0: one more than ``student_sample_steps``. None: no such schedule.

    Raises:
        ValueError: anything else than the above.
    """

    time_dist_type: TimeDistType = "shifted"
    min_t: float = 0.001
    max_t: float = Field(0.999, le=1)
    shift: float = Field(5.0, ge=1)
    p_mean: float = 0.0
    p_std: float = Field(1.0, ge=0)
    t_list: list[float] | None = None

    @field_validator("t_list")
    @classmethod
    def _check_t_list(cls, t_list: list[float] | None) -> list[float] | None:
        if t_list is not None:
            if len(t_list) < 2 or t_list[-1] != 0:
                raise ValueError(f"at least two times, the last of them 0; found {t_list}")
            if t_list[0] > 1 or any(later >= t for t, later in pairwise(t_list)):
                raise ValueError(f"strictly decreasing times, none above 1; found {t_list}")
        return t_list

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if not 0 <= self.min_t < self.max_t:
            raise ValueError(f"0 <= min_t < max_t, found {self.min_t} and {self.max_t}")
        return self


class EMAConfig(ConfigBase):
    """An exponential moving average of the student's weights; see ``ema`` for the formulas.

    Attributes:
        decay: beta of ``constant``, in [0, 1].
        type: ``constant``; ``power``, ``(1 - 1/i)^(gamma + 1)`` (Karras et al., arXiv 2312.02696);
            ``halflife``, half of a weight forgotten every ``halflife_kimg`` thousand samples.
        start_iter: the first iteration averaged: there the live weights are copied.
        gamma: of ``power``, >= -1.
        halflife_kimg: of ``halflife``, in thousands of samples, >= 0.
        rampup_ratio: ``halflife`` is at most this share of the samples seen, >= 0; None: no limit.
        batch_size: samples of one update over all ranks, >= 1, for ``halflife``.
        fsdp2: whether sharded parameters are gathered, where ``mode`` says so.
        mode: ``full_tensor`` holds the whole average on every rank, ``local_shard`` each rank's
            shard of it. Both hold the same numbers.
        dtype: of the averaged parameters; None: the live one. Buffers keep theirs.

    Raises:
        ValueError: anything else than the above.
    """

    decay: float = Field(0.9999, ge=0, le=1)
    type: Literal["constant", "halflife", "power"] = "constant"
    start_iter: int = 0
    gamma: float = Field(16.97, ge=-1)
    halflife_kimg: float = Field(500.0, ge=0)
    rampup_ratio: float | None = Field(0.05, ge=0)
    batch_size: int = Field(1, ge=1)
    fsdp2: bool = True
    mode: Literal["full_tensor", "local_shard"] = "full_tensor"
    dtype: Literal["float32", "bfloat16", "float16"] | None = "float32"


class DistillationConfig(ConfigBase):
    """What every distillation of a diffusion network has in common.

    ``student_sample_steps`` and ``sample_t_cfg.t_list`` have to fit: they are compared at
    construction and by ``update``, which assigns both at once. Assigned one after the other, in
    whichever order, they may disagree in between; ``check_schedule`` compares them again.

    Attributes:
        pred_type: what student and teacher predict.
        guidance_scale: the teacher's classifier-free guidance ``u + s (c - u)``; None: none.
        sample_t_cfg: how training times are drawn, and the student's schedule.
        student_sample_steps: forward passes of the distilled student, >= 1.
        student_sample_type: between two of them the noise is the one that the student implies
            (``ode``) or drawn anew (``sde``).
        num_train_timesteps: the network is given ``t`` times this, >= 1 (1000 for the Wan, SD3 and
            Flux transformers of diffusers); None: ``t`` itself.

    Raises:
        ValueError: a value out of range, or ``student_sample_steps > 1`` with a ``t_list`` that is
            not one longer.
    """

    pred_type: PredType = "flow"
    guidance_scale: float | None = None
    sample_t_cfg: SampleTimestepConfig = Field(default_factory=SampleTimestepConfig)
    student_sample_steps: int = Field(1, ge=1)
    student_sample_type: Literal["sde", "ode"] = "ode"
    num_train_timesteps: int | None = Field(None, ge=1)

    def model_post_init(self, context: Any, /) -> None:
        """Runs at construction only, so that steps and schedule may be assigned one by one."""
        super().model_post_init(context)
        self.check_schedule()

    def check_schedule(self) -> None:
        """Compares ``t_list``, where there is one, with the steps of a multi-step student.

        Raises:
            ValueError: its length is not ``student_sample_steps + 1``.
        """
        check_schedule(self)


def check_schedule(config: Any) -> None:
    """``DistillationConfig.check_schedule`` of anything with its fields.

    Raises:
        ValueError: as there.
    """
    steps, t_list = config.student_sample_steps, config.sample_t_cfg.t_list
    if steps > 1 and t_list is not None and len(t_list) != steps + 1:
        raise ValueError(
            f"student_sample_steps={steps} takes a sample_t_cfg.t_list of {steps + 1} times "
            f"(one for each step and the final 0), found {len(t_list)}: {t_list}"
        )


class DMDConfig(DistillationConfig):
    """Distribution matching distillation, DMD2 (Yin et al., arXiv 2405.14867).

    Attributes:
        student_update_freq: every how many iterations the student is trained, >= 1; the others
            train fake score and discriminator. For the training loop: no pipeline reads it.
        fake_score_pred_type: in which terms the fake score's error is taken; None: ``pred_type``.
        backward_simulation: a student of several steps is trained where its own sampling leads
            (section 4.5 of the paper) instead of on noised data.
        gan_loss_weight_gen: weight of the student's adversarial loss, >= 0; 0: no discriminator.
        gan_use_same_t_noise: real and generated samples share time and noise in its update.
        gan_r1_reg_weight: weight of its approximate R1 penalty, >= 0; 100 to 1000 is usual.
        gan_r1_reg_alpha: standard deviation of that penalty's disturbance, >= 0.
        ema: the average of the student's weights; None: none.

    Raises:
        ValueError: a value out of range; an R1 penalty without the adversarial loss; backward
            simulation with one step or without ``sample_t_cfg.t_list``.
    """

    student_update_freq: int = Field(5, ge=1)
    fake_score_pred_type: PredType | None = "x0"
    backward_simulation: bool = False
    gan_loss_weight_gen: float = Field(0.0, ge=0)
    gan_use_same_t_noise: bool = False
    gan_r1_reg_weight: float = Field(0.0, ge=0)
    gan_r1_reg_alpha: float = Field(0.1, ge=0)
    ema: EMAConfig | None = None

    @model_validator(mode="after")
    def _check_dmd(self) -> Self:
        if self.gan_r1_reg_weight > 0 and self.gan_loss_weight_gen == 0:
            raise ValueError("gan_r1_reg_weight > 0 needs gan_loss_weight_gen > 0")
        if self.backward_simulation and self.student_sample_steps == 1:
            raise ValueError("backward_simulation needs student_sample_steps > 1")
        if self.backward_simulation and self.sample_t_cfg.t_list is None:
            raise ValueError("backward_simulation needs sample_t_cfg.t_list")
        return self

    @classmethod
    def from_yaml(cls, config_file: str | Path) -> Self:
        """A config of this class from a built-in recipe or a file; see ``load_dmd_config``.

        Raises:
            TypeError: ``config_file`` is neither a string nor a path.
            FileNotFoundError: there is no such recipe and no such file.
            ValueError: not a mapping, an unknown key, a value that this class rejects.
        """
        from megagen.fastgen.loader import load_dmd_config  # which imports this module

        return load_dmd_config(config_file, cls)


class DMDExtensions(ConfigBase):
    """Variants of DMD2. Every default is what ``DMDConfig`` alone gives.

    Attributes:
        vsd_normalizer: the distribution-matching gradient is divided by the mean absolute error of
            each ``sample``, or by that of all samples of the call (``global``; of this rank).
        r1_at: the R1 penalty disturbs ``clean`` data, or the sample as ``noised`` for the
            discriminator, whose logits it is compared with.
        divergence: weigh samples by the discriminator's density ratio so that this divergence is
            minimised (f-distill, Xu et al., arXiv 2502.15681); None: reverse KL without weights.
        adversarial_only: only the adversarial losses (LADD, Sauer et al., arXiv 2403.12015).
        guidance_interval: ``(low, high)``: the teacher is guided only at ``low <= t <= high``
            (Kynkäänniemi et al., arXiv 2404.07724); None: everywhere.
        guidance_rescale: how far, in [0, 1], the guided prediction gets back the standard deviation
            of the conditional one (Lin et al., arXiv 2305.08891, eq. 15-16).
        feature_source: the discriminator sees features of the ``teacher`` or the ``fake_score``.
        early_exit: a forward pass for features ends after the last block that is captured.
        fp32_losses: losses are summed in float32 whatever the networks' dtype.
        consistent_v: ``v`` means ``alpha eps - sigma x0`` in inversions too, not only as a target.
        exact_timesteps: the network's time stays float32 where its dtype is smaller.

    Raises:
        ValueError: a value out of range; ``adversarial_only`` together with ``divergence``.
    """

    vsd_normalizer: Literal["sample", "global"] = "sample"
    r1_at: Literal["clean", "noised"] = "clean"
    divergence: Divergence | None = None
    adversarial_only: bool = False
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    feature_source: Literal["teacher", "fake_score"] = "teacher"
    early_exit: bool = False
    fp32_losses: bool = False
    consistent_v: bool = False
    exact_timesteps: bool = False

    @field_validator("guidance_interval")
    @classmethod
    def _check_interval(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"0 <= low <= high <= 1, found {interval}")
        return interval

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        if self.adversarial_only and self.divergence is not None:
            raise ValueError("adversarial_only leaves no distribution matching for divergence")
        return self


class ExtendedDMDConfig(DMDConfig):
    """``DMDConfig`` and, under ``extensions``, the variants of DMD2.

    Attributes:
        extensions: see ``DMDExtensions``.

    Raises:
        ValueError: as ``DMDConfig``; ``extensions.adversarial_only`` or ``extensions.divergence``
            without ``gan_loss_weight_gen > 0``.
    """

    extensions: DMDExtensions = Field(default_factory=DMDExtensions)

    @model_validator(mode="after")
    def _check_extensions(self) -> Self:
        if self.gan_loss_weight_gen == 0:
            for name in ("adversarial_only", "divergence"):
                if self.extensions[name]:
                    raise ValueError(f"extensions.{name} needs gan_loss_weight_gen > 0")
        return self
