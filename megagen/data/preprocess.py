"""``megagen preprocess``: a folder of captioned videos to a dataset of latents and embeddings.

The sorted clips are cut into parts of ``samples_per_file``; rank r of R takes parts r, r + R, ...
A part becomes one parquet file per bucket and then one small record, ``.progress/part-00012.json``,
which marks it done. So the files are the same bit for bit on any number of ranks, a run that was
killed goes on at the first part without a record, and whichever rank ends last writes the manifest:
ranks never need to talk.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import AliasChoices, ConfigDict, Field, field_validator, model_validator
from safetensors.torch import save_file

from megagen.core.errors import ConfigError, DataError
from megagen.core.log import get_logger
from megagen.core.options import StrictOptions, parse_options
from megagen.data.buckets import Bucket, check_buckets, parse_bucket
from megagen.data.codecs import CODECS, Codec, build_codec, check_spec
from megagen.data.encode import Encoder
from megagen.data.image import ClipVision, ClipVisionOptions
from megagen.data.manifest import (
    QUARANTINE,
    UNCONDITIONAL,
    BucketEntry,
    FileEntry,
    Manifest,
    read_manifest,
    write_json,
    write_manifest,
    write_text,
)
from megagen.data.schema import write_rows
from megagen.data.sources import Clip, find_clips
from megagen.data.text import TEXT_ENCODERS, TextEncoder, build_text_encoder

log = get_logger(__name__)


class PreprocessOptions(StrictOptions):
    """Options of ``megagen preprocess``, by flag or in its config file.

    Attributes:
        input_dir: folder of videos with captions (see ``megagen.data.sources``).
        output_dir: the dataset; what an earlier run with the same options finished there is kept.
        codec: name, or mapping ``{name, options...}``: space_to_depth, wan_vae.
        text_encoder: name, or mapping ``{name, options...}``: hashed, umt5.
        buckets: sizes FRAMESxHEIGHTxWIDTH that clips are cut to; or one size by the next three.
        num_frames, height, width: one fixed size.
        fps: rate the clips are brought to; None: each keeps its own.
        negative_prompt: its embedding is stored beside the empty prompt's.
        first_frame: add ``first_frame_latent`` (image-to-video).
        clip_vision: add ``clip_feature`` from this CLIP vision tower (Wan 2.1 image-to-video).
        samples_per_file: clips per part: what is lost at most when a rank is killed.
        max_bad_share: error if more than this share of the clips cannot be used.
        num_threads: clips decoded ahead by each rank.
    """

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), validate_default=True, populate_by_name=True
    )

    input_dir: str
    output_dir: str
    codec: dict[str, Any]
    text_encoder: dict[str, Any]
    buckets: list[str] = Field(default_factory=list)
    num_frames: int | None = Field(None, ge=1)
    height: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("height", "max_height", "num_height")
    )
    width: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("width", "max_width", "num_width")
    )
    fps: float | None = Field(None, gt=0, validation_alias=AliasChoices("fps", "train_fps"))
    negative_prompt: str = ""
    first_frame: bool = False
    clip_vision: ClipVisionOptions | None = None
    samples_per_file: int = Field(64, ge=1)
    max_bad_share: float = Field(0.5, ge=0, le=1)
    num_threads: int = Field(2, ge=1)

    @field_validator("codec", "text_encoder", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("buckets", mode="before")
    @classmethod
    def _bucket_names(cls, value: Any) -> Any:
        items = value.split(",") if isinstance(value, str) else value
        return [parse_bucket(item).name for item in items]

    @model_validator(mode="after")
    def _one_way(self) -> PreprocessOptions:
        fixed = [self.num_frames, self.height, self.width]
        given = sum(value is not None for value in fixed)
        if self.buckets and given:
            raise ValueError("give either buckets or num_frames, height and width, not both")
        if not self.buckets and given < 3:
            raise ValueError("give buckets, or all of num_frames, height and width")
        return self

    def sizes(self) -> list[Bucket]:
        """The buckets, however they were given."""
        if self.buckets:
            return [parse_bucket(name) for name in self.buckets]
        return [parse_bucket([self.num_frames, self.height, self.width])]


@dataclass(frozen=True)
class Work:
    """What is to be done: the clips in parts, and the directory that says which are done."""

    options: PreprocessOptions
    clips: Sequence[Clip]
    output: Path

    @property
    def num_parts(self) -> int:
        """Parts of ``samples_per_file`` clips."""
        return -(-len(self.clips) // self.options.samples_per_file)

    def part(self, index: int) -> Sequence[Clip]:
        """The clips of a part."""
        size = self.options.samples_per_file
        return self.clips[index * size : (index + 1) * size]

    def record(self, index: int) -> Path:
        """The file that marks a part done."""
        return self.output / ".progress" / f"part-{index:05d}.json"

    @property
    def plan_path(self) -> Path:
        """The file that says what this directory was begun with."""
        return self.output / ".progress" / "plan.json"

    def fingerprint(self) -> dict[str, Any]:
        """All that the rows depend on: the options and the clips."""
        ignored = {"output_dir", "num_threads", "max_bad_share"}
        lines = [f"{c.file_name}\t{_size(c.path)}\t{c.caption}\n" for c in self.clips]
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
        options = self.options.model_dump(mode="json", exclude=ignored)
        return {**options, "list of clips": f"{len(self.clips)} files, {digest}"}

    def missing(self) -> list[int]:
        """Parts not yet done."""
        return [index for index in range(self.num_parts) if not self.record(index).is_file()]

    def records(self) -> list[dict[str, Any]]:
        """The records of the parts that are done, in order."""
        paths = [self.record(index) for index in range(self.num_parts)]
        return [json.loads(path.read_text()) for path in paths if path.is_file()]

    def num_done(self) -> int:
        """Clips in parts that are done."""
        return len(self.clips) - sum(len(self.part(index)) for index in self.missing())


def plan(options: PreprocessOptions) -> Work:
    """Look for the clips and compare with what an earlier run began in ``output_dir``; no writing.

    Raises:
        DataError: no clips, or the directory was begun with other options or other clips.
    """
    work = Work(options, find_clips(options.input_dir), Path(options.output_dir))
    if work.plan_path.is_file():
        before, now = json.loads(work.plan_path.read_text()), work.fingerprint()
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if changed:
            key = changed[0]
            raise DataError(
                f"was begun with another {key}: {before.get(key)!r} then, {now.get(key)!r} now.",
                remedy="Choose another output_dir, or remove this one.",
                where=str(work.output),
            )
    elif read_manifest(work.output) is not None:
        raise DataError(
            "holds a dataset already.", remedy="Choose another output_dir.", where=str(work.output)
        )
    return work


def preprocess(
    options: PreprocessOptions,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    on_clip: Callable[[], None] = lambda: None,
) -> Manifest | None:
    """Do this rank's parts, and write the manifest if no part of any rank is missing then.

    Args:
        options: what to do.
        rank, num_ranks: which share of it.
        on_clip: called after each clip.

    Returns:
        The manifest; None where other ranks are still at work.

    Raises:
        ConfigError: a size that the codec cannot encode, unknown names or options.
        DataError: no clips, none usable, too many bad ones, missing weights.
    """
    codec = build_codec(options.codec)
    check_buckets(options.sizes(), codec, "buckets" if options.buckets else "num_frames")
    work = plan(options)
    write_json(work.plan_path, work.fingerprint())
    mine = [index for index in work.missing() if index % num_ranks == rank]
    unconditional = work.output / UNCONDITIONAL
    if mine or (rank == 0 and not unconditional.is_file()):
        encoder = _encoder(options, codec)
        if rank == 0:
            write_unconditional(unconditional, encoder.text, options.negative_prompt)
        seen = bad = 0
        for index in mine:
            record = _do_part(work, index, encoder, on_clip)
            seen, bad = seen + len(work.part(index)), bad + len(record["quarantined"])
            if bad == seen and seen >= 64:
                _too_bad(work, _write_quarantine(work), bad, seen)
    return None if work.missing() or not unconditional.is_file() else _finish(work, codec)


def _encoder(options: PreprocessOptions, codec: Codec) -> Encoder:
    return Encoder(
        codec,
        build_text_encoder(options.text_encoder),
        options.sizes(),
        fps=options.fps,
        first_frame=options.first_frame,
        clip_vision=ClipVision(options.clip_vision) if options.clip_vision else None,
        num_threads=options.num_threads,
    )


def _do_part(
    work: Work, index: int, encoder: Encoder, on_clip: Callable[[], None]
) -> dict[str, Any]:
    for leftover in work.output.glob(f"*/.part-{index:05d}.parquet.*.tmp"):
        leftover.unlink()  # of an attempt that was killed; no other rank has this part
    encoded = encoder.encode(work.part(index), on_clip)
    files = []
    for bucket, rows in sorted(encoded.rows.items()):
        name = f"{bucket.name}/part-{index:05d}.parquet"
        write_rows(work.output / name, rows, encoder.tensors)
        size = (work.output / name).stat().st_size
        files.append({"bucket": bucket.name, "file": name, "rows": len(rows), "size": size})
    sums = encoded.latent_sums
    record = {
        "files": files,
        "quarantined": encoded.quarantined,
        "latent_sums": None if sums is None else sums.tolist(),
        "tensors": encoder.tensors,
        "text_encoder": encoder.text.spec(),
        "text_shape": [encoder.text.max_length, encoder.text.dim],
    }
    write_json(work.record(index), record)
    return record


def write_unconditional(target: Path, text: TextEncoder, negative_prompt: str) -> None:
    """The embeddings of the empty and the negative prompt, whole or not at all."""
    embeds_BLD, _ = text.encode(["", negative_prompt])
    temporary = target.with_name(f".{target.name}.tmp")
    tensors = {"empty": embeds_BLD[0].contiguous(), "negative": embeds_BLD[1].contiguous()}
    save_file(tensors, temporary)
    temporary.replace(target)


def _finish(work: Work, codec: Codec) -> Manifest:
    """Add the records up into ``quarantine.jsonl`` and ``dataset.json``."""
    records = work.records()
    bad = _write_quarantine(work)
    if len(bad) == len(work.clips) or len(bad) > work.options.max_bad_share * len(work.clips):
        _too_bad(work, bad, len(bad), len(work.clips))
    files = [entry for record in records for entry in record["files"]]
    buckets = [_bucket_entry(b, codec, files) for b in sorted(work.options.sizes())]
    mean, std = _latent_statistics([r["latent_sums"] for r in records if r["latent_sums"]])
    manifest = Manifest(
        codec=codec.spec(),
        text_encoder=records[0]["text_encoder"],
        text_len=records[0]["text_shape"][0],
        text_dim=records[0]["text_shape"][1],
        tensors=records[0]["tensors"],
        negative_prompt=work.options.negative_prompt,
        latent_mean=mean,
        latent_std=std,
        fps=work.options.fps,
        num_samples=len(work.clips) - len(bad),
        num_quarantined=len(bad),
        quarantine_reasons=dict(sorted(Counter(entry["reason"] for entry in bad).items())),
        buckets=[bucket for bucket in buckets if bucket.num_samples],
    )
    write_manifest(work.output, manifest)
    return manifest


def _write_quarantine(work: Work) -> list[dict[str, str]]:
    bad = [entry for record in work.records() for entry in record["quarantined"]]
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad]
    write_text(work.output / QUARANTINE, "".join(lines))
    return bad


def _bucket_entry(bucket: Bucket, codec: Codec, files: Sequence[dict[str, Any]]) -> BucketEntry:
    own = [
        FileEntry(file=f["file"], rows=f["rows"], size=f["size"])
        for f in files
        if f["bucket"] == bucket.name
    ]
    return BucketEntry(
        num_frames=bucket.num_frames,
        height=bucket.height,
        width=bucket.width,
        latent_shape=codec.latent_shape(bucket.num_frames, bucket.height, bucket.width),
        num_samples=sum(entry.rows for entry in own),
        files=own,
    )


def _latent_statistics(sums: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel from the parts' sums ``[3, C]``."""
    count, total, squares = torch.tensor(sums, dtype=torch.float64).sum(0)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.tolist(), std.tolist()


def _too_bad(work: Work, entries: Sequence[dict[str, str]], bad: int, seen: int) -> None:
    first = entries[0]
    raise DataError(
        f"{bad} of {seen} clips cannot be used (first: {first['file_name']}: {first['detail']}).",
        remedy=f"Mend them, or raise max_bad_share; all are listed in {work.output / QUARANTINE}.",
        where=work.options.input_dir,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def preprocess_options(data: dict[str, Any], where: str = "") -> PreprocessOptions:
    """Checked options from a mapping.

    Raises:
        ConfigError: unknown or missing keys, wrong values.
    """
    missing = [key for key in ("input_dir", "output_dir") if not data.get(key)]
    if missing:
        flag = missing[0].replace("_", "-")
        raise ConfigError(f"{missing[0]} is not given.", remedy=f"Add --{flag} PATH.", where=where)
    options = parse_options(PreprocessOptions, data, where)
    check_spec(options.codec, CODECS, "codec")
    check_spec(options.text_encoder, TEXT_ENCODERS, "text_encoder")
    return options
