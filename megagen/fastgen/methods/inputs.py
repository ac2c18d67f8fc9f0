"""What a distillation loss works on: the networks' arguments, and every random number of the call.

All draws are made before the loss's own forward passes, so that a batch may be worked off in parts
with the numbers of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megagen.fastgen import rollout
from megagen.fastgen.draws import Draws
from megagen.fastgen.flow_matching import add_noise
from megagen.fastgen.guidance import Guidance

if TYPE_CHECKING:
    from megagen.fastgen.methods.dmd import DMDPipeline

__all__ = ["Inputs", "draw_inputs", "student_input"]


@dataclass(frozen=True)
class Inputs:
    """One call's data, arguments and draws. B: batch.

    Args:
        latents: real samples, ``[B, ...]``.
        x_in: the student's input, like ``latents``.
        t_in: its time, ``[B]``.
        t: time of the re-noising, ``[B]``.
        eps: its noise, like ``latents``.
        given: further arguments of the networks.
        negative: those of the unconditional pass; None without guidance.
        guidance: of the teacher.
        t_real: time of the real samples' noising, ``[B]``; of the discriminator.
        eps_real: its noise.
        r1_noise: of R1's perturbation.
    """

    latents: Tensor
    x_in: Tensor
    t_in: Tensor
    t: Tensor
    eps: Tensor
    given: Mapping[str, Any]
    negative: Mapping[str, Any] | None = None
    guidance: Guidance | None = None
    t_real: Tensor | None = None
    eps_real: Tensor | None = None
    r1_noise: Tensor | None = None

    def rows(self, start: int, stop: int) -> Inputs:
        """Samples ``start`` to ``stop``; tensors and lists of B entries are cut."""
        batch = self.latents.shape[0]

        def cut(value: Any) -> Any:
            is_array = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)
            return value[start:stop] if is_array and len(value) == batch else value

        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Mapping):
                changes[item.name] = {name: cut(entry) for name, entry in value.items()}
            else:
                changes[item.name] = cut(value)
        return replace(self, **changes)


def draw_inputs(
    pipeline: DMDPipeline,
    latents: Tensor,
    noise: Tensor,
    given: Mapping[str, Any],
    draws: Draws,
    *,
    timestep: Tensor | None = None,
    eps: Tensor | None = None,
    for_discriminator: bool = False,
) -> Inputs:
    """Draw, in this order: the student's input, t, eps, and for a discriminator t', eps', R1's.

    Args:
        pipeline: the student (for its rollout) and the config.
        latents: data, ``[B, ...]``.
        noise: standard normal, like ``latents``.
        given: the networks' further arguments.
        draws: where numbers come from.
        timestep: in place of t.
        eps: in place of eps.
        for_discriminator: draw what only its loss needs.
    """
    config = pipeline.config
    # a subclass that replaces it for its own may know nothing of draws
    own: dict[str, Any] = {} if draws.generator is None else {"draws": draws}
    x_in, t_in = pipeline._build_student_input(latents, noise, **own, **given)
    batch, device = latents.shape[0], latents.device
    t = pipeline._draw_timesteps(draws, batch, device) if timestep is None else timestep
    eps = draws.normal(latents) if eps is None else eps
    inputs = Inputs(latents, x_in, t_in, t, eps, given)
    if not for_discriminator:
        return inputs
    t_real, eps_real = t, eps
    if not config.gan_use_same_t_noise:
        t_real = pipeline._draw_timesteps(draws, batch, device)
        eps_real = draws.normal(latents)
    r1_noise = draws.normal(latents) if config.gan_r1_reg_weight > 0 else None
    return replace(inputs, t_real=t_real, eps_real=eps_real, r1_noise=r1_noise)


def student_input(
    pipeline: DMDPipeline,
    latents: Tensor,
    noise: Tensor,
    given: Mapping[str, Any],
    draws: Draws,
) -> tuple[Tensor, Tensor]:
    """What a few-step student sees in training ``[B, ...]``, and its time ``[B]``, float32.

    One step: ``max_t * noise`` at ``max_t``. Several: each sample at a random time of ``t_list``,
    its data noised to there; with backward simulation (arXiv 2405.14867, section 4.5) one random
    rung for all, and in place of data what the student itself makes of fresh noise in the steps
    before that rung.

    Raises:
        ValueError: several steps without a fitting ``t_list``.
    """
    config = pipeline.config
    device, batch = latents.device, noise.shape[0]
    if config.student_sample_steps == 1:
        highest = config.sample_t_cfg.max_t
        t = torch.full((batch,), highest, device=device, dtype=torch.float32)
        return rollout.first_input(noise, highest), t
    t_list = pipeline._schedule()
    if not config.backward_simulation:
        t = draws.from_list(batch, t_list, device)
        return add_noise(latents, noise, t), t
    if len(t_list) != config.student_sample_steps + 1:
        raise ValueError(
            f"sample_t_cfg.t_list has {len(t_list)} entries; backward simulation of "
            f"{config.student_sample_steps} steps takes {config.student_sample_steps + 1}"
        )
    rung = draws.rung(len(t_list) - 1, device)
    t = torch.full((batch,), t_list[rung], device=device, dtype=torch.float32)
    if rung == 0:
        return rollout.first_input(noise, t_list[0]), t

    def predict_x0(x_t: Tensor, time: Tensor) -> Tensor:
        return pipeline._predict_x0(pipeline.student, x_t, time, **given)

    start = rollout.first_input(draws.normal(noise), t_list[0])
    kind = config.student_sample_type
    x0 = rollout.simulate(predict_x0, start, t_list, rung, kind, draws.normal)
    return add_noise(x0, noise, t), t
