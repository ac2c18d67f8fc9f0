"""The loss terms of DMD2 at given inputs: student, fake score, discriminator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagen.fastgen.features import captured, drain
from megagen.fastgen.flow_matching import add_noise, rf_alpha, rf_sigma
from megagen.fastgen.losses import (
    dsm_loss,
    f_divergence_weight,
    gan_disc_loss,
    gan_gen_loss,
    r1_loss,
    vsd_loss,
)
from megagen.fastgen.methods.inputs import Inputs

if TYPE_CHECKING:
    from megagen.fastgen.methods.dmd import DMDPipeline

Given = Mapping[str, Any]


def student_terms(pipeline: DMDPipeline, inputs: Inputs) -> dict[str, Tensor]:
    """``vsd``, ``gan_gen`` and ``total`` (see ``DMDPipeline.compute_student_loss``)."""
    extra, given, t = pipeline.extensions, inputs.given, inputs.t
    gen = pipeline._predict_x0(pipeline.student, inputs.x_in, inputs.t_in, **given)
    # only an adversarial gradient comes back through the re-noised sample
    x_t = add_noise(gen if _is_adversarial(pipeline) else gen.detach(), inputs.eps, t)
    fake_x0, teacher_x0, logits = _scores(pipeline, x_t, t, given)
    guidance = inputs.guidance
    if guidance is not None and teacher_x0 is not None and guidance.wanted(t):
        assert inputs.negative is not None
        uncond = _score(pipeline, pipeline.teacher, x_t, t, inputs.negative)
        teacher_x0 = guidance.combine(teacher_x0, uncond, t)
    terms: dict[str, Tensor] = {}
    if not extra.adversarial_only:
        assert teacher_x0 is not None and fake_x0 is not None
        scale = None
        if extra.divergence is not None and logits is not None:
            is_run = dist.is_available() and dist.is_initialized()
            group = dist.group.WORLD if is_run else None  # a rank's samples may be but one
            scale = f_divergence_weight(logits, extra.divergence, group=group)
        terms["vsd"] = vsd_loss(
            gen,
            teacher_x0,
            fake_x0,
            scale,
            normalizer=extra.vsd_normalizer,
            fp32=extra.fp32_losses,
        )
    if logits is None:
        return {**terms, "total": terms["vsd"]}
    terms["gan_gen"] = gan_gen_loss(logits)
    adversarial = pipeline.config.gan_loss_weight_gen * terms["gan_gen"]
    return {**terms, "total": terms["vsd"] + adversarial if "vsd" in terms else adversarial}


def fake_score_terms(pipeline: DMDPipeline, inputs: Inputs) -> dict[str, Tensor]:
    """``fake_score`` and ``total`` (see ``DMDPipeline.compute_fake_score_loss``)."""
    loss, _ = _denoising(pipeline, _generated(pipeline, inputs), inputs)
    return {"fake_score": loss, "total": loss}


def discriminator_terms(pipeline: DMDPipeline, inputs: Inputs) -> dict[str, Tensor]:
    """``gan_disc``, ``r1`` and ``total`` (see ``DMDPipeline.compute_discriminator_loss``)."""
    return _judged(pipeline, _generated(pipeline, inputs), inputs, None)


def critic_terms(pipeline: DMDPipeline, inputs: Inputs) -> dict[str, Tensor]:
    """All terms of both critics (see ``DMDPipeline.compute_critic_loss``)."""
    gen = _generated(pipeline, inputs)
    terms: dict[str, Tensor] = {}
    totals: list[Tensor] = []
    features = None
    if not pipeline.extensions.adversarial_only:
        loss, features = _denoising(pipeline, gen, inputs)
        terms["fake_score"] = loss
        totals.append(loss)
    if pipeline.discriminator is not None:
        from_fake = pipeline.extensions.feature_source == "fake_score"
        found = _judged(pipeline, gen, inputs, features if from_fake else None)
        totals.append(found.pop("total"))
        terms.update(found)
    return {**terms, "total": torch.stack(totals).sum() if len(totals) > 1 else totals[0]}


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, graphs pass through ``model`` without gathering gradients of its parameters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    no_sync = getattr(model, "no_sync", None) if trainable else None
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        # data parallel would wait for gradients that do not come
        with no_sync() if no_sync is not None else contextlib.nullcontext():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _scores(
    pipeline: DMDPipeline, x_t: Tensor, t: Tensor, given: Given
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x0 of the fake score and of the teacher, without graph, and logits, with one to ``x_t``.

    What the losses do not need is None and is not computed.
    """
    extra = pipeline.extensions
    adversarial = _is_adversarial(pipeline)
    found: dict[str, Tensor | None] = {"fake_score": None, "teacher": None}
    features = None
    for name in found:
        model = pipeline.fake_score if name == "fake_score" else pipeline.teacher
        if adversarial and extra.feature_source == name:
            found[name], features = _score_with_features(pipeline, model, x_t, t, given)
        elif not extra.adversarial_only:
            found[name] = _score(pipeline, model, x_t, t, given)
    logits = None
    if adversarial:
        logits = _logits(pipeline, _required(features, extra.feature_source))
    return found["fake_score"], found["teacher"], logits


