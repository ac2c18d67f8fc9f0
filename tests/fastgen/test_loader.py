"""Recipes and files: what is found where, beside the published loader, and what is in a recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagen.fastgen import loader
from megagen.fastgen.config import DMDConfig, ExtendedDMDConfig
from megagen.fastgen.loader import load_config, load_dmd_config

RECIPES = ("dmd2_wan21_1.3b", "dmd2_wan21_14b", "dmd2_wan22_5b", "dmd2_qwen_image")
LIBRARY = "general/distillation/"

FILES = {
    "plain.yaml": "guidance_scale: 2.0",
    "both.yml": "guidance_scale: 3.0",
    "both.yaml": "guidance_scale: 4.0",
    "dot.v1.yaml": "guidance_scale: 5.0",
    "folder/inner.yml": "guidance_scale: 6.0",
    "empty.yaml": "",
    "comment.yaml": "# nothing yet\n",
    "list.yaml": "- guidance_scale: 2.0",
    "scalar.yaml": "guidance_scale",
    "umlaut.yaml": "# groß\npred_type: x0",
    "upper.YAML": "guidance_scale: 7.0",
    "unknown.yaml": "guidance_scal: 2.0",
    "nested_unknown.yaml": "sample_t_cfg: {shft: 2.0}",
    "rejected.yaml": "student_sample_steps: 1.5",
    "number.yaml": "1: 2",
    "extended.yaml": "gan_loss_weight_gen: 0.1\nextensions: {divergence: kl}",
}

WHERE: list[tuple[Callable[[str], Any], str]] = [
    (str, "plain"),
    (str, "plain.yaml"),
    (str, "./plain"),
    (Path, "plain"),
    (str, "{here}/plain"),
    (str, "{here}/plain.yaml"),
    (Path, "{here}/plain"),
    (Path, "{here}/plain.yaml"),
    (str, "plain.yml"),
    (str, "both"),
    (Path, "both"),
    (str, "both.yaml"),
    (str, "dot.v1"),
    (Path, "{here}/dot.v1"),
    (str, "folder/inner"),
    (str, "folder"),
    (str, "empty"),
    (str, "comment"),
    (str, "list"),
    (str, "scalar"),
    (str, "umlaut"),
    (str, "upper.YAML"),
    (str, "missing"),
    (Path, "{here}/missing.yaml"),
    (str, "general/distillation/missing"),
    (str, "general/distillation/dmd2_qwen_image"),
    (str, "general/distillation/dmd2_qwen_image.yaml"),
    (str, "general/distillation/dmd2_qwen_image.yml"),
    (Path, "general/distillation/dmd2_qwen_image"),
    (Path, "{here}/general/distillation/dmd2_qwen_image"),
    (str, ""),
    (str.encode, "plain"),
    (list, "plain"),
    (len, "plain"),
]
"""How a path is given, and the path, ``{here}`` being the working directory."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def outcome(load: Callable[[Any], Any], what: Any) -> Any:
    try:
        found = load(what)
        return found if isinstance(found, dict) else found.model_dump_json()
    except (OSError, TypeError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize(("kind", "path"), WHERE)
def test_files_are_found_as_published(
    published: Any, kind: Callable[[str], Any], path: str, folder: Path
) -> None:
    what = kind(path.format(here=folder))
    if "qwen" not in path:  # our text of that recipe leaves defaults out
        assert outcome(load_config, what) == outcome(published.load_config, what)
    assert outcome(load_dmd_config, what) == outcome(published.load_dmd_config, what)


@pytest.mark.parametrize("name", ["unknown", "nested_unknown", "rejected", "number", "extended"])
def test_contents_are_rejected_as_published(published: Any, name: str, folder: Path) -> None:
    with pytest.raises(ValueError):
        load_dmd_config(name)
    with pytest.raises((ValueError, TypeError)):
        published.load_dmd_config(name)


def test_unknown_keys_are_answered_with_a_suggestion(folder: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'guidance_scale'"):
        load_dmd_config("unknown")
    with pytest.raises(ValueError, match="did you mean 'shift'"):
        DMDConfig.from_yaml("nested_unknown")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_found_by_all_their_names(published: Any, name: str, folder: Path) -> None:
    config = load_dmd_config(name)
    for prefix in ("", LIBRARY):
        for suffix in ("", ".yaml"):
            assert load_dmd_config(prefix + name + suffix) == config
            assert DMDConfig.from_yaml(Path(prefix + name + suffix)) == config
    theirs = published.DMDConfig(**load_config(name))
    assert theirs.model_dump_json() == config.model_dump_json()


def test_qwen_image_recipe_is_the_published_one(published: Any) -> None:
    theirs = published.load_dmd_config(LIBRARY + "dmd2_qwen_image")
    assert load_dmd_config("dmd2_qwen_image").model_dump_json() == theirs.model_dump_json()


def test_wan22_recipe_is_the_documented_one() -> None:
    documented = DMDConfig(
        pred_type="flow",
        num_train_timesteps=1000,
        guidance_scale=5.0,
        student_sample_steps=2,
        student_sample_type="ode",
        student_update_freq=5,
        fake_score_pred_type="x0",
        gan_loss_weight_gen=0.03,
        gan_use_same_t_noise=True,
        sample_t_cfg={
            "time_dist_type": "shifted",
            "shift": 5.0,
            "min_t": 0.001,
            "max_t": 0.999,
            "t_list": [0.999, 0.833, 0.0],
        },
        ema={"decay": 0.9999},
    )
    assert load_dmd_config(LIBRARY + "dmd2_wan22_5b") == documented


def test_built_in_recipes_come_first(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "dmd2_wan22_5b.yaml").write_text("guidance_scale: 9.0")
    with caplog.at_level(logging.WARNING, logger="megagen.fastgen.loader"):
        assert load_dmd_config("dmd2_wan22_5b").guidance_scale == 5.0
    assert "dmd2_wan22_5b.yaml" in caplog.text
    for own in ("./dmd2_wan22_5b", folder / "dmd2_wan22_5b", str(folder / "dmd2_wan22_5b.yaml")):
        assert load_dmd_config(own).guidance_scale == 9.0


def test_a_misspelt_recipe_is_answered_with_a_suggestion(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'dmd2_wan22_5b'"):
        load_config(LIBRARY + "dmd2_wan22")
    with pytest.raises(FileNotFoundError, match="recipes: dmd2_qwen_image, dmd2_wan21"):
        load_config("xyzzy")


def test_a_class_reads_its_own_keys(folder: Path) -> None:
    for config in (
        load_dmd_config("extended", ExtendedDMDConfig),
        ExtendedDMDConfig.from_yaml("extended"),
    ):
        assert type(config) is ExtendedDMDConfig and config.extensions.divergence == "kl"
    assert type(ExtendedDMDConfig.from_yaml("dmd2_qwen_image")) is ExtendedDMDConfig


def test_a_built_package_carries_its_recipes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "mine.yaml").write_text("guidance_scale: 9.0")
    monkeypatch.setattr(loader, "files", lambda package: folder)
    assert load_config(LIBRARY + "mine") == {"guidance_scale": 9.0}
    with pytest.raises(FileNotFoundError):
        load_config("dmd2_qwen_image")
