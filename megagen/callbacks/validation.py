"""Videos sampled while a run goes on: mp4 files and a contact sheet in ``validation/step_*/``.

All ranks sample together under the run's own layouts; rank 0's disk gets the files. The noise is a
function of (seed, prompt number), so the same prompt is comparable from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist
from pydantic import Field, model_validator

from megagen.callbacks.base import Callback
from megagen.core import process
from megagen.core.errors import ConfigError
from megagen.core.log import get_logger
from megagen.core.options import StrictOptions, parse_options
from megagen.data.codecs import build_codec
from megagen.data.manifest import read_manifest
from megagen.data.text import build_text_encoder
from megagen.data.video import contact_sheet, write_video
from megagen.sampling.flow import SamplerName
from megagen.sampling.pipeline import SamplingOptions, VideoPipeline
from megagen.sampling.streaming import StreamOptions, TimestepList

if TYPE_CHECKING:
    from torch import Tensor

    from megagen.trainer import Trainer

log = get_logger(__name__)


class ValidationOptions(StrictOptions):
    """``callbacks.validation``.

    Attributes:
        prompts: one video each.
        prompts_file: text file with a prompt a line, beside or in place of ``prompts``.
        every_steps: sample after every so many steps; 0: only at the start and the end.
        run_at_start: sample before the first step.
        run_at_end: sample after the last step.
        sampling_steps: solver steps; several make several sets.
        guidance_scale: 1 makes no unconditional pass.
        sampler: ``unipc``, ``euler`` or ``sde`` (of few-step students).
        t_list: a few-step student's timesteps and a final 0, in place of ``sampling_steps``.
        num_frames: None: the dataset's (likewise ``height`` and ``width``).
        use_ema: sample with the average where the student has one.
        seed: of the noise.
        batch_size: prompts sampled together by one data rank.
        fps: of the files; None: the dataset's.
        stream: block by block with a causal student; None: all frames at once.
    """

    prompts: list[str] = Field(default_factory=list)
    prompts_file: str | None = None
    every_steps: int = Field(100, ge=0)
    run_at_start: bool = False
    run_at_end: bool = True
    sampling_steps: list[int] = Field(default_factory=lambda: [40], min_length=1)
    guidance_scale: float = Field(5.0, ge=0)
    sampler: SamplerName = "unipc"
    t_list: TimestepList | None = None
    num_frames: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    use_ema: bool = True
    seed: int = 0
    batch_size: int = Field(4, ge=1)
    fps: float | None = Field(None, gt=0)
    stream: StreamOptions | None = None

    @model_validator(mode="after")
    def _has_prompts(self) -> ValidationOptions:
        if not self.prompts and self.prompts_file is None:
            raise ValueError("names no prompt: give prompts or prompts_file")
        return self

    @property
    def step_counts(self) -> list[int]:
        """Numbers of steps to sample with."""
        return self.sampling_steps if self.t_list is None else [len(self.t_list) - 1]


class ValidationCallback(Callback):
    """Samples ``prompts`` with the student."""

    Options: ClassVar[type[StrictOptions]] = ValidationOptions

    def __init__(self, options: ValidationOptions) -> None:
        super().__init__(options)
        self.settings = options
        self.prompts = [*options.prompts, *_read_lines(options.prompts_file)]
        self._pipeline: VideoPipeline | None = None
        self._fps = options.fps or 16.0
        self._size: tuple[int, int, int] | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Build codec and text encoder; sample where asked to."""
        self._pipeline = self._build(trainer)
        if self.settings.run_at_start and trainer.step == 0:
            self._sample(trainer)

    def on_training_step_end(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Sample when it is due."""
        every = self.settings.every_steps
        is_last = trainer.step == trainer.config.training.loop.max_train_steps
        if (every and trainer.step % every == 0 and not is_last) or (
            is_last and self.settings.run_at_end
        ):
            self._sample(trainer)

    def _build(self, trainer: Trainer) -> VideoPipeline:
        config = trainer.config
        sources = config.training.data.sources()
        manifest = next(filter(None, map(read_manifest, sources)), None)
        codec = config.pipeline.codec or (manifest.codec if manifest else None)
        text_encoder = config.pipeline.text_encoder or (manifest.text_encoder if manifest else None)
        if codec is None or text_encoder is None:
            raise ConfigError(
                "no codec or text encoder is known: the dataset has no dataset.json.",
                remedy="Give pipeline.codec and pipeline.text_encoder.",
                where="callbacks.validation",
            )
        if manifest is not None:
            bucket = manifest.buckets[0]
            self._size = (bucket.num_frames, bucket.height, bucket.width)
            self._fps = self.settings.fps or manifest.fps or self._fps
        negative = config.pipeline.negative_prompt
        return VideoPipeline(
            roles=[trainer.run_parts.roles["student"]],
            codec=build_codec(codec),
            text_encoder=build_text_encoder(text_encoder),
            data_layout=trainer.run_parts.mesh,
            negative_prompt=negative
            if negative is not None
            else (manifest.negative_prompt if manifest else ""),
        )

    def _options(self, num_steps: int) -> SamplingOptions:
        s = self.settings
        given: dict[str, Any] = {
            name: value
            for name, value in zip(
                ("num_frames", "height", "width"), self._size or (None,) * 3, strict=True
            )
            if value is not None
        }
        given |= {n: v for n in ("num_frames", "height", "width") if (v := getattr(s, n))}
        given |= {
            "num_steps": num_steps,
            "guidance_scale": s.guidance_scale,
            "sampler": s.sampler,
            "t_list": s.t_list,
            "seed": s.seed,
            "batch_size": s.batch_size,
            "stream": s.stream,
        }
        return parse_options(SamplingOptions, given, "callbacks.validation")

    def _sample(self, trainer: Trainer) -> None:
        ema = trainer.run_parts.roles["student"].ema
        if self.settings.use_ema and ema is not None:
            with ema.swapped():
                self._sample_now(trainer)
        else:
            self._sample_now(trainer)

    def _sample_now(self, trainer: Trainer) -> None:
        assert self._pipeline is not None
        folder = trainer.output_dir / "validation" / f"step_{trainer.step:08d}"
        for num_steps in self.settings.step_counts:
            found = dict(self._pipeline.generate(self.prompts, self._options(num_steps)))
            videos = _on_main(found)
            if process.is_main():
                self._write(trainer, folder, num_steps, videos)
        log.info("validation videos in %s", folder)

    def _write(
        self, trainer: Trainer, folder: Path, num_steps: int, videos: Mapping[int, Tensor]
    ) -> None:
        for number, frames in sorted(videos.items()):
            path = folder / f"steps_{num_steps}_video_{number:03d}.mp4"
            write_video(path, frames, self._fps)
            name = f"validation_videos_{num_steps}_steps/{number}"
            trainer.trackers.log_video(name, path, trainer.step, self.prompts[number])
        sheet = contact_sheet([frames for _, frames in sorted(videos.items())])
        _write_png(folder / f"steps_{num_steps}_grid.png", sheet)


def _on_main(found: dict[int, Any]) -> dict[int, Any]:
    """All ranks' videos on rank 0."""
    if process.world_size() == 1:
        return found
    parts: list[Any] = [None] * process.world_size()
    dist.gather_object(found, parts if process.is_main() else None, dst=0)
    return {n: video for part in parts for n, video in (part or {}).items()}


def _write_png(path: Path, picture_HWC: Tensor) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture_HWC.numpy()).save(path)


def _read_lines(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{file!r} cannot be read ({error.strerror}).",
            remedy="Give a text file with a prompt a line.",
            where="callbacks.validation.prompts_file",
        ) from None
    return [line.strip() for line in lines if line.strip()]
