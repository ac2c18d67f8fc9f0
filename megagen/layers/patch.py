"""Latents to tokens and back.

Legend: B batch, C channels, T H W latent sizes, S tokens, p patch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megagen.core.errors import DataError

Patch = tuple[int, int, int]


def token_grid(latent_shape: Sequence[int], patch: Patch) -> tuple[int, int, int]:
    """Tokens along (frame, row, column) of latents ``[..., T, H, W]``.

    Raises:
        DataError: a size does not divide by the patch.
    """
    sizes = tuple(latent_shape[-3:])
    if any(size % p for size, p in zip(sizes, patch, strict=True)):
        raise DataError(
            f"latents of (frames, height, width) {sizes} do not divide into patches of {patch}.",
            remedy="Choose a resolution and frame count whose latents do.",
        )
    frames, rows, columns = (size // p for size, p in zip(sizes, patch, strict=True))
    return frames, rows, columns


def patchify(latents_BCTHW: Tensor, patch: Patch) -> Tensor:
    """Tokens ``[S, B, C pt ph pw]``, features in the order of a Conv3d's weight."""
    frames, rows, columns = token_grid(latents_BCTHW.shape, patch)
    batch, channels = latents_BCTHW.shape[:2]
    split = latents_BCTHW.reshape(
        batch, channels, frames, patch[0], rows, patch[1], columns, patch[2]
    )
    return split.permute(2, 4, 6, 0, 1, 3, 5, 7).reshape(frames * rows * columns, batch, -1)


def unpatchify(tokens_SBP: Tensor, grid: tuple[int, int, int], patch: Patch) -> Tensor:
    """Latents ``[B, C, T, H, W]`` of tokens whose features are ordered (pt, ph, pw, C)."""
    frames, rows, columns = grid
    split = tokens_SBP.reshape(*grid, tokens_SBP.size(1), *patch, -1)
    return split.permute(3, 7, 0, 4, 1, 5, 2, 6).reshape(
        tokens_SBP.size(1), -1, frames * patch[0], rows * patch[1], columns * patch[2]
    )
