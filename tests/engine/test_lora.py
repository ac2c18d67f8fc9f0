"""Adapters under every layout against diffusers' own network with PEFT's adapters."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from megatron.core import dist_checkpointing
from torch import Tensor

from megagen.checkpoint.diffusers import save_weights
from megagen.core.errors import ConfigError
from megagen.engine.settings import EMASettings
from megagen.models.adapters import AdapterSpec, is_adapter
from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
from tests import seeds
from tests.engine import cases
from tests.engine import lora_cases as lora

NUM_STEPS = 5
"""Of a curve; where gradients are compared one step is enough."""
TP2: dict[str, Any] = {"tp_size": 2}
SP: dict[str, Any] = {**TP2, "sequence_parallel": True}
PP2: dict[str, Any] = {"pp_size": 2}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
SPECS: dict[str, AdapterSpec] = {
    "default": lora.SPEC,
    "everywhere": lora.EVERYWHERE,
    "partly": lora.PARTLY,
    "first_stage": lora.FIRST_STAGE,
}
PLAIN = {"optimizer": lora.ADAMW}
LAYOUTS: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("default", 1, {}, PLAIN),
    ("default", 1, {}, {}),
    ("everywhere", 1, {}, {**PLAIN, **SELECTIVE}),
    ("default", 2, TP2, {**PLAIN, **FULL}),
    ("everywhere", 2, SP, PLAIN),
    ("everywhere", 2, {"cp_size": 2}, PLAIN),
    ("everywhere", 2, PP2, PLAIN),
    ("partly", 2, PP2, {**PLAIN, **FULL}),
    ("default", 2, {}, PLAIN),
    ("default", 2, SP, {}),
    ("default", 2, {"cp_size": 2}, {}),
    ("default", 2, {}, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ("everywhere", 2, {**PP2, "virtual_pp_size": 2}, {}),
    ("first_stage", 2, PP2, FULL),
    ("partly", 4, {**SP, **PP2}, PLAIN),
    ("everywhere", 4, {**SP, "cp_size": 2}, PLAIN),
]


@functools.cache
def weights() -> cases.Weights:
    return cases.random_weights(seeds.SHARED)


@functools.cache
def reference(name: str, is_plain: bool) -> tuple[cases.Weights, dict[str, Any]]:
    """Fresh adapters, and what becomes of them with PEFT."""
    adapters = lora.random_adapters(SPECS[name], seeds.SHARED + 1)
    settings, steps = (lora.ADAMW, 1) if is_plain else (cases.ADAMW, NUM_STEPS)
    return adapters, lora.peft_curve(weights(), adapters, SPECS[name], steps, settings)


@pytest.mark.parametrize(("name", "num_ranks", "layout", "settings"), LAYOUTS)
def test_updates_equal_peft(
    name: str, num_ranks: int, layout: dict[str, Any], settings: dict[str, Any]
) -> None:
    adapters, expected = reference(name, "optimizer" in settings)
    steps = len(expected["curve"]) // 2
    results = run_ranks(
        num_ranks,
        lora.run,
        *(weights(), adapters, SPECS[name], ParallelDims(**layout), steps, settings),
    )
    for found in results:
        cases.close(found["curve"], expected["curve"])
        for number, prediction in enumerate(found["predictions"], start=found["part"]):
            assert cases.relative(prediction, expected["predictions"][number]) < 1e-5
    if results[0]["gradients"] is not None:
        gradients = cases.merge([found["gradients"] for found in results])
        assert cases.worst_gradient(gradients, expected["gradients"]) < 1e-5
    final = cases.merge([found["adapters"] for found in results])
    assert cases.worst(final, expected["adapters"]) < 1e-4


# -- one base for several roles -----------------------------------------------------------------
DIFFERENT = (ParallelDims(**SP), ParallelDims(**TP2), ParallelDims(**TP2))
SHARED = {
    "tp2_with_and_without_sp": (2, DIFFERENT),
    "pp2": (2, (ParallelDims(**PP2),) * 3),
}


def share_run(
    weights: cases.Weights, adapters: list[cases.Weights], dims: tuple[ParallelDims, ...]
) -> dict[str, Any]:
    """In a rank: student and critic trained in turn, a teacher without adapters beside."""
    own_settings: dict[str, Any] = {"data": dims[0], "optimizer": lora.ADAMW}
    student = lora.make_role(weights, adapters[0], lora.SPEC, dims[0], **own_settings)
    nothing: cases.Weights = {}
    critic = lora.make_role(
        nothing, adapters[1], lora.PARTLY, dims[1], name="critic", base=student, **own_settings
    )
    teacher = lora.make_role(
        nothing, {}, None, dims[2], name="teacher", base=student, data=dims[0], trainable=False
    )
    found: dict[str, Any] = {"curve": []}
    for step in range(2):
        found["curve"] += [cases.update(role, step, student.mesh) for role in (student, critic)]
    own = cases.own_part(cases.make_requests(0), student.mesh)
    found["teacher"] = teacher.predict(own)
    found["adapters"] = [lora.whole(role, lambda p: p) for role in (student, critic)]
    roles = (student, critic, teacher)
    bases = [_base_addresses(role) for role in roles]
    assert bases[0] == bases[1] == bases[2]
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for role in roles
        for chunk in role.chunks
        for p in chunk.parameters()
    }
    base = sum(p.numel() * 4 for c in student.chunks for p in c.parameters() if not p.requires_grad)
    trained = sum(
        p.numel() * 4 for r in roles for c in r.chunks for p in c.parameters() if p.requires_grad
    )
    found["bytes"] = (sum(storages.values()), base + trained)
    return found


def _base_addresses(role: Any) -> dict[str, int]:
    named = [item for chunk in role.chunks for item in chunk.named_parameters()]
    return {name: p.data_ptr() for name, p in named if ".lora." not in name}


@functools.cache
def shared_reference() -> tuple[list[cases.Weights], dict[str, Any]]:
    specs = (lora.SPEC, lora.PARTLY)
    adapters = [lora.random_adapters(spec, seeds.SHARED + i) for i, spec in enumerate(specs, 1)]
    runs = [
        lora.peft_curve(weights(), given, spec, 2, lora.ADAMW)
        for given, spec in zip(adapters, specs, strict=True)
    ]
    plain = cases.PlainModel(weights())
    teacher = [plain(request).detach() for request in cases.make_requests(0)]
    return adapters, {"runs": runs, "teacher": teacher}


@pytest.mark.parametrize("name", SHARED)
def test_roles_share_one_base_and_train_apart(name: str) -> None:
    num_ranks, dims = SHARED[name]
    adapters, expected = shared_reference()
    results = run_ranks(num_ranks, share_run, weights(), adapters, dims)
    for found in results:
        for number in range(2):
            curve = [x for point in found["curve"][number::2] for x in point]
            cases.close(curve, expected["runs"][number]["curve"])
        for prediction, other in zip(found["teacher"], expected["teacher"], strict=True):
            assert cases.relative(prediction, other) < 1e-5
        held, needed = found["bytes"]
        assert held == needed
    for number in range(2):
        final = cases.merge([found["adapters"][number] for found in results])
        assert cases.worst(final, expected["runs"][number]["adapters"]) < 1e-4


def other_layout_is_refused(weights: cases.Weights, adapters: cases.Weights) -> str:
    student = lora.make_role(weights, adapters, lora.SPEC, ParallelDims())
    with pytest.raises(ConfigError) as error:
        lora.make_role({}, adapters, lora.SPEC, ParallelDims(**TP2), name="critic", base=student)
    return str(error.value)


def test_another_cut_cannot_share() -> None:
    given = lora.random_adapters(lora.SPEC, 0)
    for message in run_ranks(2, other_layout_is_refused, weights(), given):
        assert message.startswith("models.critic.lora.share_base: the base that is shared has")


# -- passes beside the training pass ------------------------------------------------------------
def gradient_run(
    weights: cases.Weights, adapters: cases.Weights, dims: ParallelDims, schedule: str
) -> dict[str, Any]:
    """In a rank: gradients of the latents, and of adapters by a loss on the own prediction."""
    settings: dict[str, Any] = {"optimizer": lora.ADAMW, "score_schedule": schedule}
    role = lora.make_role(weights, adapters, lora.SPEC, dims, **settings, **FULL)
    own = cases.own_part(cases.make_requests(0), role.mesh)
    latents = role.input_gradient(own, cases.squared_error)
    assert all(
        p.requires_grad == (".lora." in n) for c in role.chunks for n, p in c.named_parameters()
    )
    role.zero_grad()
    role.forward_score_backward(own, lambda found: [v.sin() for v in found], _to_target)
    role.step()
    return {"latents": latents, "gradients": lora.whole(role, lambda p: p.main_grad)}


def _to_target(velocity: Tensor, request: Request, target: Tensor) -> dict[str, Tensor]:
    return {"loss": (velocity - target).square().mean()}


@pytest.mark.parametrize(("layout", "schedule"), [(SP, "replay"), (PP2, "hold")], ids=str)
def test_input_gradients_and_scores(layout: dict[str, Any], schedule: str) -> None:
    adapters = lora.random_adapters(lora.SPEC, 5)
    model = lora.PeftModel(weights(), adapters, lora.SPEC)
    requests = cases.make_requests(0)
    expected = []
    for request in requests:
        leaf = request.latents_BCTHW.clone().requires_grad_()
        velocity = model(request.with_(latents_BCTHW=leaf))
        loss = cases.squared_error(velocity, request)["loss"]
        expected.append(torch.autograd.grad(loss, leaf)[0])
    model.optimizer.zero_grad()
    for request in requests:
        velocity = model(request)
        loss = _to_target(velocity, request, velocity.detach().sin())["loss"]
        (loss / len(requests)).backward()
    results = run_ranks(2, gradient_run, weights(), adapters, ParallelDims(**layout), schedule)
    for found in results:
        for gradient, other in zip(found["latents"], expected, strict=True):
            assert cases.relative(gradient, other) < 1e-5
    gradients = cases.merge([found["gradients"] for found in results])
    assert cases.worst_gradient(gradients, model.gradients()) < 1e-5


# -- state --------------------------------------------------------------------------------------
STATE: dict[str, Any] = {"ema": EMASettings(0.7)}


def train_and_save(
    weights: cases.Weights, adapters: cases.Weights, dims: ParallelDims, directory: Path
) -> Any:
    role = lora.make_role(weights, adapters, lora.EVERYWHERE, dims, **STATE)
    points = [cases.update(role, step) for step in range(2)]
    state = role.sharded_state()
    assert all(is_adapter(key) for chunk in state["model"].values() for key in chunk)
    dist_checkpointing.save({"student": state}, str(directory))
    return points


def load_and_train(
    weights: cases.Weights, adapters: cases.Weights, dims: ParallelDims, directory: Path
) -> Any:
    role = lora.make_role(weights, adapters, lora.EVERYWHERE, dims, **STATE)
    wanted = {"student": role.sharded_state(is_loading=True)}
    role.load_state(dist_checkpointing.load(wanted, str(directory))["student"])
    points = [cases.update(role, step) for step in range(2, 4)]
    assert role.ema is not None
    with role.ema.swapped():
        return points, lora.whole(role, lambda p: p)


def uninterrupted(weights: cases.Weights, adapters: cases.Weights) -> Any:
    role = lora.make_role(weights, adapters, lora.EVERYWHERE, ParallelDims(), **STATE)
    points = [cases.update(role, step) for step in range(4)]
    assert role.ema is not None
    with role.ema.swapped():
        return points, lora.whole(role, lambda p: p)


@functools.cache
def uninterrupted_once() -> tuple[cases.Weights, Any]:
    adapters = lora.random_adapters(lora.EVERYWHERE, seeds.SHARED + 1)
    return adapters, run_ranks(1, uninterrupted, weights(), adapters)[0]


@pytest.mark.parametrize(("saved", "loaded"), [({}, {}), (PP2, TP2)], ids=str)
def test_resume(tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
    adapters, (points, average) = uninterrupted_once()
    others = lora.random_adapters(lora.EVERYWHERE, 1)  # what is not loaded would show
    dims = [ParallelDims(**layout) for layout in (saved, loaded)]
    folder = tmp_path / "state"
    folder.mkdir()
    ranks = [d.model_parallel_size for d in dims]
    first = run_ranks(ranks[0], train_and_save, weights(), adapters, dims[0], folder)
    second = run_ranks(ranks[1], load_and_train, weights(), others, dims[1], folder)
    for found, expected in zip(first[0] + second[0][0], points, strict=True):
        cases.close(found, expected)
    final = cases.merge([part for _, part in second])
    assert cases.worst(final, average) < 1e-4
    if saved == loaded:
        assert first[0] + second[0][0] == points
        assert cases.worst(final, average) == 0


# -- weights written while it runs --------------------------------------------------------------
def write(
    weights: cases.Weights, adapters: cases.Weights, dims: ParallelDims, directory: Path
) -> None:
    role = lora.make_role(weights, adapters, lora.EVERYWHERE, dims, trainable=False)
    save_weights(role.plugin, role.chunks, role.mesh, directory)


@pytest.mark.parametrize("layout", [{}, {**SP, **PP2}], ids=str)
def test_a_role_is_written_with_its_adapters_merged(tmp_path: Path, layout: dict[str, Any]) -> None:
    adapters = lora.random_adapters(lora.EVERYWHERE, 2)
    dims = ParallelDims(**layout)
    run_ranks(dims.model_parallel_size, write, weights(), adapters, dims, tmp_path / "out")
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    expected = lora.PeftModel(weights(), adapters, lora.EVERYWHERE)
    request = cases.make_requests(0, 1)[0]
    text = request.condition["text_embeds_BLD"]
    found = merged(request.latents_BCTHW, request.timestep, text, return_dict=False)[0]
    assert cases.relative(found, expected(request)) < 1e-5
