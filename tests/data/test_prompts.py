"""Datasets of texts alone: written from prompts, read without latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megagen.cli.main import main
from megagen.core.errors import ConfigError, DataError
from megagen.core.options import parse_options
from megagen.core.streams import Streams
from megagen.data import prompts
from megagen.data.loader import Loader
from megagen.data.options import DataOptions
from megagen.data.prompts import encode_prompts, prompt_options
from megagen.data.schema import write_rows
from megagen.data.text import build_text_encoder
from tests.data.builders import foreign_rows, write_foreign

ENCODER = {"name": "hashed", "dim": 8, "max_length": 7}
SHAPE = [4, 3, 5, 2]


def written(folder: Path, texts: list[str], **changes: Any) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n\n".join(texts) + "\n")
    output = folder / "data"
    given = {"prompts": str(file), "output_dir": str(output), "text_encoder": ENCODER, **changes}
    assert encode_prompts(prompt_options(given)) == len(texts)
    return output


def loader(folder: Path, **changes: Any) -> Loader:
    given = {"data_path": str(folder), "preprocessed_data_type": "text_only"}
    given |= {"latent_shape": SHAPE, "micro_batch_size": 5, "text_len": 7, **changes}
    options = parse_options(DataOptions, given, "training.data")
    return Loader(options, data_rank=0, data_size=1, streams=Streams(2))


def test_prompts_come_back_as_their_embeddings(tmp_path: Path) -> None:
    texts = [f"a cat number {i} on the moon" for i in range(5)]
    found = loader(
        written(tmp_path, texts, samples_per_file=2, negative_prompt="blurry"),
        caption_dropout=0.0,
    )
    (batch,) = found.step_batches(0)
    assert batch.latents_BCTHW is None and batch.latent_shape == tuple(SHAPE)
    assert sorted(batch.captions) == texts
    encoder = build_text_encoder(ENCODER)
    expected, _ = encoder.encode(batch.captions)
    assert torch.equal(batch.condition["text_embeds_BLD"], expected)
    assert torch.equal(found.dataset.unconditional["negative"], encoder.encode(["blurry"])[0][0])
    with pytest.raises(DataError, match="no latents"):
        batch.clean_latents()


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"prompt {i}" for i in range(6)]
    (tmp_path / "whole").mkdir()
    whole = written(tmp_path / "whole", texts, samples_per_file=2)
    parts: list[Path] = []

    def stop_at_the_second(path: Path, *args: Any) -> None:
        parts.append(path)
        if len(parts) == 2:
            raise KeyboardInterrupt
        write_rows(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(prompts, "write_rows", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, texts, samples_per_file=2)
    with pytest.raises(DataError, match="not finished"):
        loader(tmp_path / "data")
    with pytest.raises(DataError, match="other prompts or options"):
        written(tmp_path, texts, samples_per_file=3)
    kept = parts[0].stat().st_mtime_ns
    folder = written(tmp_path, texts, samples_per_file=2)
    assert parts[0].stat().st_mtime_ns == kept
    for path in whole.glob("*"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    with pytest.raises(DataError, match="holds a dataset"):
        written(tmp_path, texts, samples_per_file=2)


def test_texts_of_a_dataset_with_latents(tmp_path: Path, seeded: torch.Generator) -> None:
    rows = foreign_rows(5, (4, 3, 5, 2), seeded)
    write_foreign(tmp_path / "data" / "a.parquet", rows)
    (batch,) = loader(tmp_path / "data", num_frames=99).step_batches(0)  # sizes do not count
    assert batch.latents_BCTHW is None and len(batch.ids) == 5


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    words = ["preprocess", "--prompts", str(tmp_path / "p.txt"), "--output-dir"]
    words += [str(tmp_path / "out"), "--text-encoder", "hashed", "--text_encoder.dim", "8"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code and "2 prompts" in capfd.readouterr().out
    with pytest.raises(ConfigError, match="cannot be read"):
        encode_prompts(
            prompt_options({"prompts": "no", "output_dir": "x", "text_encoder": ENCODER})
        )
