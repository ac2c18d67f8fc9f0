"""From parquet to batches: exact, the same on any number of ranks, bad files named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megagen.core.errors import ConfigError, DataError
from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.data.batch import Batch
from megagen.data.codecs import build_codec, to_pixels
from megagen.data.loader import Loader
from megagen.data.manifest import read_manifest
from megagen.data.options import DataOptions
from megagen.data.parquet import RowReader
from megagen.data.preprocess import preprocess, preprocess_options
from megagen.data.repack import repack
from megagen.data.video import read_video
from tests.data.builders import foreign_rows, options, stored, write_clips, write_foreign

SHAPE = (4, 3, 5, 2)


def make(path: Any, *, rank: int = 0, ranks: int = 1, **changes: Any) -> Loader:
    name = path if isinstance(path, dict) else str(path)
    data = parse_options(DataOptions, {"data_path": name, **changes}, "training.data")
    return Loader(data, data_rank=rank, data_size=ranks, streams=Streams(11))


@pytest.fixture
def foreign(tmp_path: Path, seeded: torch.Generator) -> tuple[Path, list[dict[str, Any]]]:
    """Two files of FastVideo's kind, in sub-folders: 9 and 4 samples."""
    rows = foreign_rows(13, SHAPE, seeded)
    write_foreign(tmp_path / "foreign/worker_0/data_chunk_0.parquet", rows[:9])
    write_foreign(tmp_path / "foreign/worker_1/data_chunk_0.parquet", rows[9:])
    return tmp_path / "foreign", rows


@pytest.fixture
def own(tmp_path: Path, seeded: torch.Generator) -> Path:
    """A dataset of ours: 14 clips in three buckets."""
    folder = write_clips(tmp_path / "clips", 14, seeded)
    preprocess(preprocess_options(options(folder, tmp_path / "own")))
    return tmp_path / "own"


def flat(loader: Loader, steps: range) -> list[tuple[Any, ...]]:
    """(position, id, caption, latents, text) of every sample of some steps."""
    found = []
    for step in steps:
        for batch in loader.step_batches(step):
            text = batch.condition["text_embeds_BLD"]
            found += list(
                zip(
                    batch.positions,
                    batch.ids,
                    batch.captions,
                    [x.numpy().tobytes() for x in batch.latents_BCTHW],
                    [x.numpy().tobytes() for x in text],
                    strict=True,
                )
            )
    return found


def test_video_to_batch_is_exact(own: Path, tmp_path: Path) -> None:
    loader = make(own, micro_batch_size=3, global_batch_size=6)
    manifest = read_manifest(own)
    assert manifest is not None
    codec = build_codec(manifest.codec)
    assert loader.num_samples == 14
    assert loader.latent_shapes == sorted(b.latent_shape for b in manifest.buckets)
    shapes = set()
    for step in range(6):
        batches = loader.step_batches(step)
        assert len(batches) == 2
        for batch in batches:
            shapes.add(tuple(batch.latents_BCTHW.shape))
            assert batch.condition["text_embeds_BLD"].shape == (3, 7, 8)
            for latents, name in zip(batch.latents_BCTHW, batch.ids, strict=True):
                frames, _ = read_video(tmp_path / "clips" / f"{name}.mp4")
                assert torch.equal(
                    to_pixels(codec.decode(latents[None])[0]), frames[: latents.shape[1]]
                )
    assert len(shapes) == 3


