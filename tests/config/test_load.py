"""A config is checked before anything else happens: unknown keys, wrong values, contradictions."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megagen.config.load import (
    apply_overrides,
    load_run_config,
    parse_overrides,
    parse_scalar,
    to_yaml,
)
from megagen.core.errors import ConfigError


def minimal() -> dict[str, Any]:
    return {
        "models": {"student": {"_target_": "wan", "architecture": {"num_layers": 2}}},
        "method": {"_target_": "finetune"},
        "training": {
            "data": {"data_path": "somewhere"},
            "optimizer": {"learning_rate": 1e-3},
            "loop": {"max_train_steps": 5},
            "checkpoint": {"output_dir": "runs/x"},
        },
    }


def load(tmp_path: Path, tree: dict[str, Any], **overrides: Any):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return load_run_config(file, {k.replace("__", "."): v for k, v in overrides.items()})


def test_minimal_config_and_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        minimal(),
        training__distributed__tp_size=2,
        training__optimizer__betas="0.9,0.95",
        training__optimizer__min_lr_ratio=0,
    )
    assert config.training.distributed.tp_size == 2
    assert config.training.optimizer.betas == (0.9, 0.95)
    assert config.training.optimizer.min_lr_ratio == 0
    assert config.models["student"].model_options() == {"architecture": {"num_layers": 2}}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training.distributed.tp_sise", 2, "did you mean 'tp_size'"),
        ("training.loop.max_train_step", 2, "did you mean 'max_train_steps'"),
        ("trainin.seed", 1, "did you mean 'training'"),
        ("training.optimizer.learning_rate", 0, "training.optimizer.learning_rate: found 0"),
        ("training.precision", "fp16", "found 'fp16'"),
        ("pipeline.flow_shift", 0, "pipeline.flow_shift: found 0"),
        ("training.distributed.sequence_parallel", True, "tp_size > 1"),
        ("training.distributed.virtual_pp_size", 2, "pp_size > 1"),
        ("training.distributed.overlap_param_gather", True, "overlap_grad_reduce"),
        ("training.optimizer.lr_scheduler", "cosin", "found 'cosin'"),
        ("models.student.fp8", True, "transformer_engine"),
        ("models.student.recompute", "all", "found 'all'"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, key: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config_with(tmp_path, key, value)
    assert said in str(error.value)


def load_run_config_with(tmp_path: Path, key: str, value: Any):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(minimal()))
    return load_run_config(file, {key: value})


def test_missing_section_and_file(tmp_path: Path) -> None:
    tree = minimal()
    del tree["training"]["loop"]
    with pytest.raises(ConfigError, match=r"training\.loop: required"):
        load(tmp_path, tree)
    with pytest.raises(ConfigError, match="cannot read"):
        load_run_config(tmp_path / "no.yaml")


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match="'seed' stands twice"):
        load_run_config(file)


def test_overrides_on_the_command_line() -> None:
    got = parse_overrides(
        ["--a.b", "1", "--a.c=x", "--d.e", "[1, 2]", "--f.g", "1e-4", "--h.i=none"]
    )
    assert got == {"a.b": 1, "a.c": "x", "d.e": [1, 2], "f.g": 1e-4, "h.i": None}
    for bad in (["training.seed", "1"], ["--seed", "1"], ["--a.b"]):
        with pytest.raises(ConfigError):
            parse_overrides(bad)
    with pytest.raises(ConfigError, match="has no key"):
        apply_overrides({"a": {"b": 1}}, {"a.b.c": 2})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("0", 0),
        ("-1.5", -1.5),
        ("1E3", 1000.0),
        ("abc", "abc"),
        ("a: b: c", "a: b: c"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    assert parse_scalar(text) == value


def test_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = load(tmp_path, minimal(), callbacks__ema__decay=0.99)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_run_config(again) == config
