"""The Wan 2.1 and 2.2 video VAE through diffusers' ``AutoencoderKLWan``.

Legend: B batch, C channels, T frames, H W height and width (of pixels or of latents).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from megagen.core import process
from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions
from megagen.data.codecs import Codec
from megagen.data.pretrained import load_pretrained


class WanVaeOptions(StrictOptions):
    """Options of ``WanVae``.

    Attributes:
        path: a diffusers directory (of a whole pipeline or of the VAE alone) or a hub id.
        subfolder: where in a pipeline the VAE is; None: ``path`` is the VAE's own directory.
        revision: git revision of a hub id.
        tiling: encode and decode in overlapping spatial tiles (less memory, not bitwise the same).
        precision: fp32, or bf16 for weights and arithmetic.
    """

    path: str
    subfolder: str | None = "vae"
    revision: str | None = None
    tiling: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"


class WanVae(Codec):
    """Causal 3-D VAE: frame 0 alone, then groups of ``temporal`` frames (so 4n + 1 frames).

    ``encode`` gives the mode (= mean) of the posterior, not normalised.
    """

    name = "wan_vae"
    Options = WanVaeOptions

    def __init__(self, options: WanVaeOptions) -> None:
        self.options = options
        self._dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
        self.vae = load_pretrained(
            AutoencoderKLWan,
            options.path,
            subfolder=options.subfolder,
            revision=options.revision,
            torch_dtype=self._dtype,
        )
        self.vae.eval().requires_grad_(False).to(process.device())
        if options.tiling:
            self.vae.enable_tiling()
        config = self.vae.config
        self.latent_channels = int(config.z_dim)
        self.spatial = int(config.scale_factor_spatial)
        self.temporal = int(config.scale_factor_temporal)

    def frames_rule(self, num_frames: int) -> bool:
        """1, 1 + temporal, 1 + 2 temporal..."""
        return num_frames >= 1 and (num_frames - 1) % self.temporal == 0

    def latent_frames(self, num_frames: int) -> int:
        """``(num_frames - 1) / temporal + 1``."""
        return (num_frames - 1) // self.temporal + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """``(latent_frames - 1) temporal + 1``."""
        return (latent_frames - 1) * self.temporal + 1

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """See the class."""
        pixels = video_BCTHW.to(process.device(), self._dtype)
        return self.vae.encode(pixels).latent_dist.mode().float().cpu()

    @torch.no_grad()
    def decode(self, latents_BCTHW: Tensor) -> Tensor:
        """Raw latents to pixels, cut to [-1, 1] by the VAE."""
        latents = latents_BCTHW.to(process.device(), self._dtype)
        return self.vae.decode(latents, return_dict=False)[0].float().cpu()

    def block_decoder(self) -> Callable[[Tensor], Tensor]:
        """Keeps the causal convolutions' last frames from call to call."""
        if self.vae.use_tiling:
            raise ConfigError(
                "is on: tiles are decoded one after the other, each over the whole clip.",
                remedy="Set it to false to decode block by block.",
                where="codec.tiling",
            )
        return _BlockDecoder(self.vae, self._dtype)

    def normalize(self, latents_BCTHW: Tensor) -> Tensor:
        """``(x - latents_mean) / latents_std`` per channel, from the VAE's config."""
        shape = (1, -1, 1, 1, 1)
        mean = torch.tensor(self.vae.config.latents_mean).view(shape)
        std = torch.tensor(self.vae.config.latents_std).view(shape)
        return (latents_BCTHW - mean) / std


class _BlockDecoder:
    """The VAE's decoder with its features of the last frames, apart from those of other clips."""

    def __init__(self, vae: AutoencoderKLWan, dtype: torch.dtype) -> None:
        self._vae, self._dtype = vae, dtype
        vae.clear_cache()
        self._features: list[Any] = list(vae._feat_map)
        self._is_first = True

    @torch.no_grad()
    def __call__(self, latents_BCTHW: Tensor) -> Tensor:
        latents = self._vae.post_quant_conv(latents_BCTHW.to(process.device(), self._dtype))
        frames = []
        for latent in latents.split(1, dim=2):
            is_first, self._is_first = self._is_first, False
            frames.append(
                self._vae.decoder(
                    latent, feat_cache=self._features, feat_idx=[0], first_chunk=is_first
                )
            )
        video = torch.cat(frames, dim=2)
        if self._vae.config.patch_size is not None:
            video = unpatchify(video, patch_size=self._vae.config.patch_size)
        return video.clamp(-1.0, 1.0).float().cpu()
