"""Features of a Wan teacher (Wan 2.1, Wan 2.2, and whatever returns tokens block by block).

Legend: B batch, N = T H W tokens of the patch grid, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from megagen.fastgen.features import attach, pop_captured_features
from megagen.fastgen.features import detach as remove_feature_capture
from megagen.fastgen.network import first_tensor

__all__ = ["attach_feature_capture", "pop_captured_features", "remove_feature_capture"]


class _OnGrid:
    """Tokens ``[B, N, D]`` as ``[B, D, T, H, W]``, frame by frame and row by row."""

    def __init__(self, grid: tuple[int, int, int] | None) -> None:
        self.grid = grid

    def follow(self, patch_embedding: nn.Module, inputs: Any, output: Any) -> None:
        """Hook of the patch embedding: its output ``[B, D, T, H, W]`` says the grid."""
        time, height, width = first_tensor(output).shape[2:]
        self.grid = (time, height, width)

    def __call__(self, output: Any) -> Tensor:
        tokens_BND = first_tensor(output)
        time, height, width = self.grid or (0, 0, 0)
        if tokens_BND.shape[1] != time * height * width:
            raise RuntimeError(
                f"a block returned {tokens_BND.shape[1]} tokens, which are not the grid's "
                f"{time} x {height} x {width}: attach anew with the size that is used, or with "
                'grid="auto"'
            )
        return tokens_BND.transpose(1, 2).unflatten(2, (time, height, width))


def attach_feature_capture(
    teacher: nn.Module,
    feature_indices: Iterable[int],
    *,
    blocks_attr: str = "blocks",
    grid: tuple[int, int, int] | Literal["auto"] | None = None,
    patch_attr: str = "patch_embedding",
) -> None:
    """Capture the output of the teacher's blocks at every forward, in ``_fastgen_captured``.

    Earlier hooks are removed. ``DMDPipeline`` takes the features by itself; elsewhere use
    ``pop_captured_features`` or ``features.captured``.

    Args:
        teacher: diffusers' ``WanTransformer3DModel`` or a module with blocks like its own.
        feature_indices: of blocks, in any order; the features come in rising order of the blocks.
        blocks_attr: name of the teacher's blocks.
        grid: None: features are tokens ``[B, N, D]``. ``(T, H, W)``, the latent size over the patch
            size (1, 2, 2): features are ``[B, D, T, H, W]``, as video discriminators take them.
            ``"auto"``: likewise, of whatever size the patch embedding last put out.
        patch_attr: name of the teacher's patch embedding, for ``"auto"``.

    Raises:
        AttributeError: the teacher has no ``blocks_attr``, or for ``"auto"`` no ``patch_attr``.
        TypeError: the blocks have no length.
        IndexError: an index outside the blocks.
        ValueError: another string than ``"auto"``, or not three positive sizes.
        RuntimeError: in a forward, tokens that do not fill ``grid``.
    """
    if grid is None:
        attach(teacher, blocks_attr, feature_indices)
        return
    if grid != "auto":
        if isinstance(grid, str) or len(grid) != 3 or min(grid) < 1:
            raise ValueError(f'grid is (T, H, W), "auto" or None; found {grid!r}')
        attach(teacher, blocks_attr, feature_indices, _OnGrid(grid))
        return
    patch_embedding = getattr(teacher, patch_attr, None)
    if patch_embedding is None:
        raise AttributeError(
            f'{type(teacher).__name__} has no attribute {patch_attr!r}, which grid="auto" asks '
            "for the grid: name its patch embedding with patch_attr=..."
        )
    on_grid = _OnGrid(None)
    handles = attach(teacher, blocks_attr, feature_indices, on_grid)
    handles.append(patch_embedding.register_forward_hook(on_grid.follow))
