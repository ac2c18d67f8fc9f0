"""From a dataset on disk to the micro-batches of a step.

Legend: B batch, C channels, T H W latent frames, height and width, L text tokens, D features.

The loader has no state: ``step_batches(step)`` depends on the dataset, the seed and the step alone.
Threads read ahead (``num_workers``); what they hand out is in the same order as without them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from megagen.core.errors import ConfigError, DataError
from megagen.core.log import get_logger
from megagen.core.streams import Streams
from megagen.data.batch import Batch, LatentShape
from megagen.data.dataset import Dataset, open_dataset
from megagen.data.manifest import read_manifest
from megagen.data.options import DataOptions
from megagen.data.order import Order, Place
from megagen.data.parquet import RowReader
from megagen.data.sample import Sample, columns_of, make_sample, pad_text

log = get_logger(__name__)

READ_TIMEOUT_SECONDS = 600.0
MAX_REPLACEMENTS = 100


class Loader:
    """This data-parallel rank's part of every global batch.

    Args:
        options: ``training.data``.
        data_rank, data_size: which part, of how many.
        micro_batch_size, global_batch_size: None: as ``options`` says.
        streams: the run's streams; ``options.seed`` takes their place where given.
        where: config key path of ``options``, for errors.

    Attributes:
        dataset: what was found on disk.
        order: which sample comes when.
        reader: counts the rows and bytes decoded.
        num_replaced: samples replaced so far under ``on_bad_sample: replace``.

    Raises:
        ConfigError: batch sizes that do not divide, no dataset, no embedding to drop captions to.
        DataError: a file is missing or corrupt.
    """

    def __init__(
        self,
        options: DataOptions,
        *,
        data_rank: int,
        data_size: int,
        micro_batch_size: int | None = None,
        global_batch_size: int | None = None,
        streams: Streams,
        where: str = "training.data",
    ) -> None:
        self.options = options
        self.micro_batch_size = micro_batch_size or options.micro_batch_size
        default = options.global_batch_size or self.micro_batch_size * data_size
        self.global_batch_size = global_batch_size or default
        self._check_sizes(data_size, where)
        share = self.global_batch_size // data_size
        self._own = range(data_rank * share, (data_rank + 1) * share)
        self.dataset: Dataset = open_dataset(options, where)
        self._streams = streams if options.seed is None else Streams(options.seed)
        sizes = [len(bucket.keys) for bucket in self.dataset.buckets]
        self.order = Order(sizes, self.global_batch_size, self._streams)
        columns = columns_of(self.dataset.tensors)
        self.reader = RowReader(columns, options.cache_mb << 20)
        self.num_replaced = 0
        self._dropped_text = self._text_of_dropped(where)
        self._pool = ThreadPoolExecutor(options.num_workers) if options.num_workers else None
        self._ahead: dict[int, list[Future[Sample]]] = {}

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, repeats included."""
        return sum(self.order.sizes)

    @property
    def latent_shapes(self) -> list[LatentShape]:
        """``(C, T, H, W)`` of each bucket."""
        return [bucket.latent_shape for bucket in self.dataset.buckets]

    def step_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step (from 0), all of one bucket's shape.

        Raises:
            DataError: a row cannot be used (see ``DataOptions.on_bad_sample``), or reading hangs.
        """
        samples = self._samples(step)
        first = step * self.global_batch_size + self._own.start
        size = self.micro_batch_size
        bucket, _ = self.order.bucket_of(step)
        entries = self.dataset.buckets[bucket]
        keys = [int(entries.keys[place.entry]) for place in self._places(step)]
        return [
            _collate(
                samples[start : start + size],
                range(first + start, first + start + size),
                keys[start : start + size],
                entries.latent_shape,
            )
            for start in range(0, len(samples), size)
        ]

    # -- the dataset, sample by sample -------------------------------------------------------------
    def key_groups(self) -> list[list[int]]:
        """The number of every sample of the dataset; one list for each shape of latents."""
        return [[int(key) for key in bucket.keys] for bucket in self.dataset.buckets]

    def batch_of(self, keys: Sequence[int]) -> Batch:
        """These samples of one shape with the captions they have; ``positions`` are their keys.

        Raises:
            DataError: a row cannot be used.
        """
        number = next(i for i, found in enumerate(self._entries_of_keys) if keys[0] in found)
        entries = [self._entries_of_keys[number][key] for key in keys]
        samples = [self._read_or_replace(Place(number, entry, 0)) for entry in entries]
        return _collate(samples, keys, keys, self.dataset.buckets[number].latent_shape)

    def provenance(self) -> dict[str, Any]:
        """What the samples are, as JSON: their number, shapes, and text encoder where known."""
        manifests = [read_manifest(folder) for folder in self.options.sources()]
        return {
            "num_samples": self.num_samples,
            "latent_shapes": [list(shape) for shape in self.latent_shapes],
            "text_len": self.dataset.text_len,
            "text_encoder": [m.text_encoder if m else None for m in manifests],
        }

    @functools.cached_property
    def _entries_of_keys(self) -> list[dict[int, int]]:
        return [{key: entry for entry, key in enumerate(keys)} for keys in self.key_groups()]

    def close(self) -> None:
        """Stop reading ahead."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _samples(self, step: int) -> list[Sample]:
        if self._pool is None:
            return [self._load(place) for place in self._places(step)]
        wanted = range(step, step + self.options.prefetch_steps + 1)
        for stale in [s for s in self._ahead if s not in wanted]:
            for future in self._ahead.pop(stale):
                future.cancel()
        for s in wanted:
            if s not in self._ahead:
                self._ahead[s] = [self._pool.submit(self._load, p) for p in self._places(s)]
        try:
            return [f.result(timeout=READ_TIMEOUT_SECONDS) for f in self._ahead.pop(step)]
        except TimeoutError:
            raise DataError(
                f"no sample of step {step} within {READ_TIMEOUT_SECONDS:.0f} s.",
                remedy="Look at the file system of the dataset.",
                where=str(self.options.data_path),
            ) from None

    def _places(self, step: int) -> list[Place]:
        bucket, batch = self.order.bucket_of(step)
        first = batch * self.global_batch_size
        return [self.order.place(bucket, first + i) for i in self._own]

    def _load(self, place: Place) -> Sample:
        sample = self._read_or_replace(place)
        if not self._is_dropped(place):
            return sample
        if self._dropped_text is None:
            return sample.with_text(torch.zeros_like(sample.text_LD), "")
        return sample.with_text(pad_text(self._dropped_text, self.dataset.text_len), "")

    def _read_or_replace(self, place: Place) -> Sample:
        entries = self.dataset.buckets[place.bucket]
        count = len(entries.keys)
        for offset in range(min(count, MAX_REPLACEMENTS)):
            try:
                return self._read(place.bucket, (place.entry + offset) % count)
            except DataError as error:
                if self.options.on_bad_sample == "error":
                    raise
                self.num_replaced += 1
                log.warning("bad sample, the next of its bucket takes its place: %s", error)
        raise DataError(
            f"{min(count, MAX_REPLACEMENTS)} bad samples in a row.",
            remedy="Preprocess the dataset again.",
            where=str(self.options.data_path),
        )

    def _read(self, bucket: int, entry: int) -> Sample:
        entries, dataset = self.dataset.buckets[bucket], self.dataset
        path, row = dataset.files[entries.files[entry]], int(entries.rows[entry])
        values = self.reader.read(path, row)
        shape = entries.latent_shape
        return make_sample(values, dataset.tensors, shape, dataset.text_len, path, row)

    def _is_dropped(self, place: Place) -> bool:
        if self.options.caption_dropout == 0:
            return False
        key = int(self.dataset.buckets[place.bucket].keys[place.entry])
        generator = self._streams.generator("caption_dropout", place.epoch, key)
        return float(torch.rand((), generator=generator)) < self.options.caption_dropout

    def _text_of_dropped(self, where: str) -> Tensor | None:
        """``[L, D]`` in place of a dropped caption; None: zeros."""
        target = self.options.caption_dropout_to
        if self.options.caption_dropout == 0 or target == "zeros":
            return None
        if target not in self.dataset.unconditional:
            raise ConfigError(
                f"is {target!r}, but the dataset has no embedding of that prompt.",
                remedy="Set unconditional_path to a safetensors file that has it, or use zeros.",
                where=f"{where}.caption_dropout_to",
            )
        return self.dataset.unconditional[target]

    def _check_sizes(self, data_size: int, where: str) -> None:
        unit = self.micro_batch_size * data_size
        if self.global_batch_size % unit:
            below = self.global_batch_size // unit * unit
            legal = " or ".join(str(n) for n in (below, below + unit) if n)
            raise ConfigError(
                f"found {self.global_batch_size}, no multiple of micro_batch_size "
                f"{self.micro_batch_size} x {data_size} data-parallel ranks;",
                remedy=f"nearest: {legal}.",
                where=f"{where}.global_batch_size",
            )


def _collate(
    samples: Sequence[Sample], positions: Sequence[int], keys: Sequence[int], shape: LatentShape
) -> Batch:
    names = {name for sample in samples for name in sample.extra}
    try:
        condition = {"text_embeds_BLD": torch.stack([s.text_LD for s in samples])}
        for name in sorted(names):
            condition[name] = torch.stack([s.extra[name] for s in samples])
        latents = [s.latents_CTHW for s in samples if s.latents_CTHW is not None]
        latents_BCTHW = torch.stack(latents) if latents else None
    except (KeyError, RuntimeError) as error:
        raise DataError(
            f"samples {[s.id for s in samples]} cannot share a batch ({error}).",
            remedy="Do not mix datasets of different text encoders or image features.",
        ) from None
    return Batch(
        latents_BCTHW=latents_BCTHW,
        condition=condition,
        positions=tuple(positions),
        ids=tuple(s.id for s in samples),
        captions=tuple(s.caption for s in samples),
        shape_CTHW=shape,
        keys=tuple(keys),
    )