def _is_adversarial(pipeline: DMDPipeline) -> bool:
    return pipeline.discriminator is not None and pipeline.config.gan_loss_weight_gen > 0


@torch.no_grad()
def _score(pipeline: DMDPipeline, model: nn.Module, x_t: Tensor, t: Tensor, given: Given) -> Tensor:
    x0 = pipeline._predict_x0(model, x_t, t, **given)
    drain(model)  # of hooks that nobody asked, so that they do not pile up
    return x0


def _score_with_features(
    pipeline: DMDPipeline, model: nn.Module, x_t: Tensor, t: Tensor, given: Given
) -> tuple[Tensor | None, list[Tensor] | None]:
    x0 = None
    # where no x0 is wanted, nothing after the last feature need run
    early = pipeline.extensions.adversarial_only and pipeline.extensions.early_exit
    needs_grad = x_t.requires_grad  # nothing to carry where the student itself is frozen
    with _frozen(model), captured(model, early_exit=early, needs_grad=needs_grad) as taken:
        x0 = pipeline._predict_x0(model, x_t, t, **given).detach()
    return x0, taken.features


@torch.no_grad()
def _generated(pipeline: DMDPipeline, inputs: Inputs) -> Tensor:
    return pipeline._predict_x0(pipeline.student, inputs.x_in, inputs.t_in, **inputs.given)


def _denoising(
    pipeline: DMDPipeline, gen: Tensor, inputs: Inputs
) -> tuple[Tensor, list[Tensor] | None]:
    """The fake score's loss, and what hooks on it captured meanwhile."""
    config = pipeline.config
    space = config.fake_score_pred_type or config.pred_type
    x_t = add_noise(gen, inputs.eps, inputs.t)
    with captured(pipeline.fake_score, stop_gradient=False) as taken:
        raw = pipeline._call_model(pipeline.fake_score, x_t, inputs.t, **inputs.given)
    found = pipeline._convert_pred(
        raw, x_t, inputs.t, from_pred_type=config.pred_type, to_pred_type=space
    )
    loss = dsm_loss(
        space,
        found,
        x0=gen,
        eps=inputs.eps,
        t=inputs.t,
        alpha_fn=rf_alpha,
        sigma_fn=rf_sigma,
        fp32=pipeline.extensions.fp32_losses,
    )
    return loss, taken.features


def _judged(
    pipeline: DMDPipeline, gen: Tensor, inputs: Inputs, fake_features: list[Tensor] | None
) -> dict[str, Tensor]:
    """The discriminator's terms; ``fake_features`` if a pass over ``gen`` already made them."""
    config, extra = pipeline.config, pipeline.extensions
    t, eps = inputs.t_real, inputs.eps_real
    assert t is not None and eps is not None
    if fake_features is None:
        fake = add_noise(gen, inputs.eps, inputs.t)
        fake_features = _features(pipeline, fake, inputs.t, inputs.given)
    x_real = add_noise(inputs.latents, eps, t)
    real_logits = _logits(pipeline, _features(pipeline, x_real, t, inputs.given))
    fake_logits = _logits(pipeline, [feature.detach() for feature in fake_features])
    terms = {"gan_disc": gan_disc_loss(real_logits, fake_logits)}
    if inputs.r1_noise is None:
        return {**terms, "total": terms["gan_disc"]}
    base = inputs.latents if extra.r1_at == "clean" else x_real
    moved = base + config.gan_r1_reg_alpha * inputs.r1_noise
    moved_logits = _logits(pipeline, _features(pipeline, moved, t, inputs.given))
    terms["r1"] = r1_loss(real_logits, moved_logits)
    return {**terms, "total": terms["gan_disc"] + config.gan_r1_reg_weight * terms["r1"]}


@torch.no_grad()
def _features(pipeline: DMDPipeline, x_t: Tensor, t: Tensor, given: Given) -> list[Tensor]:
    extra = pipeline.extensions
    source = extra.feature_source
    model = pipeline.teacher if source == "teacher" else pipeline.fake_score
    with captured(model, stop_gradient=False, early_exit=extra.early_exit) as taken:
        pipeline._call_model(model, x_t, t, **given)
    return _required(taken.features, source)


def _logits(pipeline: DMDPipeline, features: list[Tensor]) -> Tensor:
    assert pipeline.discriminator is not None
    logits: Tensor = pipeline.discriminator(features)
    return logits.float() if pipeline.extensions.fp32_losses else logits


def _required(features: list[Tensor] | None, source: str) -> list[Tensor]:
    if features is None:
        raise RuntimeError(
            f"the discriminator needs features of the {source}, and none are captured "
            f"({source}._fastgen_captured is missing): call attach_feature_capture({source}, ...) "
            "of plugins.wan22 or plugins.qwen_image first"
        )
    return features
