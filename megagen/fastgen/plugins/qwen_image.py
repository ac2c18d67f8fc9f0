"""Qwen-Image: its packed latents, DMD on it, and features of its image stream.

Wu et al., "Qwen-Image Technical Report", arXiv 2508.02324. The losses work on latents
``[B, C, H, W]``; the transformer sees tokens of 2 x 2 pixels.

Legend: B batch, C latent channels, H W latent size, N = H/2 W/2 tokens, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megagen.fastgen.config import DMDConfig
from megagen.fastgen.features import attach, pop_captured_features
from megagen.fastgen.features import detach as remove_feature_capture
from megagen.fastgen.methods.dmd import DMDPipeline
from megagen.fastgen.network import first_tensor

__all__ = [
    "QwenImageDMDPipeline",
    "attach_feature_capture",
    "build_img_shapes",
    "pack_latents",
    "pop_captured_features",
    "remove_feature_capture",
    "unpack_latents",
]

_OPTIONAL = ("encoder_hidden_states_mask", "txt_seq_lens", "guidance")


def _grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of 2 x 2 patches."""
    if height % 2 or width % 2:
        raise ValueError(f"latent height and width must be even, found {height} x {width}")
    return height // 2, width // 2


def pack_latents(latents: Tensor) -> Tensor:
    """``[B, C, H, W]`` as tokens ``[B, H/2 W/2, 4 C]``: row by row, in a token channel by channel.

    Raises:
        ValueError: not 4 axes, or odd H or W.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents are [B, C, H, W], found shape {tuple(latents.shape)}")
    rows, columns = _grid(*latents.shape[2:])
    patches = latents.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # B C rows 2 columns 2
    return patches.movedim((2, 4), (1, 2)).flatten(3).flatten(1, 2)


def unpack_latents(packed: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack_latents``, ``[B, C, height, width]``.

    Raises:
        ValueError: not 3 axes, channels that 4 does not divide, odd sizes, or a number of tokens
            that is not ``height/2 * width/2``.
    """
    if packed.ndim != 3:
        raise ValueError(f"packed latents are [B, N, 4 C], found shape {tuple(packed.shape)}")
    if packed.shape[2] % 4:
        raise ValueError(f"packed latents have 4 C channels, found {packed.shape[2]}")
    rows, columns = _grid(height, width)
    if packed.shape[1] != rows * columns:
        raise ValueError(
            f"{packed.shape[1]} tokens do not make latents of {height} x {width}, which have "
            f"{rows * columns}"
        )
    patches = packed.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
    return patches.movedim((1, 2), (2, 4)).flatten(4).flatten(2, 3)


def build_img_shapes(batch_size: int, h_lat: int, w_lat: int) -> list[list[tuple[int, int, int]]]:
    """The transformer's ``img_shapes``: per sample one image of ``(1, h_lat/2, w_lat/2)`` tokens.

    Raises:
        ValueError: odd ``h_lat`` or ``w_lat``.
    """
    rows, columns = _grid(h_lat, w_lat)
    return [[(1, rows, columns)] for _ in range(batch_size)]


