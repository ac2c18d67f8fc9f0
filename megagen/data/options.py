"""``training.data``: which dataset, in what batches, with which captions left out.

Names follow FastVideo's; its own spellings are understood as well (``train_batch_size``,
``training_cfg_rate``, ``dataloader_num_workers``). No torch here: a config is checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import AliasChoices, ConfigDict, Field, field_validator, model_validator

from megagen.core.options import StrictOptions

DropTo = Literal["zeros", "empty", "negative"]


class DataOptions(StrictOptions):
    """Options of ``megagen.data.loader.Loader``.

    Attributes:
        data_path: dataset directory; several as a list, as ``"a:2,b"`` or as ``{a: 2, b: 1}``, the
            number saying how often a sample comes up in an epoch. None: the run has no dataset.
        preprocessed_data_type: t2v reads latents and text; i2v needs the first frame's columns too;
            text_only reads the text alone, whatever else is there; None reads what the dataset has.
        latent_shape: of text_only: ``[C, T, H, W]`` of the latents that the run works on, such as
            [16, 21, 60, 104] for 81 frames of 480x832 with Wan 2.1's VAE.
        micro_batch_size: samples of one forward pass on one data-parallel rank.
        global_batch_size: samples of one optimizer step over all ranks; None: micro_batch_size x
            data-parallel ranks.
        num_workers: threads that read ahead; 0 reads when asked.
        prefetch_steps: how many steps they read ahead.
        caption_dropout: probability in [0, 1] that a sample's caption is left out, drawn anew in
            every epoch.
        caption_dropout_to: what takes its place: the embedding of the empty or of the negative
            prompt as stored with the dataset, or zeros (FastVideo's rule).
        unconditional_path: safetensors file with ``empty`` and ``negative`` embeddings [L, D];
            None: the one in the dataset directory.
        text_len: tokens that embeddings are padded or cut to; None: the dataset's (512 where it
            does not say).
        num_latent_t: use the first so many latent frames; None: all.
        num_frames: use only samples of so many pixel frames; None: all.
        num_height: use only samples of this pixel height; None: all.
        num_width: use only samples of this pixel width; None: all.
        seed: seed of order and dropout; None: the run's seed.
        on_bad_sample: a row that cannot be read or holds NaN: stop with an error, or put the next
            row of its bucket in its place (the same on every rank and after a resume) and say so.
        cache_mb: memory for decoded rows, in MiB; 0: none.
    """

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), validate_default=True, populate_by_name=True
    )

    data_path: str | list[str] | dict[str, int] | None = None
    preprocessed_data_type: Literal["t2v", "i2v", "text_only"] | None = None
    latent_shape: tuple[int, int, int, int] | None = None
    micro_batch_size: int = Field(
        1, ge=1, validation_alias=AliasChoices("micro_batch_size", "train_batch_size")
    )
    global_batch_size: int | None = Field(None, ge=1)
    num_workers: int = Field(
        0, ge=0, validation_alias=AliasChoices("num_workers", "dataloader_num_workers")
    )
    prefetch_steps: int = Field(2, ge=1)
    caption_dropout: float = Field(
        0.0, ge=0, le=1, validation_alias=AliasChoices("caption_dropout", "training_cfg_rate")
    )
    caption_dropout_to: DropTo = "empty"
    unconditional_path: str | None = None
    text_len: int | None = Field(None, ge=1)
    num_latent_t: int | None = Field(None, ge=1)
    num_frames: int | None = Field(None, ge=1)
    num_height: int | None = Field(None, ge=1)
    num_width: int | None = Field(None, ge=1)
    seed: int | None = None
    on_bad_sample: Literal["error", "replace"] = "error"
    cache_mb: int = Field(256, ge=0)

    @field_validator("data_path")
    @classmethod
    def _known_form(cls, value: Any) -> Any:
        repeats = _repeats(value)
        if value is not None and not repeats:
            raise ValueError("names no dataset directory")
        wrong = [path for path, count in repeats.items() if count < 1 or not path]
        if wrong:
            raise ValueError(f"each path needs a repeat count >= 1, not so for {wrong}")
        return value

    @model_validator(mode="after")
    def _shape_of_texts(self) -> DataOptions:
        if self.is_text_only and self.latent_shape is None:
            raise ValueError("preprocessed_data_type text_only needs latent_shape: [C, T, H, W]")
        if self.latent_shape is not None and not self.is_text_only:
            raise ValueError("latent_shape is for preprocessed_data_type: text_only")
        return self

    @property
    def is_text_only(self) -> bool:
        """Whether latents are neither needed nor read."""
        return self.preprocessed_data_type == "text_only"

    def sources(self) -> dict[str, int]:
        """Dataset directory -> how often each of its samples comes up in an epoch."""
        return _repeats(self.data_path)


def _repeats(value: str | list[str] | Mapping[str, int] | None) -> dict[str, int]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    items = value.split(",") if isinstance(value, str) else value
    repeats: dict[str, int] = {}
    for item in items:
        path, colon, count = item.strip().rpartition(":")
        path, times = (path, int(count)) if colon and count.isdigit() else (item.strip(), 1)
        repeats[path] = repeats.get(path, 0) + times
    return repeats
