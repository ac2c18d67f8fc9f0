"""Scores of distribution matching: at which noise levels, with what guidance, against what.

Legend: B batch, C channels, T frames, H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megagen.core import process
from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions
from megagen.core.streams import Streams
from megagen.engine.role import Role
from megagen.fastgen.flow_matching import shift_sigma
from megagen.fastgen.guidance import Guidance
from megagen.fastgen.utils import expand_like
from megagen.methods.few_step import Share, draw_keys, predict_x0, sigma_of
from megagen.models.base import ModelPlugin, Request

Space = Literal["flow", "x0", "eps", "v"]


# -- timesteps of the scores -----------------------------------------------------------------------
class ScoreTimeOptions(StrictOptions):
    """Noise levels at which samples are compared.

    Attributes:
        min_timestep_ratio: lowest t / 1000 of the scores.
        max_timestep_ratio: highest t / 1000 of the scores.
        timestep_bounds: what those two do: clamp (what lies outside is moved to the bound) or
            rescale (the whole law is squeezed between them).
        score_timestep_per: what one score timestep is for: a sample, a micro_batch (FastVideo) or
            the step.
        score_flow_shift: shift of the scores' timesteps, > 0; None: the student's ``flow_shift``.
    """

    min_timestep_ratio: float = Field(0.0, ge=0, le=1)
    max_timestep_ratio: float = Field(1.0, ge=0, le=1)
    timestep_bounds: Literal["clamp", "rescale"] = "clamp"
    score_timestep_per: Share = "sample"
    score_flow_shift: float | None = Field(None, gt=0)


def score_range(
    options: ScoreTimeOptions, plugins: Mapping[str, ModelPlugin]
) -> tuple[float, float]:
    """(low, high] of the timesteps that all networks serve; experts serve a part of 0..1000.

    Raises:
        ConfigError: the networks have no timestep in common, or none within the ratios.
    """
    ranges = [plugin.timestep_range for plugin in plugins.values()]
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if low >= high:
        served = ", ".join(f"{n} ({p.timestep_range})" for n, p in plugins.items())
        raise ConfigError(
            f"no timestep is served by every network: {served}.",
            remedy="Give all roles the same expert.",
            where="models",
        )
    bottom = max(low, 1000 * options.min_timestep_ratio)
    top = min(high, 1000 * options.max_timestep_ratio)
    if bottom >= top:
        raise ConfigError(
            f"no score timestep lies between min_timestep_ratio {options.min_timestep_ratio} and "
            f"max_timestep_ratio {options.max_timestep_ratio} (the networks serve {low:g} to "
            f"{high:g}).",
            remedy="Widen them.",
            where="method.min_timestep_ratio",
        )
    return low, high


def score_timestep(
    streams: Streams,
    purpose: str,
    step: int,
    positions: Sequence[int],
    options: ScoreTimeOptions,
    *,
    shift: float,
    served: tuple[float, float],
) -> Tensor:
    """Timesteps ``[B]`` float64 on the run's device, uniform before the shift.

    Args:
        streams: of the run.
        purpose: of the draw.
        step: of the run.
        positions: of the samples.
        options: bounds, sharing, shift.
        shift: the student's, where ``options`` has none.
        served: (low, high] of the networks: the law is rescaled into it, never clamped, so that
            half of the draws do not pile up at an expert's boundary.
    """
    keys = draw_keys(options.score_timestep_per, positions)
    u_B = 1 - streams.uniform(purpose, step, keys).double()
    own = options.score_flow_shift
    sigma_B = shift_sigma(u_B, shift if own is None else own)
    bottom, top = 1000 * options.min_timestep_ratio, 1000 * options.max_timestep_ratio
    low, high = served
    if options.timestep_bounds == "rescale":
        low, high = max(low, bottom), min(high, top)
    timestep_B = low + (high - low) * sigma_B
    return timestep_B.clamp(bottom, top).to(process.device())


# -- guidance --------------------------------------------------------------------------------------
class UncondOptions(StrictOptions):
    """``method.cfg_uncond``: what the unconditional pass of guidance sees.

    Attributes:
        text: the embedding of the negative_prompt or of the empty prompt as stored with the
            dataset, zero, or keep the sample's own.
        image: condition images of image-to-video: keep them, zero, or drop them.
        on_missing: where the dataset has no such embedding: error, or ignore (zeros take its
            place).
    """

    text: Literal["negative_prompt", "empty", "zero", "keep"] = "negative_prompt"
    image: Literal["keep", "zero", "drop"] = "keep"
    on_missing: Literal["error", "ignore"] = "error"


class Unconditional:
    """Makes a request unconditional.

    Args:
        options: the policy.
        embeddings: ``[L, D]`` of the ``empty`` and the ``negative`` prompt, as far as known.
        needed: some pass will be made.

    Raises:
        ConfigError: the embedding is missing and needed.
    """

    def __init__(
        self, options: UncondOptions, embeddings: Mapping[str, Tensor], *, needed: bool
    ) -> None:
        self.options = options
        name = {"negative_prompt": "negative", "empty": "empty"}.get(options.text)
        self._text_LD = embeddings.get(name) if name else None
        if needed and name and self._text_LD is None and options.on_missing == "error":
            raise ConfigError(
                f"is {options.text}, but the dataset has no embedding of that prompt.",
                remedy="Set training.data.unconditional_path to a safetensors file that has it, or "
                "cfg_uncond.text to zero.",
                where="method.cfg_uncond.text",
            )

    def __call__(self, request: Request) -> Request:
        """The same request with the unconditional condition."""
        condition: dict[str, Tensor] = {}
        for name, value in request.condition.items():
            policy = self.options.text if name == "text_embeds_BLD" else self.options.image
            if policy == "keep":
                condition[name] = value
            elif policy in ("negative_prompt", "empty") and self._text_LD is not None:
                condition[name] = self._text(value)
            elif policy != "drop":
                condition[name] = torch.zeros_like(value)
        return request.with_(condition=condition)

    def _text(self, like_BLD: Tensor) -> Tensor:
        """The embedding padded with zeros, or cut, to the sample's length."""
        assert self._text_LD is not None
        text_LD = self._text_LD[: like_BLD.shape[1]].to(like_BLD)
        padded = torch.zeros_like(like_BLD)
        padded[:, : text_LD.shape[0]] = text_LD
        return padded