class QwenImageDMDPipeline(DMDPipeline):
    """DMD of Qwen-Image: the networks are diffusers' ``QwenImageTransformer2DModel``.

    Latents are ``[B, C, H, W]`` with even H and W; a network is called with their tokens and the
    time in [0, 1]. Of the arguments that came and went with diffusers' versions it gets those that
    its ``forward`` names.

    Args:
        student, teacher, fake_score, config, discriminator, model_parallel_group: as in
            ``DMDPipeline``.
        guidance: the transformer's own ``guidance`` input, for checkpoints with an embedding of it;
            it has nothing to do with ``DMDConfig.guidance_scale``.

    Raises:
        ValueError: ``config.num_train_timesteps`` is set; as ``DMDPipeline``.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        fake_score: nn.Module,
        config: DMDConfig,
        *,
        discriminator: nn.Module | None = None,
        guidance: float | None = None,
        model_parallel_group: dist.ProcessGroup | None = None,
    ) -> None:
        if config.num_train_timesteps is not None:
            raise ValueError(
                "Qwen-Image takes the time in [0, 1]: num_train_timesteps must be None, found "
                f"{config.num_train_timesteps}"
            )
        super().__init__(
            student,
            teacher,
            fake_score,
            config,
            discriminator=discriminator,
            model_parallel_group=model_parallel_group,
        )
        self._guidance_value = guidance

    def _call_model(
        self,
        model: nn.Module,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The network's prediction ``[B, C, H, W]`` at latents ``hidden_states``."""
        packed = pack_latents(hidden_states)
        batch, _, height, width = hidden_states.shape
        arguments: dict[str, Any] = {
            **{name: value for name, value in model_kwargs.items() if name not in _OPTIONAL},
            "hidden_states": packed,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            "img_shapes": build_img_shapes(batch, height, width),
            "return_dict": False,
            **self._optional_inputs(model, hidden_states, encoder_hidden_states, model_kwargs),
        }
        return unpack_latents(first_tensor(model(**arguments)), height, width)

    def _optional_inputs(
        self,
        model: nn.Module,
        latents: Tensor,
        text: Tensor | None,
        given: dict[str, Any],
    ) -> dict[str, Any]:
        """Mask, text lengths and guidance, as far as the network takes them."""
        names, takes_any = _arguments(model)
        mask, lengths = given.get("encoder_hidden_states_mask"), given.get("txt_seq_lens")
        if lengths is None and mask is not None:
            lengths = mask.sum(dim=1).int().tolist()
        if lengths is None and text is not None and "txt_seq_lens" in names:
            lengths = [text.shape[1]] * text.shape[0]  # a forward that names them cannot do without
        guidance = None
        if self._guidance_value is not None:
            guidance = latents.new_full(latents.shape[:1], float(self._guidance_value))
        found = dict(zip(_OPTIONAL, (mask, lengths, guidance), strict=True))
        if not takes_any and "txt_seq_lens" not in names:
            del found["txt_seq_lens"]  # newer ones read them off the mask
        return {name: value for name, value in found.items() if value is not None or name in names}


def _arguments(model: nn.Module) -> tuple[set[str], bool]:
    """Names of the arguments of a network's forward, and whether it takes any others besides.

    A wrapper that hands everything on (data parallel, compiled, LoRA) is asked for what it wraps.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if takes_any and not named:
        for attribute in ("module", "_orig_mod", "base_model", "model"):
            inner = getattr(model, attribute, None)
            if isinstance(inner, nn.Module):
                return _arguments(inner)
    return named, takes_any


class _Image:
    """The image stream of a block's output, ``[B, N, D]``, as ``[B, D, H/2, W/2]``."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns

    def __call__(self, output: Any) -> Tensor:
        tokens = output[1] if isinstance(output, tuple) and len(output) == 2 else output
        if not isinstance(tokens, Tensor):
            raise TypeError(
                "a Qwen-Image block returns (text, image) or a tensor, found "
                f"{type(output).__name__}"
            )
        if tokens.shape[1] != self.rows * self.columns:
            raise RuntimeError(
                f"a block returned {tokens.shape[1]} image tokens where {self.rows} x "
                f"{self.columns} were announced: attach anew with the latent size that is used"
            )
        return tokens.transpose(1, 2).unflatten(2, (self.rows, self.columns))


def attach_feature_capture(
    teacher: nn.Module,
    feature_indices: Iterable[int],
    h_lat: int,
    w_lat: int,
    *,
    blocks_attr: str = "transformer_blocks",
) -> None:
    """Capture the image stream of the teacher's blocks at every forward, ``[B, D, H/2, W/2]``.

    Earlier hooks are removed. Features lie in ``teacher._fastgen_captured``, where ``DMDPipeline``
    takes them, in rising order of the blocks.

    Args:
        teacher: diffusers' ``QwenImageTransformer2DModel``: its blocks return (text, image).
        feature_indices: of blocks.
        h_lat: height of the latents, even.
        w_lat: their width, even.
        blocks_attr: name of the teacher's blocks.

    Raises:
        ValueError: odd ``h_lat`` or ``w_lat``.
        AttributeError: the teacher has no ``blocks_attr``.
        TypeError: the blocks have no length; in a forward, a block returned something else.
        IndexError: an index outside the blocks.
        RuntimeError: in a forward, latents of another size.
    """
    attach(teacher, blocks_attr, feature_indices, _Image(*_grid(h_lat, w_lat)))
