"""Codecs and text encoders: exact where promised, equal to the real classes used directly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megagen.core.errors import ConfigError, DataError
from megagen.data.codecs import CODECS, build_codec, to_pixels, to_unit
from megagen.data.image import ClipVision, ClipVisionOptions
from megagen.data.text import build_text_encoder, clean


def test_every_level_survives_the_trip_through_unit_range() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_pixels(to_unit(levels)), levels)


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("temporal", [1, 2])
def test_space_to_depth_is_exact(seeded: torch.Generator, patch: int, temporal: int) -> None:
    codec = build_codec({"name": "space_to_depth", "patch": patch, "temporal": temporal})
    video = torch.rand(2, 3, 4, 8, 12, generator=seeded) * 2 - 1
    latents = codec.encode(video)
    assert tuple(latents.shape[1:]) == codec.latent_shape(4, 8, 12)
    assert torch.equal(codec.decode(latents), video)
    if temporal == 1:  # torch's own rule for one frame
        for t in range(4):
            assert torch.equal(latents[:, :, t], F.pixel_unshuffle(video[:, :, t], patch))
    assert build_codec(json.loads(json.dumps(codec.spec()))).spec() == codec.spec()


def test_offset_and_scale_centre_the_latents(seeded: torch.Generator) -> None:
    plain = build_codec({"name": "space_to_depth", "patch": 2})
    centred = build_codec({"name": "space_to_depth", "patch": 2, "offset": -0.8, "scale": 0.5})
    video = torch.rand(2, 3, 4, 6, 8, generator=seeded) * 2 - 1
    latents = centred.encode(video)
    torch.testing.assert_close(latents * 0.5 - 0.8, plain.encode(video))
    torch.testing.assert_close(centred.decode(latents), video)


def test_grey_space_to_depth_keeps_the_mean_of_the_colours(seeded: torch.Generator) -> None:
    codec = build_codec({"name": "space_to_depth", "patch": 2, "temporal": 2, "channels": 1})
    grey = (torch.rand(2, 1, 4, 8, 12, generator=seeded) * 2 - 1).expand(-1, 3, -1, -1, -1)
    latents = codec.encode(grey)
    assert tuple(latents.shape[1:]) == codec.latent_shape(4, 8, 12) == (8, 2, 4, 6)
    torch.testing.assert_close(codec.decode(latents), grey, rtol=0, atol=1e-6)
    colour = torch.rand(1, 3, 2, 4, 4, generator=seeded)
    decoded = codec.decode(codec.encode(colour))
    torch.testing.assert_close(decoded[:, 1], colour.mean(1), rtol=0, atol=1e-6)


def test_wrong_names_options_and_sizes_are_named() -> None:
    with pytest.raises(ConfigError, match="space_to_depth"):
        build_codec({"name": "space_to_dept"})
    with pytest.raises(ConfigError, match=r"codec\.ptch.*did you mean 'patch'"):
        build_codec({"name": "space_to_depth", "ptch": 2})
    codec = build_codec({"name": "space_to_depth", "patch": 4, "temporal": 2})
    with pytest.raises(ConfigError, match=r"num_frames 5 .*nearest legal: 4 and 6"):
        codec.check_size(5, 8, 8, "buckets[0]")
    with pytest.raises(ConfigError, match=r"width 10 .*nearest legal: 8 and 12"):
        codec.check_size(4, 8, 10, "buckets[0]")
    with pytest.raises(DataError, match="nowhere"):
        build_codec({"name": "wan_vae", "path": "/nowhere"})
    assert set(CODECS) == {"space_to_depth", "wan_vae"}


@pytest.fixture(scope="module")
def wan_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory with a tiny random Wan VAE."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    folder = tmp_path_factory.mktemp("wan")
    vae.save_pretrained(folder / "vae")
    return folder


def test_wan_vae_is_the_real_class(wan_directory: Path, seeded: torch.Generator) -> None:
    from diffusers import AutoencoderKLWan

    direct = AutoencoderKLWan.from_pretrained(wan_directory / "vae").eval()
    codec = build_codec({"name": "wan_vae", "path": str(wan_directory)})
    video = torch.rand(1, 3, 5, 16, 24, generator=seeded) * 2 - 1
    latents = codec.encode(video)
    with torch.no_grad():
        posterior = direct.encode(video).latent_dist
        assert torch.equal(latents, posterior.mode())
        assert torch.equal(codec.decode(latents), direct.decode(latents).sample)
    assert tuple(latents.shape[1:]) == codec.latent_shape(5, 16, 24) == (16, 2, 2, 3)
    assert codec.pixel_frames(2) == 5
    mean = torch.tensor(direct.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(direct.config.latents_std).view(1, -1, 1, 1, 1)
    assert torch.equal(codec.normalize(latents), (latents - mean) / std)
    again = build_codec(json.loads(json.dumps(codec.spec())))
    assert torch.equal(again.encode(video), latents)


def test_wan_22_vae_is_the_real_class(tmp_path: Path, seeded: torch.Generator) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    direct = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.5] * 8,
        latents_std=[2.0] * 8,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()
    direct.save_pretrained(tmp_path / "vae")
    codec = build_codec({"name": "wan_vae", "path": str(tmp_path)})
    video = torch.rand(1, 3, 9, 32, 48, generator=seeded) * 2 - 1
    latents = codec.encode(video)
    with torch.no_grad():
        assert torch.equal(latents, direct.encode(video).latent_dist.mode())
        assert torch.equal(codec.decode(latents), direct.decode(latents).sample)
    assert tuple(latents.shape[1:]) == codec.latent_shape(9, 32, 48) == (8, 3, 2, 3)
    assert codec.decode(latents).shape == video.shape


def test_wan_vae_wants_4n_plus_1_frames(wan_directory: Path) -> None:
    codec = build_codec({"name": "wan_vae", "path": str(wan_directory / "vae"), "subfolder": None})
    codec.check_size(81, 16, 16, "num_frames")
    with pytest.raises(ConfigError, match=r"num_frames 80 .*nearest legal: 77 and 81"):
        codec.check_size(80, 16, 16, "num_frames")
    with pytest.raises(ConfigError, match="nearest legal: 1"):
        codec.check_size(0, 16, 16, "num_frames")


def test_hashed_words(seeded: torch.Generator) -> None:
    encoder = build_text_encoder({"name": "hashed", "dim": 32, "max_length": 5})
    captions = ["a three moving", "A THREE, moving!", "", "one two three four five six"]
    embeds, mask = encoder.encode(captions)
    assert embeds.shape == (4, 5, 32)
    assert mask.sum(1).tolist() == [4, 4, 1, 5]
    assert torch.equal(embeds[0], embeds[1])
    assert not embeds[~mask].any()
    assert torch.equal(embeds[2, 0], embeds[0, 3])  # the end mark
    assert torch.equal(embeds[3, 2], embeds[0, 1])  # "three", wherever it stands
    again = build_text_encoder(json.loads(json.dumps(encoder.spec())))
    assert torch.equal(again.encode(captions[::-1])[0].flip(0), embeds)
    words = build_text_encoder({"name": "hashed", "dim": 4096, "max_length": 3})
    a, b = words.encode(["left", "right"])[0][:, 0]
    assert abs(torch.dot(a, b)) / 4096 < 0.1  # unlike words are all but orthogonal
    assert a.std() == pytest.approx(1, abs=0.1)


def test_umt5_is_the_real_class(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "&", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    config = UMT5Config(
        vocab_size=7, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.1
    )
    model = UMT5EncoderModel(config).eval()
    model.save_pretrained(tmp_path / "text_encoder")

    encoder = build_text_encoder({"name": "umt5", "path": str(tmp_path), "max_length": 12})
    embeds, mask = encoder.encode(["a  cat &amp;amp; dog\n", ""])
    assert embeds.shape == (2, 12, 16)
    assert mask.sum(1).tolist() == [5, 1]
    with torch.no_grad():  # each caption alone, without any padding
        for row, ids in enumerate([[3, 4, 5, 6, 1], [1]]):
            states = model(torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(embeds[row, : len(ids)], states, rtol=1e-5, atol=1e-5)
            assert not embeds[row, len(ids) :].any()
    again = build_text_encoder(json.loads(json.dumps(encoder.spec())))
    assert torch.equal(again.encode(["a cat"])[0], encoder.encode(["a cat"])[0])
    with pytest.raises(DataError, match=r"no 'text_encoder' folder.*'tokenizer'"):
        (tmp_path / "text_encoder").rename(tmp_path / "elsewhere")
        build_text_encoder({"name": "umt5", "path": str(tmp_path)})


def test_captions_are_cleaned_as_wan_does() -> None:
    assert clean(" a &quot;b&quot;  &amp;lt; c\t\n") == 'a "b" < c'


def test_clip_vision_is_the_real_class(tmp_path: Path, seeded: torch.Generator) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    model = CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path / "image_encoder")
    vision = ClipVision(ClipVisionOptions(path=str(tmp_path)))
    image = torch.rand(2, 3, 28, 28, generator=seeded) * 2 - 1  # of the tower's own size
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        pixels = ((image + 1) / 2 - mean) / std
        expected = model(pixel_values=pixels, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(vision.encode(image), expected, rtol=1e-5, atol=1e-5)
    assert vision.encode(torch.rand(1, 3, 40, 64, generator=seeded)).shape == (1, 5, 16)
