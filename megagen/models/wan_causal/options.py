"""Options of ``WanCausalModel``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megagen.core.errors import ConfigError
from megagen.core.options import StrictOptions, parse_options
from megagen.models.hub import read_json
from megagen.models.wan.options import WanOptions
from megagen.models.wan_causal.window import Window

CONFIG_KEY = "_causal"
"""Where a transformer's ``config.json`` keeps ``CausalOptions``; diffusers ignores such keys."""


class CausalOptions(StrictOptions):
    """Which frames see which; the same in training and in sampling.

    Args:
        num_frames_per_block: latent frames made together; they see each other.
        independent_first_frame: the first latent frame is a block of its own.
        local_attn_size: most latent frames that a block sees, itself included; -1: no limit.
        sink_size: of these, how many are the video's first frames; the rest are the latest.
        rope_cache_policy: ``absolute``: frames are rotated by their place in the video;
            ``relativistic``: the sink's frames as if they came right before the window's, so that
            distances stay within ``local_attn_size`` however long the video.
    """

    num_frames_per_block: int = Field(3, ge=1)
    independent_first_frame: bool = False
    local_attn_size: int = Field(-1, ge=-1)
    sink_size: int = Field(0, ge=0)
    rope_cache_policy: Literal["absolute", "relativistic"] = "absolute"

    def window(self, where: str) -> Window:
        """The window these describe.

        Raises:
            ConfigError: it has no room for a block beside the sink.
        """
        least = self.num_frames_per_block + self.sink_size
        if self.local_attn_size != -1 and self.local_attn_size < least:
            raise ConfigError(
                f"is {self.local_attn_size}; it must hold a block of {self.num_frames_per_block} "
                f"frames and a sink of {self.sink_size}.",
                remedy=f"Give {least} or more, or -1 for no limit.",
                where=f"{where}.local_attn_size",
            )
        return Window(
            self.num_frames_per_block,
            self.independent_first_frame,
            self.local_attn_size,
            self.sink_size,
            self.rope_cache_policy == "relativistic",
        )


class WanCausalOptions(WanOptions):
    """``models.<role>`` keys of causal Wan: Wan's and those of ``CausalOptions``.

    Those left out are what ``init_from`` was trained with, where its ``config.json`` says so, else
    the defaults of ``CausalOptions``.

    Args:
        num_frames_per_block: latent frames made together, which see each other; default 3.
        independent_first_frame: the first latent frame is a block of its own; default false.
        local_attn_size: most latent frames that a block sees, itself included; -1 (default): no
            limit.
        sink_size: of these, how many are the video's first frames; default 0.
        rope_cache_policy: how the sink's frames are rotated: by their place in the video (absolute,
            the default), or as if they came right before the window's (relativistic).
    """

    num_frames_per_block: int | None = Field(None, ge=1)
    independent_first_frame: bool | None = None
    local_attn_size: int | None = Field(None, ge=-1)
    sink_size: int | None = Field(None, ge=0)
    rope_cache_policy: Literal["absolute", "relativistic"] | None = None

    def causal(self, directory: Path | None, where: str) -> CausalOptions:
        """Given keys over those of ``directory``'s ``config.json`` over the defaults."""
        file = directory / "config.json" if directory is not None else None
        known: dict[str, Any] = {}
        if file is not None and file.is_file():
            known = dict(read_json(file).get(CONFIG_KEY, {}))
        given = {name: getattr(self, name) for name in CausalOptions.model_fields}
        known |= {name: value for name, value in given.items() if value is not None}
        return parse_options(CausalOptions, known, where)
