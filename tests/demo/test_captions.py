"""What is held out is held out for the model too: it tells every two captions apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megagen.data.text import build_text_encoder
from megagen.demo.clips import asked
from megagen.demo.run import TEXT_ENCODER, WEIGHTS
from megagen.sampling import source

ROOT = Path(__file__).parents[2]


def test_no_two_captions_look_the_same_to_the_model() -> None:
    train, held_out = (set(asked(2000, split).captions) for split in ("train", "held_out"))
    captions = sorted(train | held_out)
    embeds, _ = build_text_encoder(TEXT_ENCODER).encode(captions)
    seen: dict[bytes, str] = {}
    for caption, embed_LD in zip(captions, embeds, strict=True):
        other = seen.setdefault(embed_LD.numpy().tobytes(), caption)
        assert other == caption, f"{caption!r} is {other!r} to the model: raise max_length"
    assert len(seen) == len(train) + len(held_out)


@pytest.mark.parametrize("name", ["kd", "dmd2"])
def test_weights_and_configs_read_captions_as_the_data_does(name: str) -> None:
    tree = yaml.safe_load((ROOT / f"configs/demo/{name}.yaml").read_text())
    spec = source.read_spec(WEIGHTS)
    assert spec is not None
    for encoder in (tree["pipeline"]["text_encoder"], spec.text_encoder):
        assert encoder == {**encoder, **TEXT_ENCODER}
    assert tree["training"]["data"]["text_len"] == TEXT_ENCODER["max_length"]