def guided_x0(
    role: Role, requests: Sequence[Request], guidance: Guidance, unconditional: Unconditional
) -> list[Tensor]:
    """x0 under guidance, without gradient; at scale 1 no unconditional pass is made.

    Both passes of all micro-batches go through the pipeline in one go.
    """
    if guidance.scale == 1:
        return predict_x0(role, requests)
    found = predict_x0(role, [*requests, *map(unconditional, requests)])
    pairs = zip(found[: len(requests)], found[len(requests) :], requests, strict=True)
    return [guidance.combine(cond, uncond, sigma_of(request)) for cond, uncond, request in pairs]


# -- spaces ----------------------------------------------------------------------------------------
def in_space(space: Space, velocity: Tensor, request: Request) -> Tensor:
    """What a velocity at the request's input says in another parametrisation; differentiable.

    ``x0 = x_t - sigma v``, ``eps = x_t + (1 - sigma) v``, and Salimans and Ho's
    ``v = (1 - sigma) eps - sigma x0``.
    """
    if space == "flow":
        return velocity
    sigma = broadcast(sigma_of(request), velocity)
    x_t = request.latents_BCTHW.to(velocity)
    x0, eps = x_t - sigma * velocity, x_t + (1 - sigma) * velocity
    if space == "v":
        return (1 - sigma) * eps - sigma * x0
    return x0 if space == "x0" else eps


def broadcast(sigma: Tensor, like: Tensor) -> Tensor:
    """``sigma_of`` a request, ready for arithmetic with ``like``, in its dtype and place."""
    return expand_like(sigma, like).to(like)


def last_frames(tensor: Tensor, count: int | None) -> Tensor:
    """The last ``count`` latent frames; all where it is None."""
    return tensor if count is None else tensor[:, :, -count:]
