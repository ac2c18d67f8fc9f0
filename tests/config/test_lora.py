"""``models.<role>.lora`` in a config: what is accepted, what is refused and with which words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from megagen import builder, lora
from megagen.cli.main import main
from megagen.config.load import load_run_config
from megagen.config.schema import RunConfig
from megagen.core.errors import ConfigError, MegagenError
from megagen.plan.report import describe
from tests.trainer.synthetic import config_tree, write_config

RECIPES = Path(__file__).parents[2] / "configs" / "wan"
SHARED: dict[str, Any] = {"rank": 4, "share_base": True}


def load(folder: Path, models: dict[str, dict[str, Any]]) -> RunConfig:
    """A config whose roles differ from the tiny Wan by the keys given."""
    tree = config_tree(folder / "data", folder / "run")
    student = tree["models"]["student"]
    tree["models"] = {name: {**copy.deepcopy(student), **keys} for name, keys in models.items()}
    return load_run_config(write_config(folder / "run.yaml", tree), {})


def check(folder: Path, models: dict[str, dict[str, Any]]) -> RunConfig:
    config = load(folder, models)
    lora.check(config, builder.build_plugins(config))
    return config


def test_the_peers_keys(tmp_path: Path) -> None:
    keys = {
        "enable": True,
        "rank": 16,
        "exclude_lora_layers": ["ffn"],
        "target_modules": ["ffn", "to_q"],
    }
    config = load(tmp_path, {"student": {"lora": keys}})
    spec = lora.adapter_spec(config, "student")
    assert spec is not None
    assert (spec.rank, spec.alpha, spec.scale) == (16, 16, 1.0)
    assert (spec.target_modules, spec.exclude_modules) == (("ffn", "to_q"), ("ffn",))
    off = load(tmp_path, {"student": {"lora": {**keys, "enable": False}}})
    assert lora.adapter_spec(off, "student") is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"alpha": 2.0}, "models.student.lora: found .* rank is required"),
        ({"rank": 0}, r"models\.student\.lora\.rank: found 0"),
        ({"rank": 4, "alpha": 0}, r"models\.student\.lora\.alpha: found 0"),
        ({"rank": 4, "target_module": ["to_q"]}, "unknown key; did you mean 'target_modules'"),
        ({"rank": 4, "target_modules": []}, "target_modules must name something"),
        ({"rank": 4, "target_modules": ["to_kk"]}, "did you mean 'to_k'"),
        ({"rank": 4, "exclude_modules": [], "exclude_lora_layers": []}, "are one key"),
        ({"rank": 4, "share_base": True}, "share_base: is true, but no other role"),
        ({"rank": 4, "init_from": "nowhere"}, "'nowhere' is no readable safetensors file"),
    ],
)
def test_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(MegagenError, match=said):
        check(tmp_path, {"student": {"lora": keys}})


def three_roles(**critic: Any) -> dict[str, dict[str, Any]]:
    return {
        "student": {"lora": SHARED},
        "teacher": {"lora": {"share_base": True}, "trainable": False},
        "critic": {"lora": SHARED, **critic},
    }


def test_sharing(tmp_path: Path) -> None:
    different = {"distributed": {"cp_size": 2}, "recompute": "full"}
    config = check(tmp_path, three_roles(**different))
    assert config.base_sharers() == ["student", "critic", "teacher"]
    assert lora.adapter_spec(config, "teacher") is None


@pytest.mark.parametrize(
    ("critic", "said"),
    [
        (
            {"distributed": {"tp_size": 2}},
            r"critic\.distributed\.tp_size: is 2, but 1 for 'student'",
        ),
        (
            {"distributed": {"pp_size": 2}},
            r"critic\.distributed\.pp_size: is 2, but 1 for 'student'",
        ),
        ({"precision": "bf16"}, r"models\.critic\.precision: is 'bf16', but 'fp32'"),
        ({"lora": {"share_base": True}}, r"models\.critic\.lora\.rank: required"),
    ],
)
def test_sharing_refused(tmp_path: Path, critic: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(tmp_path, three_roles(**critic))


def test_another_architecture_cannot_share(tmp_path: Path) -> None:
    models = three_roles()
    other = config_tree(tmp_path, tmp_path)["models"]["student"]["architecture"]
    models["critic"]["architecture"] = {**other, "ffn_dim": 32}
    with pytest.raises(
        ConfigError, match=r"models\.critic\.architecture: is not that of 'student'"
    ):
        check(tmp_path, models)


def test_the_plan_counts_what_is_trained_and_held(tmp_path: Path) -> None:
    config = load(tmp_path, three_roles())
    plugins = builder.build_plugins(config)
    text = describe(config, plugins, 1, (4, 2, 6, 4), 5, {})
    # 4 blocks x 8 projections x rank 4 x (48 + 48)
    assert "trained by 0.012 M parameters of LoRA\n" in text
    assert "frozen, on the base weights of student\n" in text
    assert "trained by 0.012 M parameters of LoRA, on the base weights of student\n" in text


@pytest.mark.parametrize(
    ("name", "roles", "said"),
    [
        ("sft_lora_t2v_1.3b", ["student"], "trained by 11.796 M parameters of LoRA"),
        ("dmd2_lora_t2v_14b", ["student", "teacher", "critic"], "weights 0.00, gradients 0.00"),
    ],
)
def test_recipes(name: str, roles: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Without the hub: the architecture is a preset's."""
    words = ["train", "--config", str(RECIPES / f"{name}.yaml"), "--dry-run", "--world-size", "8"]
    for role in roles:
        words += [f"--models.{role}.init_from", "none"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code
    assert said in capfd.readouterr().out
