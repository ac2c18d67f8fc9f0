"""Losses for step distillation of diffusion models, for training loops of any kind.

Takes the place of ``modelopt.torch.fastgen``: the same names, arguments, results and errors. It
imports nothing else of megagen.

    import megagen.fastgen as mtf

    config = mtf.load_dmd_config("dmd2_wan21_1.3b")
    fake_score = mtf.create_fake_score(teacher)
    pipeline = mtf.DMDPipeline(student, teacher, fake_score, config)
    for step, (latents, text) in enumerate(data):
        if step % config.student_update_freq == 0:
            losses = pipeline.compute_student_loss(latents, noise, text, ...)
        else:
            losses = pipeline.compute_fake_score_loss(latents, noise, text)
        losses["total"].backward()
        ...
    video = pipeline.sample(noise, text)
"""

from megagen.fastgen import flow_matching, losses, plugins, utils
from megagen.fastgen.config import (
    DistillationConfig,
    DMDConfig,
    DMDExtensions,
    EMAConfig,
    ExtendedDMDConfig,
    SampleTimestepConfig,
)
from megagen.fastgen.ema import ExponentialMovingAverage
from megagen.fastgen.factory import (
    create_fake_score,
    create_fake_score_meta,
    load_fake_score_weights,
)
from megagen.fastgen.loader import load_config, load_dmd_config
from megagen.fastgen.methods.dmd import DMDPipeline
from megagen.fastgen.pipeline import DistillationPipeline

__all__ = [
    "DMDConfig",
    "DMDExtensions",
    "DMDPipeline",
    "DistillationConfig",
    "DistillationPipeline",
    "EMAConfig",
    "ExponentialMovingAverage",
    "ExtendedDMDConfig",
    "SampleTimestepConfig",
    "create_fake_score",
    "create_fake_score_meta",
    "flow_matching",
    "load_config",
    "load_dmd_config",
    "load_fake_score_weights",
    "losses",
    "plugins",
    "utils",
]
