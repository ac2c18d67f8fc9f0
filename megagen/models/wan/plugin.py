"""``WanModel``: builds Wan transformers and speaks their conventions.

Wan predicts the velocity ``eps - x0`` and takes timesteps in 0..1000, as megagen does; what is its
own are the condition channels of I2V, the first-frame tokens of TI2V-5B and the latents' constants.

Legend: B batch, C channels, T H W latent sizes, S tokens, D hidden, F feed-forward, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megagen.core.errors import DataError
from megagen.core.vsa import CONFIG_KEY as VSA_KEY
from megagen.layers.patch import token_grid
from megagen.layers.sparse import scored_pairs
from megagen.models.base import ModelPlugin, Request, WeightSource
from megagen.models.wan import names
from megagen.models.wan.layout import check_layout, check_sparse
from megagen.models.wan.options import WanOptions, find_directory, resolve_options
from megagen.parallel.dims import ParallelDims

MASK_CHANNELS = 4
IMAGE_TOKENS = 257
"""Tokens of CLIP ViT-H for one image, for ``flops``."""


class WanModel(ModelPlugin):
    """One Wan transformer.

    Args:
        options: see ``WanOptions``.
        where: key path of the options in the config, for errors.
    """

    family: ClassVar[str] = "wan"
    Options = WanOptions

    def __init__(self, options: WanOptions, *, where: str = "models.student") -> None:
        resolved = resolve_options(options, where)
        self.options, self.where = options, where
        self.arch = arch = resolved.architecture
        self.flow_shift = resolved.preset.flow_shift
        self.boundary_ratio = resolved.preset.boundary_ratio
        self.expand_timesteps = resolved.preset.expand_timesteps
        self.num_layers, self.num_heads = arch.num_layers, arch.num_attention_heads
        self.hidden_size, self.ffn_size = arch.hidden_size, arch.ffn_dim
        self.in_channels = self.out_channels = arch.out_channels
        self._mean = _constant(resolved.latents_mean, arch.out_channels, 0.0)
        self._std = _constant(resolved.latents_std, arch.out_channels, 1.0)
        self.vsa = options.sparse_attention(find_directory(options, ["config.json"], where), where)

    # -- shape ---------------------------------------------------------------------------------
    def check(self, dims: ParallelDims, where: str) -> None:
        """Heads and FFN by ``tp_size``, heads also by the all-to-all of CP; layers by stages."""
        check_layout(self.arch, dims, where)
        if self.vsa is not None:
            check_sparse(self.vsa, dims, self.where, where)

    def transformer_config(
        self,
        dims: ParallelDims,
        *,
        precision: str = "fp32",
        recompute: str = "none",
        transformer_impl: str = "local",
        fp8: bool = False,
        **fields: Any,
    ) -> Any:
        """A fresh ``TransformerConfig``.

        Args:
            dims: layout.
            precision: ``fp32`` | ``bf16``: of parameters and hidden states.
            recompute: ``none`` | ``selective`` (core attention, activation) | ``full`` (blocks).
            transformer_impl: ``local`` | ``transformer_engine``.
            fp8: Transformer Engine's linears in fp8.
            fields: further fields of ``TransformerConfig``.
        """
        from megagen.models.wan.layout import megatron_config

        return megatron_config(
            self.arch,
            dims,
            precision=precision,
            recompute=recompute,
            transformer_impl=transformer_impl,
            fp8=fp8,
            **fields,
        )

    def build_chunk(
        self,
        config: Any,
        pg: Any,
        *,
        layers: range,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        attention_backend: str,
    ) -> nn.Module:
        """One pipeline chunk; its weights are not initialised."""
        from megagen.models.wan.transformer import WanTransformer

        return WanTransformer(
            config,
            self.arch,
            pg,
            layers=layers,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            attention_backend=attention_backend,
            vsa=self.vsa,
        )

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Patches along (frame, row, column) of latents ``[..., T, H, W]``."""
        return token_grid(latent_shape, self.arch.patch_size)

    # -- weights -------------------------------------------------------------------------------
    @cached_property
    def directory(self) -> Path | None:
        """The directory of the first weights, fetched where it is a hub's; None: fresh weights."""
        patterns = ["config.json", "diffusion_pytorch_model*.safetensors*"]
        return find_directory(self.options, patterns, self.where)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the diffusers checkpoint."""
        return self._shapes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return names.tensor_shapes(self.arch, has_gate=self.vsa is not None)

    def may_start_at_zero(self, name: str) -> bool:
        """The gates of sparse attention, in weights that were trained without it."""
        return names.GATE in name

    def weights(self, chunk: nn.Module) -> dict[str, WeightSource]:
        """Sources of a chunk's parameters."""
        return names.weight_sources(chunk, self.arch, self.tensor_shapes())

    def weight_source(self, name: str) -> WeightSource:
        """Source of one parameter, by its name."""
        return names.weight_source(name, self.arch, self.tensor_shapes())

    def portable_options(self) -> dict[str, Any]:
        """Options that build this plugin again with no file at hand."""
        architecture = {
            **self.arch.diffusers_config(),
            "latents_mean": self._mean.flatten().tolist(),
            "latents_std": self._std.flatten().tolist(),
        }
        return {
            "architecture": architecture,
            "expert": self.options.expert,
            "boundary_ratio": self.boundary_ratio,
            "flow_shift": self.flow_shift,
            "expand_timesteps": self.expand_timesteps,
            "vsa": None if self.vsa is None else self.vsa.model_dump(mode="json"),
        }

    def diffusers_config(self) -> dict[str, Any]:
        """``config.json`` of a ``WanTransformer3DModel``, with what makes its attention sparse."""
        own = {} if self.vsa is None else {VSA_KEY: self.vsa.model_dump(mode="json")}
        return {"_class_name": "WanTransformer3DModel", **self.arch.diffusers_config(), **own}

    def initial_tensor(self, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """diffusers' rules: torch's defaults for linears, ones and zeros, ``randn / sqrt(D)``."""
        if name.endswith("scale_shift_table"):
            return torch.randn(tuple(shape), generator=generator) / shape[-1] ** 0.5
        if name.endswith("pos_embed") or self.may_start_at_zero(name):
            return torch.zeros(tuple(shape))
        module, _, kind = name.rpartition(".")
        if "norm" in module.rpartition(".")[2]:
            return torch.ones(tuple(shape)) if kind == "weight" else torch.zeros(tuple(shape))
        fan_in = math.prod(self.tensor_shapes()[f"{module}.weight"][1:])
        bound = 1.0 / math.sqrt(fan_in)
        return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)

    # -- conventions ---------------------------------------------------------------------------
    def inputs(self, request: Request) -> Request:
        """Condition channels behind the latents (I2V); a given first frame in their place (TI2V).

        Conditions read, normalised as the latents are:
            condition_latents_BCTHW: the condition channels, mask first; without the mask's 4
                channels the mask says that the first latent frame is given.
            first_frame_latents_BCTHW: a clean first frame, ``[B, C, 1, H, W]`` (or more frames, of
                which the first counts).
        """
        extra = self.arch.in_channels - self.arch.out_channels
        if extra:
            channels = _condition_channels(request, extra)
            latents = torch.cat([request.latents_BCTHW, channels.to(request.latents_BCTHW)], dim=1)
            return request.with_(latents_BCTHW=latents)
        if self.expand_timesteps and "first_frame_latents_BCTHW" in request.condition:
            return _with_first_frame(request)
        return request

    def normalize(self, latents_BCTHW: Tensor) -> Tensor:
        """``(x - mean) / std`` per channel."""
        mean, std = (t.to(latents_BCTHW) for t in (self._mean, self._std))
        return (latents_BCTHW - mean) / std

    def denormalize(self, latents_BCTHW: Tensor) -> Tensor:
        """``x std + mean`` per channel."""
        mean, std = (t.to(latents_BCTHW) for t in (self._mean, self._std))
        return latents_BCTHW * std + mean

    @property
    def timestep_range(self) -> tuple[float, float]:
        """(low, high] of the expert's timesteps."""
        if self.options.expert is None or self.boundary_ratio is None:
            return (0.0, 1000.0)
        boundary = 1000.0 * self.boundary_ratio
        return (boundary, 1000.0) if self.options.expert == "high" else (0.0, boundary)

    # -- figures -------------------------------------------------------------------------------
    def flops(
        self, latent_shape: Sequence[int], text_len: int, sparsity: float | None = None
    ) -> float:
        """2 x multiply-adds of one forward pass of one sample with one timestep."""
        arch, tokens = self.arch, self.num_tokens(latent_shape)
        hidden, ffn = arch.hidden_size, arch.ffn_dim
        has_image = arch.image_dim is not None
        image = (arch.pos_embed_seq_len or IMAGE_TOKENS) if has_image else 0
        block: float = tokens * hidden * (6 * hidden + 2 * ffn)  # q k v o, cross q o, feed-forward
        block += 2 * (text_len + image) * hidden * hidden  # cross k v
        block += 2 * tokens * (text_len + image) * hidden  # its scores and their use
        block += 2 * self.scored_pairs(latent_shape, sparsity) * hidden
        if self.vsa is not None:
            block += tokens * hidden * hidden  # gate
        channels = arch.in_channels + arch.out_channels
        outside = tokens * channels * arch.patch_volume * hidden
        outside += hidden * (arch.freq_dim + 7 * hidden)
        outside += text_len * hidden * (arch.text_dim + hidden)
        if arch.image_dim is not None:
            outside += image * arch.image_dim * (arch.image_dim + hidden)
        return 2.0 * (arch.num_layers * block + outside)

    def scored_pairs(self, latent_shape: Sequence[int], sparsity: float | None) -> float:
        """Pairs of query and key that self-attention scores in a head; S^2 where it is dense."""
        frames, *frame = self.token_grid(latent_shape)
        return scored_pairs(self.vsa, sparsity, [frames], [frames], (frame[0], frame[1]))

    def num_parameters(self) -> int:
        """Parameters of the whole network."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())


def _constant(values: list[float] | None, channels: int, default: float) -> Tensor:
    filled = values if values is not None else [default] * channels
    return torch.tensor(filled, dtype=torch.float32).view(1, -1, 1, 1, 1)


def _condition_channels(request: Request, extra: int) -> Tensor:
    if "condition_latents_BCTHW" not in request.condition:
        raise DataError(
            f"the network takes {extra} condition channels, but the batch has no "
            f"'condition_latents_BCTHW'; it has {', '.join(sorted(request.condition)) or 'none'}.",
            remedy="Preprocess the data for image-to-video, or train a text-to-video network.",
        )
    latents = request.condition["condition_latents_BCTHW"]
    if latents.size(1) == extra - MASK_CHANNELS:
        mask = latents.new_zeros(latents.size(0), MASK_CHANNELS, *latents.shape[2:])
        mask[:, :, 0] = 1
        latents = torch.cat([mask, latents], dim=1)
    expected = (request.latents_BCTHW.size(0), extra, *request.latents_BCTHW.shape[2:])
    if latents.shape != expected:
        raise DataError(
            f"condition_latents_BCTHW is {tuple(latents.shape)}, the network takes {expected} "
            f"(or {extra - MASK_CHANNELS} channels without the mask).",
            remedy="Preprocess the data with this network's VAE.",
        )
    return latents


def _with_first_frame(request: Request) -> Request:
    """The clean frame in place of the noisy one, at timestep 0; the other frames as they are."""
    latents, timestep = request.latents_BCTHW, request.timestep
    first = request.condition["first_frame_latents_BCTHW"][:, :, :1].to(latents)
    latents = torch.cat([first, latents[:, :, 1:]], dim=2)
    frames = latents.size(2)
    if timestep.ndim == 1:
        timestep = timestep[:, None].expand(-1, frames)
    known = torch.arange(timestep.size(1), device=timestep.device) < timestep.size(1) // frames
    return request.with_(latents_BCTHW=latents, timestep=timestep.masked_fill(known, 0.0))
