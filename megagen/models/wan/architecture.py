"""Shapes of the Wan family: the keys of diffusers' ``config.json`` and the published presets.

Legend: D hidden = heads x head dim, F feed-forward, p patch volume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from megagen.core.options import StrictOptions


class WanArchitecture(StrictOptions):
    """``WanTransformer3DModel``'s config, and the constants that normalise its latents.

    Args:
        patch_size: (frames, rows, columns) of a token.
        num_attention_heads: heads.
        attention_head_dim: K, even.
        in_channels: of the network's input; beyond ``out_channels`` come condition channels.
        out_channels: of the latents.
        text_dim: text encoder features.
        freq_dim: size of the timestep sinusoid.
        ffn_dim: F.
        num_layers: blocks.
        cross_attn_norm: affine norm before cross-attention.
        qk_norm: ``rms_norm_across_heads``, the only one there is.
        eps: of the norms.
        image_dim: image encoder features; None: no image embedder.
        added_kv_proj_dim: D where blocks have keys and values for image tokens; None: they have
            not.
        rope_max_seq_len: largest size of an axis in diffusers' rotary tables.
        pos_embed_seq_len: image tokens of first and last frame together; None: no position
            embedding.
        latents_mean: per latent channel; null: 0. Left out: from the VAE's config, or the known
            constants of the Wan 2.1 (16 channels) and 2.2 (48) VAEs.
        latents_std: per latent channel; null: 1. Left out: likewise.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = Field(40, ge=1)
    attention_head_dim: int = Field(128, ge=2, multiple_of=2)
    in_channels: int = Field(16, ge=1)
    out_channels: int = Field(16, ge=1)
    text_dim: int = Field(4096, ge=1)
    freq_dim: int = Field(256, ge=2, multiple_of=2)
    ffn_dim: int = Field(13824, ge=1)
    num_layers: int = Field(40, ge=1)
    cross_attn_norm: bool = True
    qk_norm: Literal["rms_norm_across_heads"] = "rms_norm_across_heads"
    eps: float = Field(1e-6, gt=0)
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = Field(1024, ge=1)
    pos_embed_seq_len: int | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None

    @model_validator(mode="after")
    def _fits(self) -> WanArchitecture:
        if (self.image_dim is None) != (self.added_kv_proj_dim is None):
            raise ValueError("image_dim and added_kv_proj_dim go together: give both or neither")
        if self.added_kv_proj_dim not in (None, self.hidden_size):
            raise ValueError(
                f"added_kv_proj_dim is {self.added_kv_proj_dim}; it must be the hidden size "
                f"num_attention_heads x attention_head_dim = {self.hidden_size}"
            )
        if self.pos_embed_seq_len is not None and self.image_dim is None:
            raise ValueError("pos_embed_seq_len needs image_dim")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.out_channels:
                raise ValueError(
                    f"{name} has {len(values)} values for {self.out_channels} channels"
                )
        return self

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_volume(self) -> int:
        """Latent positions of a token."""
        return math.prod(self.patch_size)

    def diffusers_config(self) -> dict[str, Any]:
        """The keys that diffusers knows."""
        values = self.model_dump(exclude={"latents_mean", "latents_std"})
        return {**values, "patch_size": list(self.patch_size)}


@dataclass(frozen=True)
class Preset:
    """A published checkpoint's shape and conventions.

    Args:
        architecture: what differs from ``WanArchitecture``'s defaults.
        flow_shift: of its schedule.
        boundary_ratio: sigma at which the high-noise expert hands over to the low-noise one.
        expand_timesteps: a given first frame enters as tokens at timestep 0 (TI2V).
    """

    architecture: dict[str, Any] = field(default_factory=dict)
    flow_shift: float = 3.0
    boundary_ratio: float | None = None
    expand_timesteps: bool = False


_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

PRESETS: dict[str, Preset] = {
    "t2v-1.3b": Preset({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "t2v-14b": Preset(),
    "i2v-14b": Preset(_IMAGE),
    "flf2v-14b": Preset({**_IMAGE, "pos_embed_seq_len": 514}, flow_shift=16.0),
    "ti2v-5b": Preset(
        {
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
            "in_channels": 48,
            "out_channels": 48,
        },
        flow_shift=5.0,
        expand_timesteps=True,
    ),
    "t2v-a14b": Preset(flow_shift=12.0, boundary_ratio=0.875),
    "i2v-a14b": Preset({"in_channels": 36}, flow_shift=5.0, boundary_ratio=0.9),
}

# Mean and standard deviation per channel of the Wan 2.1 VAE's latents (16) and the 2.2 VAE's (48).
# fmt: off
LATENT_CONSTANTS: dict[int, tuple[list[float], list[float]]] = {
    16: (
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    ),
    48: (
        [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
         -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
         -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
         -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
         0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
         0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
         0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
         0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
         0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
    ),
}
# fmt: on
