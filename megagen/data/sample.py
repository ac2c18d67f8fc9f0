"""From the values of a row to the checked tensors of a sample.

Legend: C channels, T H W latent frames, height and width, L text tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagen.core.errors import DataError
from megagen.data.batch import LatentShape
from megagen.data.schema import CLIP, FIRST_FRAME, LATENT, TEXT, tensor_columns, unpack_tensor

# Name of a stored tensor -> its name in ``Batch.condition``.
CONDITIONS = {FIRST_FRAME: "condition_latents_BCTHW", CLIP: "image_embeds_BLD"}


@dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        latents_CTHW: raw latents, fp32; None where the dataset is read for its texts alone.
        text_LD: padded text embedding, fp32.
        extra: other conditions by their name in a batch, without the batch axis.
    """

    id: str
    caption: str
    latents_CTHW: Tensor | None
    text_LD: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def with_text(self, text_LD: Tensor, caption: str) -> Sample:
        """The same sample under another text."""
        return replace(self, text_LD=text_LD, caption=caption)


def columns_of(tensors: Sequence[str]) -> list[str]:
    """The columns that ``make_sample`` needs."""
    return ["id", "caption", *(column for name in tensors for column in tensor_columns(name))]


def make_sample(
    values: Mapping[str, Any],
    tensors: Sequence[str],
    shape: LatentShape,
    text_len: int,
    path: Path,
    row: int,
) -> Sample:
    """Unpack, cut to ``shape``'s frames, pad the text, check.

    Raises:
        DataError: sizes do not fit, or a number is NaN or infinite; names the file and the row.
    """
    try:
        found = {name: _tensor(values, name) for name in tensors}
        text, latents = found.pop(TEXT), found.pop(LATENT, None)
        if text is None or (LATENT in tensors and latents is None):
            raise ValueError("latents or text embedding are empty")
        extra = {CONDITIONS[n]: _extra(n, t, shape) for n, t in found.items() if t is not None}
        return Sample(
            id=str(values.get("id") or f"{path.name}:{row}"),
            caption=values.get("caption") or "",
            latents_CTHW=None if latents is None else _latents(latents, shape),
            text_LD=pad_text(text, text_len),
            extra=extra,
        )
    except ValueError as error:
        raise DataError(
            f"row {row}: {error}.", remedy="Preprocess it again.", where=str(path)
        ) from None


def pad_text(text_LD: Tensor, text_len: int) -> Tensor:
    """``[L, D]`` padded with zeros, or cut, to ``text_len`` tokens; a leading axis of 1 goes."""
    text = text_LD[0] if text_LD.ndim == 3 and text_LD.shape[0] == 1 else text_LD
    if text.ndim != 2:
        raise ValueError(f"the text embedding has shape {list(text.shape)}, not [L, D]")
    padded = text.new_zeros(text_len, text.shape[1])
    padded[: text.shape[0]] = text[:text_len]
    return padded


def _tensor(values: Mapping[str, Any], name: str) -> Tensor | None:
    """A stored tensor, None where its bytes are empty (FastVideo's mark of an absent one)."""
    data, shape, dtype = (values.get(column) for column in tensor_columns(name))
    if data is None or len(data) == 0:
        return None
    try:
        tensor = unpack_tensor(memoryview(data), shape or [], dtype or "float32")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return tensor


def _latents(tensor: Tensor, shape: LatentShape) -> Tensor:
    latents = tensor[0] if tensor.ndim == 5 else tensor
    latents = latents[:, : shape[1]]
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {list(tensor.shape)}, expected {list(shape)}")
    return latents


def _extra(name: str, tensor: Tensor, shape: LatentShape) -> Tensor:
    if name != FIRST_FRAME:
        return tensor[0] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor
    latents = tensor[0] if tensor.ndim == 5 and tensor.shape[0] == 1 else tensor
    if latents.ndim != 4 or tuple(latents.shape[2:]) != shape[2:]:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, its latents {list(shape)}")
    return latents[:, : shape[1]]
