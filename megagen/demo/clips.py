"""Sets of clips of the demo: through preprocess, out of a dataset, out of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.demo import digits, processes
from megagen.demo.digits import DIRECTIONS, WORDINGS, WORDS, Clips, Split

if TYPE_CHECKING:
    from megagen.data.preprocess import PreprocessOptions
    from megagen.sampling.pipeline import VideoPipeline


def count_videos(folder: Path) -> int:
    """Clips of a folder that ``digits.write_clips`` finished; 0 where it did not."""
    return len(list(folder.glob("*.mp4"))) if (folder / "captions.csv").is_file() else 0


def preprocess_videos(
    videos: Path,
    data: Path,
    codec: Mapping[str, Any],
    text_encoder: Mapping[str, Any],
    num_processes: int = 1,
) -> None:
    """A folder of clips to a dataset; what an earlier run finished is kept."""
    from megagen.data.manifest import read_manifest
    from megagen.data.preprocess import preprocess_options

    options = preprocess_options(
        {
            "input_dir": str(videos),
            "output_dir": str(data),
            "codec": dict(codec),
            "text_encoder": dict(text_encoder),
            "num_frames": digits.NUM_FRAMES,
            "height": digits.FRAME_SIZE,
            "width": digits.FRAME_SIZE,
            "samples_per_file": 128,
        }
    )
    processes.together(num_processes, _preprocess_share, options)
    assert read_manifest(data) is not None


def _preprocess_share(options: PreprocessOptions) -> None:
    from megagen.core import process
    from megagen.data.preprocess import preprocess

    preprocess(options, rank=process.rank(), num_ranks=process.world_size())


def parse_caption(text: str) -> tuple[int, int, int]:
    """Digit, direction and wording: ``parse_caption("a three moving left")`` is (3, 0, 0)."""
    match = re.fullmatch(r"(a )?(\w+) (moving )?(\w+)", text)
    assert match is not None, f"not a caption of the demo: {text!r}"
    wording = WORDINGS.index(f"{match[1] or ''}{{}} {match[3] or ''}{{}}")
    return WORDS.index(match[2]), tuple(DIRECTIONS).index(match[4]), wording


def from_dataset(data: Path, limit: int | None = None) -> Clips:
    """The clips of a dataset as a model sees them: decoded latents, in random order."""
    from megagen.data.codecs import build_codec
    from megagen.data.loader import Loader
    from megagen.data.manifest import read_manifest
    from megagen.data.options import DataOptions

    manifest = read_manifest(data)
    assert manifest is not None
    count = min(limit or manifest.num_samples, manifest.num_samples)
    keys = {"data_path": str(data), "micro_batch_size": count, "global_batch_size": count}
    options = parse_options(DataOptions, keys, "data")
    loader = Loader(options, data_rank=0, data_size=1, streams=Streams(0))
    (batch,) = loader.step_batches(0)
    loader.close()
    video_BCTHW = build_codec(manifest.codec).decode(batch.clean_latents())
    return from_pixels(video_BCTHW, batch.captions)


def from_pixels(video_BCTHW: Tensor, captions: Sequence[str]) -> Clips:
    """Clips of decoded videos in [-1, 1] and their captions."""
    shown = torch.tensor([parse_caption(caption) for caption in captions])
    return Clips(video_BCTHW.mean(1).add(1).div(2).clamp(0, 1), *shown.unbind(1))


def asked(count: int, split: Split) -> Clips:
    """Captions of a split, without frames: digits in turn, the direction changes every ten."""
    number = torch.arange(count)
    directions = number // len(WORDS) % len(DIRECTIONS)
    wordings = digits.split_wordings(split, number)
    return Clips(torch.empty(0), number % len(WORDS), directions, wordings)


def sample(pipeline: VideoPipeline, wanted: Clips, **how: Any) -> Clips:
    """Clips from a model for the captions of ``wanted``, on every rank. Collective.

    The captions are dealt out over the pipeline's data ranks; clip n is a function of the seed and
    n, so that their number changes nothing.

    Args:
        pipeline: built on every rank.
        wanted: what to show.
        how: of ``SamplingOptions``.
    """
    from megagen.parallel.comm import all_reduce
    from megagen.sampling.pipeline import SamplingOptions

    options = SamplingOptions(
        num_frames=digits.NUM_FRAMES,
        height=digits.FRAME_SIZE,
        width=digits.FRAME_SIZE,
        batch_size=32,  # what a core's cache holds
        **how,
    )
    size = (len(wanted), digits.NUM_FRAMES, digits.FRAME_SIZE, digits.FRAME_SIZE)
    own_NTHW = torch.zeros(size)
    for position, video_THWC in pipeline.generate(wanted.captions, options):
        own_NTHW[position] = video_THWC.float().mean(-1) / 255
    mesh = pipeline.data_layout
    frames_NTHW = all_reduce(all_reduce(own_NTHW, mesh.pg.dp), mesh.replica)
    return replace(wanted, frames_NTHW=frames_NTHW)


def write_samples(clips: Clips, folder: Path, count: int) -> None:
    """The first clips as mp4 files named after their captions."""
    chosen = first(clips, count)
    names = [f"{n:03d}-{text.replace(' ', '-')}" for n, text in enumerate(chosen.captions)]
    digits.write_clips(chosen, folder, names)


def first(clips: Clips, count: int) -> Clips:
    """The first so many clips."""
    return clips[:count]


def in_order_of(clips: Clips, wanted: Clips, count: int) -> Clips:
    """Clips that show what the first of ``wanted`` show, each used once where it can be.

    Where a digit does not go in a direction, it is shown in another one; wordings do not count.
    """
    uses, chosen = torch.zeros(len(clips)), []
    for n in range(min(count, len(wanted))):
        cost = uses + 1e3 * (clips.directions_N != wanted.directions_N[n])
        cost += 1e6 * (clips.digits_N != wanted.digits_N[n])
        chosen.append(int(cost.argmin()))
        uses[chosen[-1]] += 1
    return clips[torch.tensor(chosen)]
