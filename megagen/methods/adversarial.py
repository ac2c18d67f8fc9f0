"""The adversarial terms of DMD2: heads on a frozen network's features tell samples from data.

Yin et al., arXiv 2405.14867, section 4.3, in non-saturating form, with the approximate R1 of Lin et
al., arXiv 2501.08316. D are the heads, f the features of teacher or critic at a noised input:

    student:        w softplus(-D(f(x_t)))
    discriminator:  softplus(D(f(x_t))) + softplus(-D(f(y_t))) + w_R1 (D(f(y_t)) - D(f(y')))^2

with x the student's samples and y data.

Legend: B batch, C channels, T frames, H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from megagen.core.errors import ConfigError
from megagen.core.options import Betas, StrictOptions
from megagen.core.streams import Streams
from megagen.engine.features import FeatureLoss
from megagen.engine.head import Head
from megagen.engine.role import Role
from megagen.engine.settings import OptimizerSettings
from megagen.fastgen.losses import gan_disc_loss, r1_loss
from megagen.fastgen.video_discriminators import Discriminator_VideoDiT
from megagen.methods.few_step import noised, sigma_of
from megagen.methods.scores import broadcast
from megagen.models.base import ModelPlugin, Request
from megagen.models.heads import HeadsLoad


class DiscriminatorOptions(StrictOptions):
    """``method.discriminator``: heads on a frozen network's features, and their optimizer.

    Attributes:
        feature_source: whose features: the teacher's, or the critic's (the DMD2 paper).
        feature_indices: blocks from 0; None: those at 1/2, 3/4 and the last.
        head: factorized (space, then time), conv3d, branches (space and time apart) or attention.
        width: channels inside a head.
        learning_rate: None: ``training.optimizer``'s, as for the keys below.
        betas: Adam's two decay rates.
        weight_decay: decoupled decay.
        max_grad_norm: clip by the norm; 0: no clipping; None: ``callbacks.grad_clip``'s.
    """

    feature_source: Literal["teacher", "critic"] = "teacher"
    feature_indices: list[int] | None = None
    head: Literal["factorized", "conv3d", "branches", "attention"] = "factorized"
    width: int = Field(256, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    betas: Betas | None = None
    weight_decay: float | None = Field(None, ge=0)
    max_grad_norm: float | None = Field(None, ge=0)

    def blocks(self, num_layers: int) -> list[int]:
        """The blocks in order.

        Raises:
            ConfigError: one that the network does not have, or none.
        """
        found = self.feature_indices
        if found is None:
            found = [num_layers // 2, 3 * num_layers // 4, num_layers - 1]
        if not found or not all(0 <= block < num_layers for block in found):
            raise ConfigError(
                f"is {found}, the network has {num_layers} blocks.",
                remedy=f"Give numbers from 0 to {num_layers - 1}.",
                where="method.discriminator.feature_indices",
            )
        return sorted(set(found))

    def module(
        self, plugin: ModelPlugin, generator: torch.Generator | None
    ) -> Discriminator_VideoDiT:
        """The heads for a network's features; ``generator`` draws their weights."""
        return Discriminator_VideoDiT(
            self.blocks(plugin.num_layers),
            plugin.num_layers,
            plugin.hidden_size,
            head=self.head,
            width=self.width,
            generator=generator,
        )

    def optimizer(self, base: OptimizerSettings) -> OptimizerSettings:
        """The run's settings with what is given here."""
        keys = ("learning_rate", "betas", "weight_decay", "max_grad_norm")
        own = {key: getattr(self, key) for key in keys}
        return replace(base, **{key: value for key, value in own.items() if value is not None})


class GANOptions(StrictOptions):
    """Weights of the adversarial terms.

    Attributes:
        gan_loss_weight_gen: w, of the student's adversarial loss; 0: no discriminator.
        gan_use_same_t_noise: noise data and samples alike in the discriminator's loss.
        gan_r1_reg_weight: weight of R1.
        gan_r1_reg_alpha: size of R1's perturbation.
        gan_r1_at: which point R1 perturbs: the clean data (ModelOpt), or the noised.
        discriminator: its heads.
    """

    gan_loss_weight_gen: float = Field(0.0, ge=0)
    gan_use_same_t_noise: bool = False
    gan_r1_reg_weight: float = Field(0.0, ge=0)
    gan_r1_reg_alpha: float = Field(0.1, ge=0)
    gan_r1_at: Literal["clean", "noised"] = "clean"
    discriminator: DiscriminatorOptions = DiscriminatorOptions()

    @property
    def has_discriminator(self) -> bool:
        """Whether there are adversarial terms."""
        return self.gan_loss_weight_gen > 0

    def heads_load(self, plugins: Mapping[str, ModelPlugin]) -> HeadsLoad | None:
        """What plans count for the heads; None where there are none."""
        own = self.discriminator
        if not self.has_discriminator:
            return None
        plugin = plugins[own.feature_source]
        with torch.device("meta"):
            parameters = sum(p.numel() for p in own.module(plugin, None).parameters())
        return HeadsLoad(
            source=own.feature_source,
            num_features=len(own.blocks(plugin.num_layers)),
            num_inputs=2 + (self.gan_r1_reg_weight > 0),
            parameters=parameters,
            # a map to the head's width and two more of its size, or normed tokens, keys, values
            kept_per_token=3 * own.width
            if own.head != "attention"
            else plugin.hidden_size + 2 * own.width,
        )

    def check_gan(self, plugins: Mapping[str, ModelPlugin]) -> None:
        """Raise ``ConfigError`` where the terms contradict each other or the networks."""
        if self.gan_r1_reg_weight > 0 and not self.has_discriminator:
            raise ConfigError(
                f"is {self.gan_r1_reg_weight}, but there is no discriminator.",
                remedy="Set gan_loss_weight_gen above 0, or this to 0.",
                where="method.gan_r1_reg_weight",
            )
        if self.has_discriminator:
            own = self.discriminator
            own.blocks(plugins[own.feature_source].num_layers)


