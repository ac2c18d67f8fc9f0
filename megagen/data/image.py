"""Image features of a clip's first frame, for image-to-video models: CLIP's vision tower.

Legend: B batch, H W height and width, L tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagen.core import process
from megagen.core.options import StrictOptions
from megagen.data.pretrained import load_pretrained

# OpenAI's CLIP statistics of RGB in [0, 1], which Wan's image encoder was trained with.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipVisionOptions(StrictOptions):
    """Options of ``ClipVision``.

    Attributes:
        path: a diffusers pipeline directory or a hub id.
        subfolder: the encoder's folder in it; None: ``path`` itself.
        revision: git revision of a hub id.
    """

    path: str
    subfolder: str | None = "image_encoder"
    revision: str | None = None


class ClipVision:
    """The last but one hidden state of transformers' ``CLIPVisionModel``, as Wan I2V takes it."""

    def __init__(self, options: ClipVisionOptions) -> None:
        from transformers import CLIPVisionModel  # seconds to import

        self.options = options
        self.model = load_pretrained(
            CLIPVisionModel,
            options.path,
            subfolder=options.subfolder,
            revision=options.revision,
            torch_dtype=torch.float32,
        )
        self.model.eval().requires_grad_(False).to(process.device())

    def spec(self) -> dict[str, Any]:
        """JSON with which to make it again."""
        return self.options.model_dump(mode="json")

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """RGB fp32 in [-1, 1] to features fp32 ``[B, L, D]`` on the CPU.

        Bicubic resize of the shorter side to the tower's size, centre crop, CLIP's normalisation.
        """
        size = int(self.model.config.image_size)
        height, width = image_BCHW.shape[2:]
        scale = size / min(height, width)
        target = (max(size, int(height * scale)), max(size, int(width * scale)))
        unit = image_BCHW.float().add(1).div(2)
        unit = F.interpolate(unit, size=target, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        crop = unit[:, :, top : top + size, left : left + size]
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
        pixels = ((crop - mean) / std).to(process.device())
        states = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return states[-2].float().cpu()
