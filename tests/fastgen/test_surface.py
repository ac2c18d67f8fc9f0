"""Every published name, with a signature that takes whatever the published one takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagen import fastgen
from tests.fastgen.networks import Case, assert_same, gradients, run

MODULES = [
    "",
    "config",
    "discriminators",
    "ema",
    "factory",
    "flow_matching",
    "loader",
    "losses",
    "methods",
    "methods.dmd",
    "pipeline",
    "plugins",
    "plugins.qwen_image",
    "utils",
]
HOOKS = ("_call_model", "_predict_x0", "_convert_pred")
"""What subclasses of the published pipelines override or call."""


def both(published: Any, name: str) -> tuple[Any, Any]:
    """Our module and the published one."""
    packages = (fastgen.__name__, published.__name__)
    ours, theirs = (importlib.import_module(f"{p}.{name}".rstrip(".")) for p in packages)
    return ours, theirs


def public(module: Any, package: str) -> dict[str, Any]:
    """What a module offers: ``__all__``, or its package's own things where it has none."""
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (getattr(value, "__module__", None) or getattr(value, "__name__", "")).startswith(
            package
        )
    }


def methods(kind: type, package: str) -> dict[str, Callable[..., Any]]:
    """Public methods of a class, and its hooks, that the package itself defines."""
    return {
        name: getattr(kind, name)
        for name in dir(kind)
        if (not name.startswith("_") or name in (*HOOKS, "__init__"))
        and inspect.isfunction(getattr(kind, name))
        and getattr(kind, name).__module__.startswith(package)
        and (kind.__name__, name) != ("Discriminator", "forward")  # is left to subclasses
    }


def assert_takes_as_much(name: str, ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    """Equal names, kinds, defaults and order; what only we have may be left out."""
    found = inspect.signature(ours).parameters
    wanted = inspect.signature(theirs).parameters
    for parameter in wanted.values():
        assert parameter.name in found, f"{name} has no {parameter}"
        own = found[parameter.name]
        assert (own.kind, own.default) == (parameter.kind, parameter.default), f"{name}: {own}"
    places = [
        [p.name for p in given.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for given in (found, wanted)
    ]
    assert places[0][: len(places[1])] == places[1], name
    for own in found.values():
        variadic = own.kind in (own.VAR_POSITIONAL, own.VAR_KEYWORD)
        assert own.name in wanted or variadic or own.default is not own.empty, f"{name}: {own}"


@pytest.mark.parametrize("name", MODULES)
def test_names_and_signatures(published: Any, name: str) -> None:
    ours, theirs = both(published, name)
    for item, value in public(theirs, published.__name__).items():
        assert hasattr(ours, item), f"{name}.{item}"
        own = getattr(ours, item)
        if inspect.ismodule(value):
            assert inspect.ismodule(own), item
            continue
        if hasattr(theirs, "__all__"):
            assert item in ours.__all__, f"{item} does not come with a star import"
        if inspect.isfunction(value):
            assert_takes_as_much(f"{name}.{item}", own, value)
        elif inspect.isclass(value):
            assert inspect.isclass(own), item
            for method, published_one in methods(value, published.__name__).items():
                mine = getattr(own, method)
                assert_takes_as_much(f"{name}.{item}.{method}", mine, published_one)


def overriding(library: Any) -> type:
    """A user's pipeline: its own call, times in half the range, an input of its own."""

    class Pipeline(library.DMDPipeline):
        def _call_model(
            self,
            model: nn.Module,
            hidden_states: Tensor,
            timestep: Tensor,
            encoder_hidden_states: Tensor | None = None,
            **model_kwargs: Any,
        ) -> Tensor:
            assert set(model_kwargs) == {"gain"}
            out = model(2 * hidden_states, 1 - timestep, encoder_hidden_states, **model_kwargs)
            return out["of its own kind"]

        def sample_timesteps(
            self, n: int, *, device: Any = None, dtype: torch.dtype = torch.float32
        ) -> Tensor:
            return 0.5 * super().sample_timesteps(n, device=device, dtype=dtype)

        def _build_student_input(
            self,
            latents: Tensor,
            noise: Tensor,
            encoder_hidden_states: Tensor | None = None,
            **model_kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            x_in, t = super()._build_student_input(
                latents, noise, encoder_hidden_states=encoder_hidden_states, **model_kwargs
            )
            self._call_model(self.student, x_in, t, encoder_hidden_states, **model_kwargs)
            return x_in / 3, t

    return Pipeline


@pytest.mark.parametrize("phase", ["student", "fake_score", "discriminator"])
def test_a_users_subclass_behaves_as_under_the_published_one(published: Any, phase: str) -> None:
    case = Case({"gan_loss_weight_gen": 0.2, "gan_r1_reg_weight": 5.0, "guidance_scale": 3.0})
    found = []
    for library in (fastgen, published):
        made = case.pipeline(library)
        for network in (made.student, made.teacher, made.fake_score):
            network.register_forward_hook(lambda _m, _i, out: {"of its own kind": out})
        pipeline = overriding(library)(
            made.student,
            made.teacher,
            made.fake_score,
            made.config,
            discriminator=made.discriminator,
        )
        given = {**case.data, "gain": 0.6}
        if phase != "student":
            given.pop("negative_encoder_hidden_states")
        found.append(run(pipeline, phase, 21, **given))
    assert_same(*found, 1e-6)


def test_the_published_config_is_one_of_ours(published: Any) -> None:
    """The pipeline reads fields by name, so a config from elsewhere will do."""
    case = Case({"guidance_scale": 2.0, "ema": {"decay": 0.5}})
    ours = case.pipeline(fastgen)
    config = published.DMDConfig(**case.config)
    other = fastgen.DMDPipeline(ours.student, ours.teacher, ours.fake_score, config)
    assert_same(run(other, "student", 4, **case.data), run(ours, "student", 4, **case.data), 0.0)
    other.update_ema()
    steps = {"student_sample_steps": 3, "sample_t_cfg": {"t_list": [0.9, 0.5, 0.0]}}
    with pytest.raises(ValueError, match="t_list"):
        fastgen.DMDPipeline(
            ours.student, ours.teacher, ours.fake_score, published.DMDConfig(**steps)
        )


@pytest.mark.parametrize("pred_type", ["x0", "flow"])
@pytest.mark.parametrize("gan", [0.0, 0.3])
def test_losses_under_autocast(published: Any, pred_type: str, gan: float) -> None:
    """torch's mean square is float32 there, and so are the published losses."""
    case = Case(
        {"pred_type": pred_type, "guidance_scale": 2.0, "gan_loss_weight_gen": gan},
        dtype=torch.float32,
    )
    for phase in ("student", "fake_score", "discriminator")[: 3 if gan else 2]:
        found = []
        for library in (fastgen, published):
            pipeline, given = case.pipeline(library), dict(case.data)
            if phase != "student":
                given.pop("negative_encoder_hidden_states")
            torch.manual_seed(9)
            with torch.autocast("cpu", torch.bfloat16):
                losses = getattr(pipeline, f"compute_{phase}_loss")(**given)
            losses["total"].backward()
            detached = {name: loss.detach() for name, loss in losses.items()}
            found.append((detached, gradients(pipeline)))
        assert_same(*found, 1e-2)  # of gradients; they are bf16 on their way
        assert_same(*(({**losses}, {}) for losses, _ in found), 1e-5)
