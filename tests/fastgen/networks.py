"""Small networks of diffusers' kind, and a pipeline of ours beside the published one's on copies.

Legend: B batch, C channels, T H W latent size, L text tokens, D hidden size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CHANNELS, TEXT = 12, 4, 6


class Block(nn.Module):
    """Mixes neighbouring tokens and features, modulated by time and text."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, hidden_BND: Tensor, condition_BD: Tensor) -> Tensor:
        hidden = hidden_BND * (1 + condition_BD[:, None].tanh())
        hidden = hidden + self.mix(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden + self.feed(hidden)


class Network(nn.Module):
    """``[B, C, T, H, W]`` to the same, through two blocks."""

    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.text = nn.Linear(TEXT, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CHANNELS)
        self.returns = returns

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        gain: float = 1.0,
    ) -> Any:
        tokens = hidden_states.flatten(2).transpose(1, 2)
        condition = self.time(timestep.to(tokens.dtype)[:, None] / 10)
        if encoder_hidden_states is not None:
            condition = condition + self.text(encoder_hidden_states).mean(dim=1)
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, condition)
        out = gain * self.head(hidden).transpose(1, 2).reshape(hidden_states.shape)
        if self.returns == "tuple":
            return (out,)
        return out if self.returns == "tensor" else Output(out)


@dataclass
class Output:
    """What diffusers returns with ``return_dict=True``."""

    sample: Tensor


class Judge(nn.Module):
    """Logits ``[B, features]`` of token features."""

    def __init__(self, features: int = 2) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 1) for _ in range(features)])

    def forward(self, features: list[Tensor]) -> Tensor:
        pairs = zip(self.heads, features, strict=True)
        return torch.cat([head(feature.tanh()).mean(dim=1) for head, feature in pairs], dim=1)


def capture(network: nn.Module) -> None:
    """The published protocol by other means than ours: a list that forward hooks fill."""
    network._fastgen_captured = []
    for block in network.blocks:
        block.register_forward_hook(lambda _m, _i, out: network._fastgen_captured.append(out))


@dataclass
class Case:
    """Networks, data and the settings of one comparison."""

    config: dict[str, Any]
    dtype: torch.dtype = torch.float64
    returns: str = "tensor"
    batch: int = 3
    networks: dict[str, nn.Module] = field(init=False)
    data: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.networks = {
            name: Network(self.returns).to(self.dtype)
            for name in ("student", "teacher", "fake_score")
        }
        self.networks["discriminator"] = Judge().to(self.dtype)
        shape = (self.batch, CHANNELS, 2, 4, 3)
        self.data = {name: torch.randn(shape, dtype=self.dtype) for name in ("latents", "noise")}
        for name in ("encoder_hidden_states", "negative_encoder_hidden_states"):
            self.data[name] = torch.randn(self.batch, 5, TEXT, dtype=self.dtype)

    def pipeline(self, library: Any, *, config_class: str = "DMDConfig") -> Any:
        """``library``'s pipeline on copies of the networks."""
        config = getattr(library, config_class)(**copy.deepcopy(self.config))
        networks = copy.deepcopy(self.networks)
        if config.gan_loss_weight_gen > 0:
            capture(networks["teacher"])
        else:
            networks.pop("discriminator")
        return library.DMDPipeline(config=config, **networks)


def gradients(pipeline: Any) -> dict[str, Tensor]:
    """Every gradient of the pipeline's networks by name; clears them."""
    found = {}
    for role in ("student", "teacher", "fake_score", "discriminator"):
        network = getattr(pipeline, role)
        if network is None:
            continue
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                found[f"{role}.{name}"] = parameter.grad
            parameter.grad = None
    return found


def run(pipeline: Any, which: str, seed: int, **arguments: Any) -> tuple[dict, dict]:
    """Losses and gradients of ``compute_<which>_loss`` with the draws of ``seed``."""
    torch.manual_seed(seed)
    losses = getattr(pipeline, f"compute_{which}_loss")(**arguments)
    losses["total"].backward()
    return {name: loss.detach() for name, loss in losses.items()}, gradients(pipeline)


def assert_same(ours: tuple[dict, dict], theirs: tuple[dict, dict], tolerance: float) -> None:
    """Equal names in equal order, values and gradients equal to a relative distance."""
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            distance = float((a[name] - b[name]).double().norm())
            assert distance <= tolerance * float(b[name].double().norm()), (name, distance)