@dataclass(frozen=True)
class RealDraw:
    """One micro-batch of data for the discriminator, and its random numbers.

    Args:
        x0: clean latents, normalised.
        timestep_B: of their noising.
        noise_BCTHW: of their noising.
        r1_BCTHW: of R1's perturbation; None without R1.
    """

    x0: Tensor
    timestep_B: Tensor
    noise_BCTHW: Tensor
    r1_BCTHW: Tensor | None


class Adversary:
    """The discriminator.

    Args:
        options: weights and heads.
        roles: one of which lends its features.
        streams: of the run, for the first weights and R1.
        base: ``training.optimizer``.
    """

    def __init__(
        self,
        options: GANOptions,
        roles: Mapping[str, Role],
        streams: Streams,
        base: OptimizerSettings,
    ) -> None:
        own = options.discriminator
        self.options, self.streams = options, streams
        self.source = roles[own.feature_source]
        plugin = self.source.plugin
        self.blocks = own.blocks(plugin.num_layers)
        self.heads = own.module(plugin, streams.generator("discriminator"))
        self.head = Head("discriminator", self.heads, own.optimizer(base))

    def draw(
        self,
        x0: Tensor,
        timestep_B: Tensor,
        noise_BCTHW: Tensor,
        step: int,
        positions: Sequence[int],
    ) -> RealDraw:
        """A micro-batch of data, how it is noised, and R1's perturbation of it."""
        r1 = None
        if self.options.gan_r1_reg_weight > 0:
            r1 = self.streams.normal("real/r1_noise", step, positions, x0.shape[1:]).to(x0)
        return RealDraw(x0, timestep_B, noise_BCTHW, r1)

    def sample_gradient(self, noisy: Sequence[Request]) -> tuple[list[Tensor], list[Tensor]]:
        """What the student is told of its noised samples.

        Returns:
            ``w d L / d x0`` of each micro-batch's mean loss L, and L itself.
        """
        loss = FeatureLoss(self.blocks, self._share_of_loss)
        gradients = self.source.input_gradient(noisy, feature_loss=loss)
        weight = self.options.gan_loss_weight_gen
        scaled = [
            weight * (1 - broadcast(sigma_of(request), gradient)) * gradient
            for request, gradient in zip(noisy, gradients, strict=True)
        ]
        return scaled, [value.sum() for value in loss.losses]

    def _share_of_loss(self, place: int, feature: Tensor, request: Request) -> Tensor:
        """One feature's part of ``gan_gen_loss``, the mean over samples and all logits."""
        logits = self.heads.forward_head(place, feature)
        return F.softplus(-logits).sum() / (len(logits) * sum(self.heads.heads_per_feature))

    def learn(self, fakes: Sequence[Request], reals: Sequence[RealDraw]) -> list[dict[str, Tensor]]:
        """Add the gradient of the discriminator's mean loss; its terms of each micro-batch."""
        self.head.zero_grad()
        found = []
        for fake, real in zip(fakes, reals, strict=True):
            terms = self._terms(fake, real)
            weight = self.options.gan_r1_reg_weight
            total = terms["gan_disc"] + weight * terms.get("r1", torch.zeros(()))
            (total / len(fakes)).backward()
            found.append({name: value.detach() for name, value in terms.items()})
        return found

    def _terms(self, fake: Request, real: RealDraw) -> dict[str, Tensor]:
        y_t = noised(real.x0, real.noise_BCTHW, real.timestep_B, fake.condition)
        requests = [fake, y_t]
        if real.r1_BCTHW is not None:
            base = real.x0 if self.options.gan_r1_at == "clean" else y_t.latents_BCTHW
            moved = base + self.options.gan_r1_reg_alpha * real.r1_BCTHW
            requests.append(y_t.with_(latents_BCTHW=moved))
        features = self.source.features(requests, self.blocks)
        logits = [self.heads(list(of_request)) for of_request in features]
        terms = {"gan_disc": gan_disc_loss(logits[1], logits[0])}
        return terms if len(logits) == 2 else {**terms, "r1": r1_loss(logits[1], logits[2])}
