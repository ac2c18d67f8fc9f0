"""Configs beside the published ones: defaults, JSON, what is rejected, and as mappings.

Each table is run against both libraries, so that it shows where they differ.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megagen.fastgen import config as ours

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the 'model_fields'")  # the published

CLASSES = ("SampleTimestepConfig", "EMAConfig", "DistillationConfig", "DMDConfig")
SEVERAL = {"student_sample_steps": 2, "sample_t_cfg": {"t_list": [0.9, 0.4, 0.0]}}

REJECTED_BY_BOTH: list[tuple[str, dict[str, Any]]] = [
    ("SampleTimestepConfig", {"time_dist": "uniform"}),
    ("SampleTimestepConfig", {"time_dist_type": "cosine"}),
    ("SampleTimestepConfig", {"time_dist_type": None}),
    ("SampleTimestepConfig", {"min_t": -0.1}),
    ("SampleTimestepConfig", {"min_t": 0.5, "max_t": 0.5}),
    ("SampleTimestepConfig", {"min_t": 0.6, "max_t": 0.5}),
    ("SampleTimestepConfig", {"min_t": math.nan}),
    ("SampleTimestepConfig", {"max_t": "late"}),
    ("SampleTimestepConfig", {"shift": 0.99}),
    ("SampleTimestepConfig", {"shift": math.nan}),
    ("SampleTimestepConfig", {"p_mean": None}),
    ("SampleTimestepConfig", {"t_list": []}),
    ("SampleTimestepConfig", {"t_list": [0.0]}),
    ("SampleTimestepConfig", {"t_list": [0.9, 0.1]}),
    ("SampleTimestepConfig", {"t_list": 0.9}),
    ("SampleTimestepConfig", {"t_list": [0.9, None, 0.0]}),
    ("EMAConfig", {"type": "linear"}),
    ("EMAConfig", {"mode": "sharded"}),
    ("EMAConfig", {"dtype": "float64"}),
    ("EMAConfig", {"batch_size": 1.5}),
    ("EMAConfig", {"start_iter": None}),
    ("EMAConfig", {"fsdp2": "perhaps"}),
    ("EMAConfig", {"beta": 0.9}),
    ("DistillationConfig", {"pred_type": "velocity"}),
    ("DistillationConfig", {"student_sample_type": "ddim"}),
    ("DistillationConfig", {"sample_t_cfg": None}),
    ("DistillationConfig", {"sample_t_cfg": {"mint": 0.1}}),
    ("DistillationConfig", {"student_sample_steps": 2.5}),
    ("DistillationConfig", {"guidance_scale": "strong"}),
    ("DistillationConfig", {"gan_loss_weight_gen": 0.1}),
    ("DMDConfig", {"extensions": {}}),
    ("DMDConfig", {"fake_score_pred_type": "score"}),
    ("DMDConfig", {"ema": True}),
    ("DMDConfig", {"ema": {"decay": "slow"}}),
    ("DMDConfig", {"gan_r1_reg_weight": 100.0}),
    ("DMDConfig", {"gan_r1_reg_weight": 100.0, "gan_loss_weight_gen": 0.0}),
    ("DMDConfig", {"backward_simulation": True}),
    ("DMDConfig", {"backward_simulation": True, "student_sample_steps": 2}),
    ("DMDConfig", {"backward_simulation": True, "sample_t_cfg": {"t_list": [0.9, 0.0]}}),
]

REJECTED_BY_OURS: list[tuple[str, dict[str, Any]]] = [
    ("SampleTimestepConfig", {"max_t": 1.5}),
    ("SampleTimestepConfig", {"p_std": -1.0}),
    ("SampleTimestepConfig", {"p_mean": math.inf}),
    ("SampleTimestepConfig", {"shift": math.inf}),
    ("SampleTimestepConfig", {"t_list": [0.3, 0.6, 0.0]}),
    ("SampleTimestepConfig", {"t_list": [0.6, 0.6, 0.0]}),
    ("SampleTimestepConfig", {"t_list": [0.6, -0.1, 0.0]}),
    ("SampleTimestepConfig", {"t_list": [1.5, 0.0]}),
    ("SampleTimestepConfig", {"t_list": [math.nan, 0.0]}),
    ("EMAConfig", {"decay": 1.5}),
    ("EMAConfig", {"decay": -0.5}),
    ("EMAConfig", {"gamma": -2.0}),
    ("EMAConfig", {"halflife_kimg": -1.0}),
    ("EMAConfig", {"rampup_ratio": -0.1}),
    ("EMAConfig", {"batch_size": 0}),
    ("DistillationConfig", {"student_sample_steps": 0}),
    ("DistillationConfig", {"num_train_timesteps": 0}),
    ("DistillationConfig", {"guidance_scale": math.nan}),
    ("DistillationConfig", {**SEVERAL, "student_sample_steps": 3}),
    ("DistillationConfig", {**SEVERAL, "sample_t_cfg": {"t_list": [0.9, 0.0]}}),
    ("DMDConfig", {**SEVERAL, "student_sample_steps": 4, "backward_simulation": True}),
    ("DMDConfig", {"student_update_freq": 0}),
    ("DMDConfig", {"gan_loss_weight_gen": -1.0}),
    ("DMDConfig", {"gan_r1_reg_weight": -1.0}),
    ("DMDConfig", {"gan_r1_reg_alpha": -0.1}),
]
"""What the published classes take and no training can make sense of."""

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("SampleTimestepConfig", {"min_t": 0, "max_t": "0.5", "t_list": (1, 0)}),
    ("SampleTimestepConfig", {"p_std": 0.0, "t_list": [1.0, 0.999, 0.0]}),
    ("EMAConfig", {"start_iter": "3", "rampup_ratio": None, "dtype": None, "decay": 0}),
    ("DistillationConfig", {"sample_t_cfg": {"t_list": [0.9, 0.5, 0.1, 0.0]}}),
    ("DistillationConfig", {"student_sample_steps": 4}),
    ("DistillationConfig", {"guidance_scale": 0, "num_train_timesteps": 1000.0}),
    ("DMDConfig", {**SEVERAL, "backward_simulation": "yes", "ema": {}}),
    ("DMDConfig", {"gan_loss_weight_gen": 1, "gan_r1_reg_weight": 1e-3}),
]

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "read": lambda c: c["student_update_freq"],
    "read unknown": lambda c: c["nothing"],
    "write": lambda c: (c.__setitem__("student_update_freq", 7), c.student_update_freq),
    "write unknown": lambda c: c.__setitem__("nothing", 1),
    "write attribute unknown": lambda c: setattr(c, "nothing", 1),
    "write rejected": lambda c: c.__setitem__("pred_type", "score"),
    "delete": lambda c: c.__delitem__("ema"),
    "delete unknown": lambda c: c.__delitem__("nothing"),
    "get": lambda c: (c.get("guidance_scale", 3), c.get("nothing"), c.get("nothing", 3)),
    "contains": lambda c: ("ema" in c, "nothing" in c),
    "length": len,
    "iterate": list,
    "keys": lambda c: list(c.keys()),
    "values": lambda c: [v for v in c.values() if not isinstance(v, MutableMapping)],
    "items": lambda c: [i for i in c.items() if not isinstance(i[1], MutableMapping)],
    "spread": lambda c: list({**c}),
    "as dict": lambda c: list(dict(c)),
    "pop": lambda c: c.pop("ema"),
    "pop unknown": lambda c: c.pop("nothing"),
    "pop with default": lambda c: c.pop("nothing", 5),
    "popitem": lambda c: c.popitem(),
    "clear": lambda c: c.clear(),
    "setdefault": lambda c: c.setdefault("student_update_freq", 9),
    "setdefault unknown": lambda c: c.setdefault("nothing", 9),
    "update": lambda c: (c.update({"guidance_scale": 2, "ema": {}}), c.model_dump_json()),
    "update by keyword": lambda c: (c.update(config={"pred_type": "x0"}), c.pred_type),
    "update unknown": lambda c: c.update({"nothing": 1}),
    "update rejected": lambda c: c.update({"pred_type": "score"}),
    "assign nested": lambda c: (setattr(c, "ema", {"decay": 0.5}), c.ema.decay, len(c.ema)),
    "equal": lambda c: (c == c.model_copy(deep=True), c == type(c)(guidance_scale=2)),
    "field of a key": lambda c: c.get_field_name_from_key("ema"),
    "field of an unknown key": lambda c: c.get_field_name_from_key("nothing"),
    "is a mapping": lambda c: isinstance(c, MutableMapping),
    "repr": repr,
    "hash": hash,
}


def build(library: Any, name: str, fields: dict[str, Any]) -> Any:
    return getattr(library, name)(**copy.deepcopy(fields))


def identify(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_the_published_ones(published: Any, name: str) -> None:
    own, theirs = build(ours, name, {}), build(published, name, {})
    assert own.model_dump_json() == theirs.model_dump_json()
    assert own.model_dump() == theirs.model_dump()
    assert list(own) == list(theirs)


def random_fields(rng: random.Random) -> dict[str, Any]:
    """Of a ``DMDConfig`` with settings that make sense, each left out half of the time."""
    steps = rng.randint(1, 5)
    inner = sorted((rng.uniform(0.01, 1) for _ in range(steps)), reverse=True)
    weight = rng.choice([0.0, rng.uniform(0.001, 1)])
    sampling = {
        "time_dist_type": rng.choice(["uniform", "shifted", "lognormal", "polynomial"]),
        "min_t": rng.uniform(0, 0.4),
        "max_t": rng.uniform(0.5, 1),
        "shift": rng.uniform(1, 10),
        "p_mean": rng.gauss(0, 1),
        "p_std": rng.uniform(0.1, 3),
    }
    ema = {
        "decay": rng.random(),
        "type": rng.choice(["constant", "halflife", "power"]),
        "start_iter": rng.randint(0, 100),
        "gamma": rng.uniform(0, 20),
        "halflife_kimg": rng.uniform(0, 1000),
        "rampup_ratio": rng.choice([None, rng.random()]),
        "batch_size": rng.randint(1, 512),
        "fsdp2": rng.random() < 0.5,
        "mode": rng.choice(["full_tensor", "local_shard"]),
        "dtype": rng.choice([None, "float32", "bfloat16", "float16"]),
    }
    fields = {
        "pred_type": rng.choice(["x0", "eps", "v", "flow"]),
        "guidance_scale": rng.choice([None, rng.uniform(-1, 10)]),
        "student_sample_type": rng.choice(["sde", "ode"]),
        "num_train_timesteps": rng.choice([None, 1000]),
        "student_update_freq": rng.randint(1, 9),
        "fake_score_pred_type": rng.choice([None, "x0", "flow"]),
        "gan_use_same_t_noise": rng.random() < 0.5,
        "gan_r1_reg_alpha": rng.random(),
        "ema": rng.choice([None, some(ema, rng)]),
    }
    return {
        **some(fields, rng),
        "sample_t_cfg": {**some(sampling, rng), "t_list": [*inner, 0.0]},
        "student_sample_steps": steps,
        "backward_simulation": steps > 1 and rng.random() < 0.5,
        "gan_loss_weight_gen": weight,
        "gan_r1_reg_weight": rng.uniform(0, 500) if weight else 0.0,
    }


def some(fields: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if rng.random() < 0.5}


def test_random_configs_are_the_published_ones(published: Any, seeded: torch.Generator) -> None:
    rng = random.Random(seeded.initial_seed())
    for _ in range(200):
        fields = random_fields(rng)
        own, theirs = build(ours, "DMDConfig", fields), build(published, "DMDConfig", fields)
        assert own.model_dump_json() == theirs.model_dump_json()
        assert type(own).model_validate_json(own.model_dump_json()) == own
        assert type(own)(**own) == own


@pytest.mark.parametrize(("name", "fields"), ACCEPTED, ids=identify)
def test_accepted_by_both(published: Any, name: str, fields: dict[str, Any]) -> None:
    own, theirs = build(ours, name, fields), build(published, name, fields)
    assert own.model_dump_json() == theirs.model_dump_json()


@pytest.mark.parametrize(("name", "fields"), REJECTED_BY_BOTH, ids=identify)
def test_rejected_by_both(published: Any, name: str, fields: dict[str, Any]) -> None:
    for library in (ours, published):
        with pytest.raises(ValidationError):
            build(library, name, fields)


@pytest.mark.parametrize(("name", "fields"), REJECTED_BY_OURS, ids=identify)
def test_rejected_by_ours_alone(published: Any, name: str, fields: dict[str, Any]) -> None:
    build(published, name, fields)
    with pytest.raises(ValidationError):
        build(ours, name, fields)


def outcome(operation: Callable[[Any], Any], config: Any) -> Any:
    try:
        return operation(config)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_acts_as_the_published_mapping(published: Any, operation: str) -> None:
    own, theirs = (
        outcome(OPERATIONS[operation], library.DMDConfig(guidance_scale=4))
        for library in (ours, published)
    )
    assert own == theirs


@pytest.mark.parametrize(
    ("name", "fields"),
    [case for case in REJECTED_BY_BOTH + REJECTED_BY_OURS if len(case[1]) == 1],
    ids=identify,
)
def test_a_rejected_assignment_changes_nothing(name: str, fields: dict[str, Any]) -> None:
    config = build(ours, name, {})
    before, given = config.model_dump_json(), set(config.model_fields_set)
    ((key, value),) = fields.items()
    with pytest.raises(ValidationError):
        setattr(config, key, value)
    with pytest.raises((ValidationError, KeyError)):
        config.update({"student_update_freq": 2} if name == "DMDConfig" else {}, **fields)
    assert config.model_dump_json() == before and config.model_fields_set == given


def test_update_checks_all_keys_together() -> None:
    config = ours.DMDConfig(**SEVERAL)
    before, nested = config.model_dump_json(), config.sample_t_cfg
    with pytest.raises(ValidationError, match="of 5 times"):
        config.update({"guidance_scale": 3.0}, student_sample_steps=4)
    with pytest.raises(KeyError):
        config.update([("guidance_scale", 3.0), ("guidance", 4.0)])
    assert config.model_dump_json() == before
    config.update(backward_simulation=True, guidance_scale=3.0)
    assert config.sample_t_cfg is nested
    config.update({"student_sample_steps": 1, "backward_simulation": False})
    wider = {"t_list": [0.9, 0.6, 0.3, 0.0]}
    config.update(backward_simulation=True, sample_t_cfg=wider, student_sample_steps=3)
    assert config.sample_t_cfg.t_list == wider["t_list"] and config.guidance_scale == 3.0


@pytest.mark.parametrize("first", ["steps", "list", "nested list"])
def test_steps_and_schedule_may_be_assigned_in_any_order(first: str) -> None:
    config, t_list = ours.DMDConfig(**SEVERAL), [0.9, 0.6, 0.3, 0.0]
    assignments: dict[str, Callable[[], None]] = {
        "steps": lambda: setattr(config, "student_sample_steps", 3),
        "list": lambda: setattr(config, "sample_t_cfg", {"t_list": t_list}),
        "nested list": lambda: setattr(config.sample_t_cfg, "t_list", t_list),
    }
    assignments[first]()
    with pytest.raises(ValueError, match="found"):
        config.check_schedule()
    assignments["list" if first == "steps" else "steps"]()
    config.check_schedule()


@pytest.mark.parametrize("name", [*CLASSES, "DMDExtensions", "ExtendedDMDConfig"])
def test_travels_in_a_checkpoint(name: str) -> None:
    config = build(ours, name, {"ema": {}, **SEVERAL} if name.endswith("DMDConfig") else {})
    file = io.BytesIO()
    torch.save({"config": config}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["config"]
    assert type(loaded) is type(config) and loaded == config
    assert loaded.model_fields_set == config.model_fields_set


def test_nested_defaults_are_not_shared() -> None:
    config = ours.DMDConfig()
    config.sample_t_cfg.shift = 2.0
    assert ours.DMDConfig().sample_t_cfg.shift == 5.0


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"guidance_scal": 1.0}, "'guidance_scal', did you mean 'guidance_scale'"),
        ({"sample_t_cfg": {"mint": 0.1}}, "'mint', did you mean 'min_t'"),
        (
            {"ema": {"decai": 0.1, "xyzzy": 0}},
            "'decai', did you mean 'decay'?; unknown key 'xyzzy'",
        ),
    ],
    ids=identify,
)
def test_unknown_keys_are_answered_with_a_suggestion(fields: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ours.DMDConfig(**fields)
    assert hint in str(caught.value)


def test_extensions_leave_the_rest_as_published(published: Any) -> None:
    extended = json.loads(ours.ExtendedDMDConfig(**SEVERAL).model_dump_json())
    assert extended.pop("extensions") == ours.DMDExtensions().model_dump()
    assert extended == json.loads(published.DMDConfig(**SEVERAL).model_dump_json())


@pytest.mark.parametrize(
    ("weight", "extensions"),
    [
        (0.0, {"adversarial_only": True}),
        (0.0, {"divergence": "kl"}),
        (0.1, {"adversarial_only": True, "divergence": "kl"}),
        (0.1, {"divergence": "tv"}),
        (0.1, {"vsd_normalizer": "batch"}),
        (0.1, {"r1_at": "fake"}),
        (0.1, {"feature_source": "student"}),
        (0.1, {"guidance_rescale": 1.1}),
        (0.1, {"guidance_rescale": -0.1}),
        (0.1, {"guidance_interval": [0.5, 0.4]}),
        (0.1, {"guidance_interval": [0.5, 1.4]}),
        (0.1, {"guidance_interval": [0.5]}),
        (0.1, {"early_exits": True}),
    ],
    ids=identify,
)
def test_rejected_extensions(weight: float, extensions: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ours.ExtendedDMDConfig(gan_loss_weight_gen=weight, extensions=extensions)


def test_extensions_and_their_weight_hold_one_another() -> None:
    config = ours.ExtendedDMDConfig(
        gan_loss_weight_gen=0.1, extensions={"divergence": "js", "guidance_interval": [0, 1]}
    )
    with pytest.raises(ValidationError, match="divergence needs"):
        config.gan_loss_weight_gen = 0.0
    assert config.gan_loss_weight_gen == 0.1
    config.update(gan_loss_weight_gen=0.0, extensions={})
    assert config.extensions == ours.DMDExtensions()
