"""The plan's bytes against those of steps that are made: what stays, and the highest moment."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megagen import settings
from megagen.builder import build_plugins, build_run
from megagen.checks import check
from megagen.config.load import load_run_config
from megagen.config.schema import RunConfig
from megagen.data.batch import Batch
from megagen.engine.optimizer import StepInfo
from megagen.models.base import Passes
from megagen.parallel.launch import run_ranks
from megagen.plan.estimate import Memory, memory
from megagen.plan.peak import Peak, heads_memory, peak
from megagen.plan.report import role_load
from tests.trainer.synthetic import TEXT_SHAPE, config_tree, write_config, write_dataset

SHAPE = (4, 4, 16, 16)  # 256 tokens, enough for a step to hold more than its loss does
NUM_BATCHES = 3
DMD2 = {"_target_": "dmd2", "rollout_mode": "data_latent", "dmd_denoising_steps": [1000, 500]}
GAN = {
    "gan_loss_weight_gen": 0.5,
    "gan_r1_reg_weight": 1.0,
    "discriminator": {"feature_indices": [2, 5], "width": 128},
}
FORCING = {"_target_": "self_forcing", "dmd_denoising_steps": [1000, 500]}
CAUSAL = {"_target_": "wan_causal", "num_frames_per_block": 1}
# method, training, keys of the student: and when the plan expects the highest moment
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "replay": (DMD2, {}, {}, "learns"),
    "replay_selective": (DMD2, {"recompute": "selective"}, {}, "learns"),
    "hold": (DMD2, {"score_schedule": "hold"}, {}, "while others score student"),
    "hold_full": (
        DMD2,
        {"score_schedule": "hold", "recompute": "full"},
        {},
        "while student learns",
    ),
    "gan_hold_full": (
        {**DMD2, **GAN},
        {"score_schedule": "hold", "recompute": "full"},
        {},
        "while others score student",
    ),
    "lora_on_one_base": (
        DMD2,
        {"score_schedule": "hold"},
        {"lora": {"rank": 8, "share_base": True}},
        "while others score student",
    ),
    "self_forcing_longer": (
        {**FORCING, "num_training_frames": 7, "micro_batches_at_once": 2},
        {"recompute": "full"},
        CAUSAL,
        "while student learns",
    ),
}


class Held(TorchDispatchMode):
    """The most bytes that results of operations hold at once; storages of ``given`` do not count.

    What an operation frees (``untyped_storage().resize_(0)``) is not held.
    """

    def __init__(self, given: Iterator[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._given = {storage_of(tensor) for tensor in given}
        self._users: Counter[int] = Counter()
        self._alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # a user, bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in self._given:
                self._add(tensor)
        if self._now > self.peak:
            self._look_for_freed()
            self.peak = max(self.peak, self._now)
        return out

    def _add(self, tensor: Tensor) -> None:
        key = storage_of(tensor)
        self._users[key] += 1
        self._set(key, tensor)
        weakref.finalize(tensor, self._drop, key)

    def _set(self, key: int, tensor: Tensor) -> None:
        _, before = self._alive.get(key, (None, 0))
        size = tensor.untyped_storage().nbytes()
        self._alive[key] = weakref.ref(tensor), size
        self._now += size - before

    def _drop(self, key: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._now -= self._alive.pop(key)[1]

    def _look_for_freed(self) -> None:
        for key, (user, _) in list(self._alive.items()):
            tensor = user()
            if tensor is not None:
                self._set(key, tensor)


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def config_of(folder: Path, method: dict[str, Any], training: dict[str, Any], student: Any) -> Any:
    tree = config_tree(folder / "data", folder / "run", **training)
    first = tree["models"]["student"]
    first["architecture"] |= {"num_layers": 6, "attention_head_dim": 32, "ffn_dim": 512}
    teacher = {**first, "trainable": False}
    critic = dict(first)
    if "lora" in student:
        teacher["lora"], critic["lora"] = {"share_base": True}, student["lora"]
    tree["models"] = {"student": {**first, **student}, "teacher": teacher, "critic": critic}
    tree["method"] = method
    tree["training"]["data"] |= {"micro_batch_size": 1, "global_batch_size": NUM_BATCHES}
    return load_run_config(write_config(folder / "run.yaml", tree))


def planned(config: RunConfig) -> tuple[dict[str, Memory], Peak]:
    plugins, asked = build_plugins(config), settings.passes(config)
    check(config, plugins, 1)
    loads = {
        name: role_load(config, name, plugin, 1, SHAPE, asked.get(name, Passes()))
        for name, plugin in plugins.items()
    }
    used = {name: memory(plugin, loads[name]) for name, plugin in plugins.items()}
    heads = settings.heads_load(config, plugins)
    judge = heads and heads_memory(heads, plugins[heads.source], loads[heads.source])
    return used, peak(used, heads, judge)


def batches(step: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    found = []
    for number in range(NUM_BATCHES):
        text = torch.randn(1, *TEXT_SHAPE, generator=generator)
        latents = torch.randn(1, *SHAPE, generator=generator)
        place, name = (step * NUM_BATCHES + number,), (str(number),)
        found.append(Batch(latents, {"text_embeds_BLD": text}, place, name, name, SHAPE))
    return found


def measure(config: RunConfig) -> tuple[int, int]:
    """In a rank: bytes that stay after a step, and the most that the next one adds."""
    method = (run := build_run(config, build_plugins(config))).method
    run.loader.close()
    method.train_step(batches(0), 0)
    stays = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state(method)}
    nothing = StepInfo(0.0, 0.0, skipped=False)
    for mover in (*method.roles.values(), *method.heads.values()):  # updates are not the question
        mover.step = lambda: nothing  # type: ignore[method-assign]
    gc.collect()
    with Held(state(method)) as held:
        method.train_step(batches(1), 1)
    return sum(stays.values()), held.peak


def state(method: Any) -> Iterator[Tensor]:
    """Weights, gradients, moments and averages of all that is trained."""
    for role in method.roles.values():
        for chunk in role.chunks:
            for parameter in chunk.parameters():
                yield parameter
                if parameter.requires_grad:
                    yield parameter.main_grad
        if role.optimizer is not None:
            for part in role.optimizer._parts():
                yield from tensors_in(part.optimizer.state)
        if role.ema is not None:
            yield from role.ema._shards
    for head in method.heads.values():
        yield from head.module.parameters()
        yield from (p.grad for p in head.module.parameters())
        yield from tensors_in(head._adam.state)


def tensors_in(state: Any) -> Iterator[Tensor]:
    for moments in state.values():
        yield from (t for t in moments.values() if isinstance(t, Tensor) and t.numel() > 1)


@pytest.mark.parametrize("case", CASES)
def test_a_steps_bytes_are_those_of_the_plan(case: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", NUM_BATCHES)
    *keys, when = CASES[case]
    config = config_of(tmp_path, *keys)
    _, most = planned(config)
    ((stays, comes),) = run_ranks(1, measure, config, timeout=600)
    print(f"{case}: stay {stays / most.stays:.3f}, come {comes / most.comes:.3f} of the plan")
    assert most.when.endswith(when)
    assert stays == pytest.approx(most.stays, rel=0.02)
    assert comes == pytest.approx(most.comes, rel=0.15)
