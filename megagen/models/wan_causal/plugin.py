"""``WanCausalModel``: Wan's checkpoints and conventions with block-causal self-attention.

Legend: B batch, C channels, T H W latent sizes, S tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megagen.core.errors import ConfigError, DataError
from megagen.layers.sparse import scored_pairs
from megagen.models.base import Request
from megagen.models.cache import CachedBlock, KVCache
from megagen.models.wan.options import find_directory
from megagen.models.wan.plugin import WanModel
from megagen.models.wan_causal.options import CONFIG_KEY, WanCausalOptions
from megagen.parallel.dims import ParallelDims

CLEAN = "clean_latents_BCTHW"
"""The condition that makes a request teacher-forced."""


class WanCausalModel(WanModel):
    """One causal Wan transformer.

    Args:
        options: see ``WanCausalOptions``.
        where: key path of the options in the config, for errors.
    """

    family: ClassVar[str] = "wan_causal"
    Options = WanCausalOptions
    is_causal: ClassVar[bool] = True
    options: WanCausalOptions

    def __init__(self, options: WanCausalOptions, *, where: str = "models.student") -> None:
        super().__init__(options, where=where)
        directory = find_directory(options, ["config.json"], where)
        self.causal = options.causal(directory, where)
        self.window = self.causal.window(where)
        if self.arch.patch_size[0] != 1:
            raise ConfigError(
                f"is {list(self.arch.patch_size)}: a token spans {self.arch.patch_size[0]} latent "
                "frames, which blocks of frames cannot be made of.",
                remedy="Choose an architecture whose patches are one frame long.",
                where=f"{where}.architecture.patch_size",
            )

    # -- shape ---------------------------------------------------------------------------------
    def check(self, dims: ParallelDims, where: str) -> None:
        """As Wan; context parallelism by ``a2a`` or ``all_gather``."""
        super().check(dims, where)
        if dims.cp_size > 1 and dims.cp_comm_type not in ("a2a", "all_gather"):
            raise ConfigError(
                f"is {dims.cp_comm_type!r}; a ring would pass keys that most queries must not see.",
                remedy="Set it to a2a, or to all_gather where the heads do not divide.",
                where=f"{where}.cp_comm_type",
            )

    def build_chunk(self, config: Any, pg: Any, **given: Any) -> nn.Module:
        """One pipeline chunk; its weights are not initialised."""
        from megagen.models.wan_causal.transformer import CausalWanTransformer

        return CausalWanTransformer(
            config, self.arch, pg, window=self.window, vsa=self.vsa, **given
        )

    def blocks(self, num_frames: int, start: int = 0) -> list[range]:
        """Frames ``start`` to ``start + num_frames`` cut into blocks, the last maybe shorter."""
        return self.window.blocks(num_frames, start)

    def scored_pairs(self, latent_shape: Sequence[int], sparsity: float | None) -> float:
        """Of a whole video, all blocks at once, what each block sees."""
        frames, rows, columns = self.token_grid(latent_shape)
        return sum(
            scored_pairs(self.vsa, sparsity, [len(v.queries)], v.key_runs, (rows, columns))
            for v in self.window.views(frames)
        )

    # -- weights -------------------------------------------------------------------------------
    def portable_options(self) -> dict[str, Any]:
        """Options that build this plugin again with no file at hand."""
        return {**super().portable_options(), **self.causal.model_dump()}

    def diffusers_config(self) -> dict[str, Any]:
        """``config.json`` of a ``WanTransformer3DModel``, with what makes it causal."""
        return {**super().diffusers_config(), CONFIG_KEY: self.causal.model_dump()}

    # -- conventions ---------------------------------------------------------------------------
    def inputs(self, request: Request) -> Request:
        """As Wan's, of the request's own frames; clean frames come before noisy ones.

        Conditions read beside Wan's:
            clean_latents_BCTHW: the video without noise (teacher forcing); noisy blocks see its
                earlier blocks instead of noisy ones.
            clean_timestep: timestep of these, ``[B]`` or ``[B, T]``; left out: 0.
        Where the request has a cache, ``condition_latents_BCTHW`` of the whole video is cut to the
        request's frames, and a given first frame is one only for frame 0.
        """
        noisy = super().inputs(self._own_frames(request))
        clean_BCTHW = request.condition.get(CLEAN)
        if clean_BCTHW is None:
            return noisy
        if clean_BCTHW.shape != request.latents_BCTHW.shape:
            raise DataError(
                f"{CLEAN} is {tuple(clean_BCTHW.shape)}, the latents are "
                f"{tuple(request.latents_BCTHW.shape)}.",
                remedy="Give the same clip without noise.",
            )
        timestep = request.condition.get("clean_timestep")
        if timestep is None:
            timestep = request.timestep.new_zeros(clean_BCTHW.size(0))
        clean = super().inputs(request.with_(latents_BCTHW=clean_BCTHW, timestep=timestep))
        latents = [clean.latents_BCTHW.to(noisy.latents_BCTHW), noisy.latents_BCTHW]
        timesteps = _columns([clean.timestep, noisy.timestep], clean_BCTHW.size(2))
        return noisy.with_(
            latents_BCTHW=torch.cat(latents, dim=2), timestep=torch.cat(timesteps, dim=1)
        )

    def velocity(self, prediction_BCTHW: Tensor, request: Request) -> Tensor:
        """The velocity of the request's own frames; the clean half's is dropped."""
        frames = request.latents_BCTHW.size(2)
        return super().velocity(prediction_BCTHW[:, :, -frames:], request)

    def _own_frames(self, request: Request) -> Request:
        start = 0 if request.cache is None else request.cache.next_frame
        condition = dict(request.condition)
        if start:
            condition.pop("first_frame_latents_BCTHW", None)
        given = condition.get("condition_latents_BCTHW")
        frames = request.latents_BCTHW.size(2)
        if given is None or (given.size(2) == frames and not start):
            return request.with_(condition=condition)
        if given.size(2) < start + frames:
            raise DataError(
                f"condition_latents_BCTHW has {given.size(2)} frames; the request is of frames "
                f"{start} to {start + frames - 1}.",
                remedy="Give the condition of the whole video.",
            )
        # Wan adds the mask, which says that the first frame of the whole video is given
        batch, channels, _, height, width = request.latents_BCTHW.shape
        blank = request.latents_BCTHW.new_zeros(batch, channels, given.size(2), height, width)
        whole = super().inputs(request.with_(latents_BCTHW=blank)).latents_BCTHW[:, channels:]
        condition["condition_latents_BCTHW"] = whole[:, :, start : start + frames]
        return request.with_(condition=condition)

    # -- cache ---------------------------------------------------------------------------------
    def extended_cache(self, request: Request) -> KVCache:
        """The request's cache with what the network recorded of its frames, cut to the window."""
        cache: KVCache = request.cache
        assert cache.record is not None
        frames = request.latents_BCTHW.size(2)
        end = cache.next_frame + frames
        tokens = self.num_tokens(request.latents_BCTHW.shape) // frames
        new = []
        for block in self.blocks(frames, cache.next_frame):
            first = (block.start - cache.next_frame) * tokens
            part = slice(first, first + len(block) * tokens)
            layers = {
                layer: (_own_copy(keys, part), _own_copy(values, part))
                for layer, (keys, values) in cache.record.items()
            }
            new.append(CachedBlock(block, layers))
        kept = [b for b in (*cache.blocks, *new) if self.window.is_needed(b.frames, end)]
        return KVCache(tuple(kept), end)


def _columns(timesteps: Sequence[Tensor], frames: int) -> list[Tensor]:
    """One timestep a frame, or one a token where any of them has so many."""
    each = [t[:, None].expand(-1, frames) if t.ndim == 1 else t for t in timesteps]
    most = max(t.size(1) for t in each)
    return [t.repeat_interleave(most // t.size(1), dim=1) for t in each]


def _own_copy(x_SBNK: Tensor, part: slice) -> Tensor:
    """A part that keeps nothing else alive."""
    found = x_SBNK[part]
    return found if found.size(0) == x_SBNK.size(0) else found.clone()