def test_every_sample_once_per_epoch_then_reshuffled(
    foreign: tuple[Path, list[dict[str, Any]]],
) -> None:
    loader = make(foreign[0], micro_batch_size=1, global_batch_size=1)
    epochs = [[x[1] for x in flat(loader, range(13 * e, 13 * e + 13))] for e in range(3)]
    assert all(sorted(epoch) == sorted(r["id"] for r in foreign[1]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("workers", [0, 3])
def test_same_global_batch_on_any_number_of_ranks(own: Path, workers: int) -> None:
    steps = range(9)
    whole = {"global_batch_size": 8, "caption_dropout": 0.4}
    expected = flat(make(own, micro_batch_size=8, **whole), steps)
    assert [x[0] for x in expected] == list(range(72))
    for ranks, micro in ((1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
        parts = []
        for rank in range(ranks):
            loader = make(
                own, rank=rank, ranks=ranks, micro_batch_size=micro, num_workers=workers, **whole
            )
            parts += flat(loader, steps)
            loader.close()
        assert sorted(parts) == expected, (ranks, micro)


def test_resume_at_any_step(own: Path) -> None:
    changes = {"micro_batch_size": 2, "global_batch_size": 4, "caption_dropout": 0.5}
    expected = [flat(make(own, **changes), range(s, s + 1)) for s in range(12)]
    in_turn = make(own, num_workers=2, **changes)
    assert [flat(in_turn, range(s, s + 1)) for s in (0, 1, 2, 7, 8, 3, 11)] == [
        expected[s] for s in (0, 1, 2, 7, 8, 3, 11)
    ]
    in_turn.close()


def test_foreign_rows_arrive_unchanged(foreign: tuple[Path, list[dict[str, Any]]]) -> None:
    loader = make(foreign[0], micro_batch_size=13, text_len=5)
    (batch,) = loader.step_batches(0)
    by_id = {row["id"]: row for row in foreign[1]}
    assert set(batch.ids) == set(by_id)
    for i, name in enumerate(batch.ids):
        row = by_id[name]
        assert batch.captions[i] == row["caption"]
        assert torch.equal(batch.latents_BCTHW[i], stored(row, "vae_latent"))
        text, padded = stored(row, "text_embedding"), batch.condition["text_embeds_BLD"][i]
        assert padded.shape == (5, 6)
        assert torch.equal(padded[: len(text)], text[:5])
        assert not padded[len(text) :].any()
    assert make(foreign[0]).dataset.text_len == 512


def test_options_of_the_dataset(foreign: tuple[Path, list[dict[str, Any]]], own: Path) -> None:
    loader = make(foreign[0], num_latent_t=2, micro_batch_size=2)
    (batch,) = loader.step_batches(0)
    row = next(r for r in foreign[1] if r["id"] == batch.ids[0])
    assert torch.equal(batch.latents_BCTHW[0], stored(row, "vae_latent")[:, :2])
    assert make(own, num_height=32, num_width=24).latent_shapes == [(48, 12, 8, 6)]
    with pytest.raises(DataError, match="no sample of the size"):
        make(own, num_frames=99)
    repeats = Counter(x[1] for x in flat(make(f"{foreign[0]}:3"), range(39)))
    assert repeats == Counter({r["id"]: 3 for r in foreign[1]})
    mixed = make(f"{foreign[0]},{own}", micro_batch_size=1)
    assert mixed.num_samples == 27
    assert len(mixed.latent_shapes) == 4
    seeds = [flat(make(foreign[0], seed=s), range(13)) for s in (None, 11, 12)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_caption_dropout_has_its_rate_and_differs_by_epoch(
    tmp_path: Path, seeded: torch.Generator
) -> None:
    write_foreign(tmp_path / "data/a.parquet", foreign_rows(400, (1, 1, 1, 1), seeded))
    loader = make(tmp_path / "data", caption_dropout=0.3, caption_dropout_to="zeros", text_len=6)
    dropped: list[set[str]] = []
    for epoch in range(4):
        samples = flat(loader, range(400 * epoch, 400 * epoch + 400))
        for _, _, caption, _, text in samples:
            assert (caption == "") == (not np.frombuffer(text, np.float32).any())
        dropped.append({name for _, name, caption, _, _ in samples if caption == ""})
    total = sum(len(names) for names in dropped)
    assert abs(total - 0.3 * 1600) < 4.5 * (1600 * 0.3 * 0.7) ** 0.5
    for a in range(4):
        for b in range(a):  # independent: 0.09 of the samples in both
            assert abs(len(dropped[a] & dropped[b]) - 36) < 5 * (400 * 0.09 * 0.91) ** 0.5
    never = make(tmp_path / "data", caption_dropout=0.0)
    assert all(x[2] for x in flat(never, range(50)))


def test_what_a_dropped_caption_becomes(
    own: Path, foreign: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    unconditional = make(own).dataset.unconditional
    for target in ("empty", "negative"):
        loader = make(own, caption_dropout=1, caption_dropout_to=target, micro_batch_size=2)
        (batch,) = loader.step_batches(0)
        expected = unconditional[target].expand(2, -1, -1)
        assert torch.equal(batch.condition["text_embeds_BLD"], expected)
        assert batch.captions == ("", "")
    assert not torch.equal(unconditional["empty"], unconditional["negative"])
    with pytest.raises(ConfigError, match=r"caption_dropout_to.*'empty'.*unconditional_path"):
        make(foreign[0], caption_dropout=0.1)
    save_file({"empty": torch.ones(2, 6)}, tmp_path / "u.safetensors")
    given = make(foreign[0], caption_dropout=1, unconditional_path=str(tmp_path / "u.safetensors"))
    text = given.step_batches(0)[0].condition["text_embeds_BLD"]
    assert text.sum() == 12
    assert text.shape == (1, 512, 6)


def test_image_to_video_conditions(tmp_path: Path, seeded: torch.Generator) -> None:
    folder = write_clips(tmp_path / "clips", 4, seeded)
    preprocess(preprocess_options(options(folder, tmp_path / "i2v", first_frame=True)))
    (batch,) = make(tmp_path / "i2v", preprocessed_data_type="i2v").step_batches(0)
    first = batch.condition["condition_latents_BCTHW"]
    assert torch.equal(first[:, :, 0], batch.latents_BCTHW[:, :, 0])
    assert not first[:, :, 1:].any()
    (plain,) = make(tmp_path / "i2v", preprocessed_data_type="t2v").step_batches(0)
    assert set(plain.condition) == {"text_embeds_BLD"}

    rows = foreign_rows(3, SHAPE, seeded)
    for row in rows:  # FastVideo marks an absent tensor by empty bytes
        row |= {f"clip_feature_{part}": value for part, value in _empty().items()}
    write_foreign(tmp_path / "noclip/a.parquet", rows)
    assert set(make(tmp_path / "noclip").step_batches(0)[0].condition) == {"text_embeds_BLD"}
    with pytest.raises(DataError, match="first_frame_latent_bytes"):
        make(tmp_path / "noclip", preprocessed_data_type="i2v")


def _empty() -> dict[str, Any]:
    return {"bytes": b"", "shape": np.zeros(0, np.int64), "dtype": ""}


def test_a_batch_size_that_does_not_divide_is_named(own: Path) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size: found 7.*2 x 2.*nearest: 4 or 8"):
        make(own, ranks=2, micro_batch_size=2, global_batch_size=7)
    with pytest.raises(ConfigError, match=r"data_path.*no such directory"):
        make("/nowhere")
    with pytest.raises(ConfigError, match=r"data_path: is not given"):
        Loader(DataOptions(), data_rank=0, data_size=1, streams=Streams(0))


def test_wrong_files_are_found_at_the_start(
    own: Path, foreign: tuple[Path, list[dict[str, Any]]]
) -> None:
    path = sorted(own.rglob("*.parquet"))[0]
    whole = path.read_bytes()
    for damaged, message in (
        (whole[: len(whole) // 2], "cannot be opened as parquet"),
        (b"", "cannot be opened as parquet"),
        (whole + b"x", "cannot be opened as parquet"),
        (sorted(own.rglob("*.parquet"))[1].read_bytes(), "were written"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{path.name}.*{message}"):
            make(own)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        make(own)
    (own / "dataset.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        make(own)
    (foreign[0] / "worker_1/data_chunk_0.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match=r"worker_1/data_chunk_0\.parquet"):
        make(foreign[0])


def test_a_flipped_byte_is_found_when_its_row_is_read(own: Path) -> None:
    path = sorted(own.rglob("*.parquet"))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x40
    path.write_bytes(data)
    loader = make(own)
    with pytest.raises(DataError, match=rf"{path.name}: row \d+ "):
        flat(loader, range(40))


def test_bad_rows_are_named_or_replaced(tmp_path: Path, seeded: torch.Generator) -> None:
    rows = foreign_rows(8, SHAPE, seeded)
    bad = stored(rows[5], "vae_latent")
    bad[1, 2, 0, 1] = float("nan")
    rows[5]["vae_latent_bytes"] = bad.numpy().tobytes()
    rows[6]["text_embedding_bytes"] = rows[6]["text_embedding_bytes"][:-4]
    write_foreign(tmp_path / "data/a.parquet", rows)
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"a\.parquet: row [56]: "):
            flat(make(tmp_path / "data", num_workers=workers), range(8))
    loader = make(tmp_path / "data", on_bad_sample="replace")
    ids = [x[1] for x in flat(loader, range(8))]
    # rows 5 and 6 give way to row 7, the next of their bucket
    assert Counter(ids) == Counter({f"video{i}": 1 for i in (0, 1, 2, 3, 4)} | {"video7": 3})
    assert loader.num_replaced == 3
    assert ids == [x[1] for x in flat(make(tmp_path / "data", on_bad_sample="replace"), range(8))]
    for row in rows:
        row["vae_latent_bytes"] = bad.numpy().tobytes()
    write_foreign(tmp_path / "none/a.parquet", rows)
    with pytest.raises(DataError, match="8 bad samples in a row"):
        make(tmp_path / "none", on_bad_sample="replace").step_batches(0)


def test_a_row_of_a_huge_row_group_is_read_without_the_rest(
    tmp_path: Path, seeded: torch.Generator
) -> None:
    shape = (16, 4, 32, 32)  # 256 KiB a row, 16 MiB in one row group
    rows = foreign_rows(64, shape, seeded)
    for row in rows:
        row["pil_image_bytes"] = b"\1" * 300_000  # a column that nobody wants
    write_foreign(tmp_path / "data/a.parquet", rows)
    loader = make(tmp_path / "data", text_len=8)
    assert loader.reader.rows_decoded == 0  # the index reads no tensor
    place = loader.order.step(0)[0]
    (batch,) = loader.step_batches(0)
    assert torch.equal(batch.latents_BCTHW[0], stored(rows[place.entry], "vae_latent"))
    assert loader.reader.rows_decoded == place.entry + 1
    assert loader.reader.bytes_decoded < (place.entry + 1) * (1 << 18) * 1.02
    loader.step_batches(0)  # from the cache
    assert loader.reader.rows_decoded == place.entry + 1

    assert repack(tmp_path / "data", tmp_path / "small") == 64
    small = make(tmp_path / "small", text_len=8, cache_mb=0)
    for step in range(4):
        before = small.reader.rows_decoded
        assert _same(small.step_batches(step)[0], loader.step_batches(step)[0])
        assert small.reader.rows_decoded - before <= 4  # a row group of 1 MiB


def _same(a: Batch, b: Batch) -> bool:
    return (
        a.ids == b.ids
        and a.captions == b.captions
        and torch.equal(a.latents_BCTHW, b.latents_BCTHW)
        and all(torch.equal(a.condition[k], b.condition[k]) for k in a.condition)
    )


def test_the_cache_saves_reading_and_keeps_its_size(own: Path) -> None:
    cached, uncached = make(own), make(own, cache_mb=0)
    assert flat(cached, range(28)) == flat(uncached, range(28))
    assert cached.reader.rows_decoded <= 14 < uncached.reader.rows_decoded
    small = make(own)
    small.reader = RowReader(small.reader.columns, cache_bytes=350_000)  # a few row groups
    assert flat(small, range(28)) == flat(cached, range(28))
    kept = [table.nbytes for table in small.reader._cache.values()]
    assert 0 < sum(kept) == small.reader._cached <= 350_000


def test_samples_by_their_keys(own: Path, foreign: tuple[Path, list[dict[str, Any]]]) -> None:
    loader = make(own, micro_batch_size=2, caption_dropout=0.5, caption_dropout_to="zeros")
    groups = loader.key_groups()
    keys = [key for group in groups for key in group]
    assert len(groups) == 3 and sorted(keys) == list(range(14))
    trained = make(own, micro_batch_size=2)
    for batch in (b for step in range(7) for b in trained.step_batches(step)):
        found = loader.batch_of(batch.keys)  # captions are kept
        assert _same(found, batch) and found.keys == found.positions == batch.keys
    assert loader.batch_of([groups[1][0]]).latent_shape == loader.latent_shapes[1]
    twice = make({str(foreign[0]): 2})
    (group,) = twice.key_groups()
    assert sorted(group) == list(range(26))
    assert twice.provenance()["num_samples"] == 26
    assert loader.provenance()["text_encoder"][0]["name"] == "hashed"
