"""``models.<role>.lora``: low-rank adapters on a frozen base, and a base that roles share."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from megagen.core.options import StrictOptions


class LoraOptions(StrictOptions):
    """``models.<role>.lora``: adapters (LoRA, arXiv 2106.09685) are trained, the base is frozen.

    A target is a part of a diffusers module name: ``to_q``, ``attn1.to_k``, ``ffn``, ``blocks.3.``.

    Attributes:
        enable: false: as if the section were not there.
        rank: of the two matrices. None: no adapter, for a frozen role that only shares its base.
        alpha: the adapter's output is scaled by alpha / rank; None: rank.
        target_modules: which linears; None: the projections of attention (``to_q``, ``to_k``,
            ``to_v``, ``to_out``).
        exclude_modules: which of them not; FastVideo's ``exclude_lora_layers`` is understood.
        init_from: adapters to begin with: a diffusers/PEFT directory or file; None: fresh ones,
            which change nothing at first.
        share_base: roles that say so hold one copy of the base weights; their architecture,
            ``init_from``, tensor and pipeline layout and precision are the same.
    """

    enable: bool = True
    rank: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, gt=0)
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ("embedder",)
    init_from: str | None = None
    share_base: bool = False

    @model_validator(mode="before")
    @classmethod
    def _peer_name(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "exclude_lora_layers" not in values:
            return values
        if "exclude_modules" in values:
            raise ValueError("exclude_modules and exclude_lora_layers are one key: give one")
        rest = {k: v for k, v in values.items() if k != "exclude_lora_layers"}
        return {**rest, "exclude_modules": values["exclude_lora_layers"]}

    @model_validator(mode="after")
    def _complete(self) -> LoraOptions:
        if self.enable and self.rank is None and not self.share_base:
            raise ValueError("rank is required: give a number from 1 up")
        if self.rank is None and self.init_from is not None:
            raise ValueError("init_from needs the rank of its adapters")
        if self.target_modules is not None and not all(self.target_modules or [""]):
            raise ValueError("target_modules must name something")
        return self
