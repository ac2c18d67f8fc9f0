"""Distribution matching distillation (DMD2): the losses of its three networks.

Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis", arXiv
2405.14867. A student makes samples x0 in one or a few steps. At a re-noised sample
``x_t = (1 - t) x0 + t eps`` the teacher knows the score of real data and the fake score that of the
student's samples; their difference is the gradient of a KL divergence (DMD, arXiv 2311.18828,
eq. 7). The fake score learns by denoising the student's samples; a discriminator on the features of
a frozen network adds an adversarial term (section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagen.fastgen.config import DMDConfig, check_schedule
from megagen.fastgen.draws import Draws
from megagen.fastgen.ema import ExponentialMovingAverage
from megagen.fastgen.guidance import Guidance, without_prompt
from megagen.fastgen.methods import terms
from megagen.fastgen.methods.inputs import Inputs, draw_inputs, student_input
from megagen.fastgen.pipeline import DistillationPipeline

__all__ = ["DMDPipeline"]

Phase = Literal["student", "fake_score", "discriminator", "critic"]

_TERMS: dict[str, Callable[[DMDPipeline, Inputs], dict[str, Tensor]]] = {
    "student": terms.student_terms,
    "fake_score": terms.fake_score_terms,
    "discriminator": terms.discriminator_terms,
    "critic": terms.critic_terms,
}


class DMDPipeline(DistillationPipeline):
    """The losses of a DMD2 step; the loop around them is the caller's.

    Every ``compute_*`` takes ``latents`` and ``noise`` ``[B, ...]``, passes
    ``encoder_hidden_states`` and further keywords on to the networks, and returns scalars by name,
    of which ``total`` is to be differentiated. ``eps`` (like ``latents``) and ``timestep`` (``[B]``
    in [0, 1]) pin the re-noising, ``generator`` pins every other draw; what is not given comes from
    torch's default generator.

    Args:
        student: the few-step network.
        teacher: the frozen many-step network; with a discriminator, its features are captured
            (``plugins.wan22.attach_feature_capture`` or ``plugins.qwen_image``'s).
        fake_score: the network that follows the student's distribution (``create_fake_score``).
        config: a ``DMDConfig``, or an ``ExtendedDMDConfig`` with what goes beyond it.
        discriminator: list of features -> logits ``[B, heads]``.
        model_parallel_group: ranks that work on the same samples; they share every draw.

    Raises:
        ValueError: ``gan_loss_weight_gen > 0`` without a discriminator, or a ``t_list`` that does
            not fit ``student_sample_steps``.
    """

    config: DMDConfig

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        fake_score: nn.Module,
        config: DMDConfig,
        *,
        discriminator: nn.Module | None = None,
        model_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        if config.gan_loss_weight_gen > 0 and discriminator is None:
            raise ValueError(
                f"gan_loss_weight_gen is {config.gan_loss_weight_gen}, which needs a discriminator"
            )
        check_schedule(config)
        super().__init__(student, teacher, config)
        self.fake_score, self.discriminator = fake_score, discriminator
        self._group = model_parallel_group
        self._ema = None if config.ema is None else ExponentialMovingAverage(student, config.ema)
        self._iteration = 0

    # -- the losses --------------------------------------------------------------------------------
    def compute_student_loss(
        self,
        latents: Tensor,
        noise: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        negative_encoder_hidden_states: Tensor | None = None,
        negative_encoder_hidden_states_mask: Tensor | None = None,
        guidance_scale: float | Literal["off"] | None = None,
        eps: Tensor | None = None,
        timestep: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Tensor]:
        """The student's loss: ``vsd_loss`` plus ``gan_loss_weight_gen`` times ``gan_gen_loss``.

        DMD, arXiv 2311.18828, eq. 7, and DMD2, arXiv 2405.14867, section 4.3.
        Gradients reach the student, and the discriminator where it is trainable; the teacher passes
        the adversarial gradient on to the student.

        Args:
            latents: real samples, ``[B, ...]``; their values count only for several steps without
                backward simulation.
            noise: standard normal, like ``latents``.
            encoder_hidden_states: conditioning, ``[B, L, D]``.
            negative_encoder_hidden_states: of the unconditional pass, ``[B, L', D]``.
            negative_encoder_hidden_states_mask: replaces ``encoder_hidden_states_mask`` there.
            guidance_scale: s in ``uncond + s (cond - uncond)`` for this call; ``off``: no guidance;
                None: the config's.
            eps: noise of the re-noising.
            timestep: time of the re-noising.
            generator: of all other draws.
            **model_kwargs: further arguments of all networks.

        Returns:
            ``vsd``, ``total`` and with a GAN weight ``gan_gen``.

        Raises:
            ValueError: guidance without a negative embedding; several steps without a fitting
                ``t_list``.
            RuntimeError: a GAN weight without captured features.
        """
        inputs = self._inputs(
            "student",
            latents,
            noise,
            encoder_hidden_states,
            negative_encoder_hidden_states=negative_encoder_hidden_states,
            negative_encoder_hidden_states_mask=negative_encoder_hidden_states_mask,
            guidance_scale=guidance_scale,
            eps=eps,
            timestep=timestep,
            generator=generator,
            **model_kwargs,
        )
        return terms.student_terms(self, inputs)

    def compute_fake_score_loss(
        self,
        latents: Tensor,
        noise: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        eps: Tensor | None = None,
        timestep: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Tensor]:
        """The fake score's loss: ``dsm_loss`` on the student's samples (arXiv 2311.18828, eq. 6).

        The loss is taken in the space ``fake_score_pred_type`` (``pred_type`` where None), to which
        the prediction is converted through x0. Gradients reach the fake score alone.

        Args:
            latents: as in ``compute_student_loss``.
            noise: as there.
            encoder_hidden_states: as there.
            eps: as there.
            timestep: as there.
            generator: as there.
            **model_kwargs: as there.

        Returns:
            ``fake_score`` and ``total``, the same tensor.

        Raises:
            ValueError: several steps without a fitting ``t_list``.
        """
        pinned: dict[str, Any] = {"eps": eps, "timestep": timestep, "generator": generator}
        inputs = self._inputs(
            "fake_score", latents, noise, encoder_hidden_states, **pinned, **model_kwargs
        )
        return terms.fake_score_terms(self, inputs)

    def compute_discriminator_loss(
        self,
        latents: Tensor,
        noise: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        eps: Tensor | None = None,
        timestep: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Tensor]:
        """The discriminator's loss: ``gan_disc_loss`` plus ``gan_r1_reg_weight`` times ``r1_loss``.

        Real and generated samples are noised (by the same draws with ``gan_use_same_t_noise``) and
        judged by the features of a frozen network (DMD2, section 4.3; R1: arXiv 2501.08316, eq.
        3). Gradients reach the discriminator alone.

        Args:
            latents: real samples, ``[B, ...]``.
            noise: as in ``compute_student_loss``.
            encoder_hidden_states: as there.
            eps: as there; of the generated samples.
            timestep: as there; of the generated samples.
            generator: as there.
            **model_kwargs: as there.

        Returns:
            ``gan_disc``, ``total`` and with an R1 weight ``r1``.

        Raises:
            RuntimeError: no discriminator, or no captured features.
            ValueError: several steps without a fitting ``t_list``.
        """
        pinned: dict[str, Any] = {"eps": eps, "timestep": timestep, "generator": generator}
        inputs = self._inputs(
            "discriminator", latents, noise, encoder_hidden_states, **pinned, **model_kwargs
        )
        return terms.discriminator_terms(self, inputs)

    def compute_critic_loss(
        self,
        latents: Tensor,
        noise: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        eps: Tensor | None = None,
        timestep: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> dict[str, Tensor]:
        """Fake score and discriminator together: one student forward, one (t, eps) for both.

        With ``extensions.feature_source: fake_score`` the features of generated samples come from
        the very pass that trains the fake score (DMD2, section 4.3).

        Args:
            latents: as in ``compute_discriminator_loss``.
            noise: as there.
            encoder_hidden_states: as there.
            eps: as there.
            timestep: as there.
            generator: as there.
            **model_kwargs: as there.

        Returns:
            ``fake_score`` (not with ``adversarial_only``), with a discriminator ``gan_disc`` and
            with an R1 weight ``r1``; ``total`` is their weighted sum.

        Raises:
            RuntimeError: no captured features.
            ValueError: several steps without a fitting ``t_list``.
        """
        pinned: dict[str, Any] = {"eps": eps, "timestep": timestep, "generator": generator}
        inputs = self._inputs(
            "critic", latents, noise, encoder_hidden_states, **pinned, **model_kwargs
        )
        return terms.critic_terms(self, inputs)

    def backward(
        self,
        phase: Phase,
        latents: Tensor,
        noise: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        micro_batch_size: int,
        **arguments: Any,
    ) -> dict[str, Tensor]:
        """Add a phase's gradients, working off the batch in parts, each part's graph at a time.

        Gradients and losses are those of ``compute_<phase>_loss(...)["total"].backward()`` on the
        whole batch, whose draws are made first; activations are those of one part.

        Args:
            phase: ``student``, ``fake_score``, ``discriminator`` or ``critic``.
            latents: as in ``compute_student_loss``.
            noise: as there.
            encoder_hidden_states: as there.
            micro_batch_size: samples of a part, >= 1.
            **arguments: the phase's further arguments; tensors with B rows are cut like the rest.

        Returns:
            The phase's losses, detached.

        Raises:
            ValueError: unknown phase, ``micro_batch_size`` < 1, or an extension that couples the
                samples of a batch (``vsd_normalizer: global``, ``divergence``).
        """
        if phase not in _TERMS:
            raise ValueError(f"unknown phase {phase!r}; take one of {list(_TERMS)}")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be >= 1, found {micro_batch_size}")
        extra = self.extensions
        if extra.vsd_normalizer == "global" or extra.divergence is not None:
            raise ValueError(
                "vsd_normalizer 'global' and divergence weigh the whole batch together: use "
                "compute_student_loss, or take them per sample"
            )
        inputs = self._inputs(phase, latents, noise, encoder_hidden_states, **arguments)
        batch = latents.shape[0]
        sums: dict[str, Tensor] = {}
        for start in range(0, batch, micro_batch_size):
            part = inputs.rows(start, min(start + micro_batch_size, batch))
            share = part.latents.shape[0] / batch
            losses = _TERMS[phase](self, part)
            (losses["total"] * share).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(loss)) + share * loss.detach()
        return sums

    # -- the average -------------------------------------------------------------------------------
    @property
    def ema(self) -> ExponentialMovingAverage | None:
        """The student's average; None without ``config.ema``."""
        return self._ema

    def update_ema(self, *, iteration: int | None = None) -> None:
        """Move the average towards the student; after a student step. Nothing without one.

        Args:
            iteration: this update's number; None: one more than the last (the first is 1).
        """
        if self._ema is None:
            return
        self._iteration = self._iteration + 1 if iteration is None else iteration
        self._ema.update(self.student, iteration=self._iteration)

    # -- parts -------------------------------------------------------------------------------------
    def _inputs(
        self,
        phase: Phase,
        latents: Tensor,
        noise: Tensor,
        encoder_hidden_states: Tensor | None,
        *,
        negative_encoder_hidden_states: Tensor | None = None,
        negative_encoder_hidden_states_mask: Tensor | None = None,
        guidance_scale: float | Literal["off"] | None = None,
        eps: Tensor | None = None,
        timestep: Tensor | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Inputs:
        """Check the call and make its draws."""
        if phase == "discriminator" and self.discriminator is None:
            raise RuntimeError("compute_discriminator_loss: this pipeline has no discriminator")
        guidance = self._guidance(guidance_scale) if phase == "student" else None
        if guidance is not None and negative_encoder_hidden_states is None:
            raise ValueError("guidance_scale is set: give negative_encoder_hidden_states too")
        given = {"encoder_hidden_states": encoder_hidden_states, **model_kwargs}
        inputs = draw_inputs(
            self,
            latents,
            noise,
            given,
            Draws(generator, self._group),
            timestep=timestep,
            eps=eps,
            for_discriminator=phase in ("discriminator", "critic")
            and self.discriminator is not None,
        )
        if guidance is None:
            return inputs
        negative = without_prompt(
            given, negative_encoder_hidden_states, negative_encoder_hidden_states_mask
        )
        return replace(inputs, negative=negative, guidance=guidance)

    def _guidance(self, asked: float | Literal["off"] | None) -> Guidance | None:
        scale = self.config.guidance_scale if asked is None else asked
        extra = self.extensions
        if scale is None or scale == "off" or extra.adversarial_only:  # no score to be guided
            return None
        return Guidance(float(scale), extra.guidance_interval, extra.guidance_rescale)

    def _build_student_input(
        self,
        latents: Tensor,
        noise: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        draws: Draws | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The student's input and its time ``[B]``."""
        given = {"encoder_hidden_states": encoder_hidden_states, **model_kwargs}
        return student_input(self, latents, noise, given, draws or Draws(None, self._group))

    def _draw_timesteps(self, draws: Draws, n: int, device: torch.device) -> Tensor:
        """``[n]`` float32 times of ``sample_timesteps``, which a subclass may have replaced."""
        where: dict[str, Any] = {"device": draws.place(device)}
        if draws.generator is not None:
            where["generator"] = draws.generator
        return draws.share(self.sample_timesteps(n, dtype=torch.float32, **where).to(device))
