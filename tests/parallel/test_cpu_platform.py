"""The CPU adaptation: absent with CUDA, strict without, and torch itself untouched."""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
from collections.abc import Callable
from types import FunctionType
from typing import Any
from unittest import mock

import pytest
import torch

from megagen.parallel import cpu_platform, fused_adam
from megagen.parallel.launch import run_ranks
from megagen.parallel.ranks import _preload


def in_fresh_fork(check: Callable[[], None]) -> None:
    """Run ``check`` where nothing has been adapted yet, whatever ran before in this process."""
    _preload()
    process = multiprocessing.get_context("fork").Process(target=check)
    process.start()
    process.join()
    assert process.exitcode == 0


def module(name: str) -> Any:
    return importlib.import_module(f"megatron.core.{name}")


def enable_with_cuda() -> None:
    with mock.patch("torch.cuda.is_available", return_value=True):
        before = {name: vars(module(name)).copy() for name in cpu_platform.MODULES}
        pretended = [look_up(*entry) for entry in cpu_platform.PRETEND]
        assert cpu_platform.enable() is False
        for name, names in before.items():
            assert module(name).torch is torch
            assert vars(module(name)) == names
        for entry, function in zip(cpu_platform.PRETEND, pretended, strict=True):
            assert look_up(*entry) is function


def look_up(name: str, path: str) -> Any:
    found = module(name)
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    return found


def test_enable_changes_nothing_where_cuda_is_available() -> None:
    in_fresh_fork(enable_with_cuda)


def enable_without_cuda() -> None:
    tensor_type, tensor_cuda, current = torch.Tensor.type, torch.Tensor.cuda, torch.empty
    assert cpu_platform.enable() is True
    assert cpu_platform.enable() is True  # again
    stand_in = module("utils").torch
    assert all(module(name).torch is stand_in for name in cpu_platform.MODULES)
    assert torch.Tensor.type is tensor_type and torch.Tensor.cuda is tensor_cuda
    assert torch.empty is current
    assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()
    with pytest.raises(AttributeError):
        stand_in.cuda.no_such_name  # noqa: B018
    with pytest.raises((RuntimeError, AssertionError)):
        stand_in.cuda.get_device_properties(0)  # not among what was adapted
    assert stand_in.empty(2, device="cuda").device.type == "cpu"
    assert stand_in.nn is torch.nn


def test_torch_itself_stays_as_it_is() -> None:
    in_fresh_fork(enable_without_cuda)


def pretend_ends_with_the_call() -> None:
    cpu_platform.enable()

    def look(tensor: torch.Tensor) -> tuple[Any, Any]:
        if tensor.numel() == 0:
            raise ZeroDivisionError
        return tensor.type(), tensor.cuda()

    pretending = cpu_platform._pretending(look)
    tensor = torch.ones(2, dtype=torch.bfloat16)
    name, moved = pretending(tensor)
    assert name == "torch.cuda.BFloat16Tensor" and moved is tensor
    with pytest.raises(ZeroDivisionError):
        pretending(torch.ones(0))
    assert tensor.type() == "torch.BFloat16Tensor"
    assert tensor.type(torch.float32).dtype == torch.float32


def test_pretending_ends_with_the_call() -> None:
    in_fresh_fork(pretend_ends_with_the_call)


def untested_version() -> None:
    with (
        mock.patch("megatron.core.__version__", "0.17.0"),
        pytest.raises(RuntimeError, match=r"0\.17\.0"),
    ):
        cpu_platform.enable()


def test_an_untested_version_is_refused() -> None:
    in_fresh_fork(untested_version)


def vanished_name() -> None:
    with (
        mock.patch.object(cpu_platform, "PRETEND", (("optimizer.optimizer", "no_such_function"),)),
        pytest.raises(AttributeError, match="no_such_function"),
    ):
        cpu_platform.enable()


def test_a_vanished_name_raises() -> None:
    in_fresh_fork(vanished_name)


def test_the_file_stays_small() -> None:
    source = inspect.getsource(cpu_platform)
    code = [
        line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert len(code) <= 150


# -- FusedAdam -----------------------------------------------------------------------------------
@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_fused_adam_equals_torch(adam_w_mode: bool, seeded: torch.Generator) -> None:
    shapes = [(7, 5), (3,), (2, 2, 2)]
    start = [torch.randn(shape, generator=seeded) for shape in shapes]
    ours = [torch.nn.Parameter(x.clone()) for x in start]
    theirs = [torch.nn.Parameter(x.clone().double()) for x in start]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = fused_adam.FusedAdam(ours, adam_w_mode=adam_w_mode, **options)
    reference = (torch.optim.AdamW if adam_w_mode else torch.optim.Adam)(theirs, **options)
    for _ in range(6):
        for mine, other in zip(ours, theirs, strict=True):
            grad = torch.randn(mine.shape, generator=seeded)
            mine.grad, other.grad = grad, grad.double()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)
    assert optimizer.param_groups[0]["step"] == 6
    assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_fused_adam_leaves_parameters_without_gradient() -> None:
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = fused_adam.FusedAdam([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(used, torch.ones(3)) and torch.equal(unused, torch.ones(3))


def install_twice() -> None:
    assert fused_adam.install() and fused_adam.install()
    optimizer, distributed = module("optimizer"), module("optimizer.distrib_optimizer")
    assert optimizer.Adam is distributed.Adam is fused_adam.FusedAdam
    assert distributed.HAVE_APEX_OR_TE and not optimizer.USING_PYTORCH_OPTIMIZER


def install_beside_te() -> None:
    with mock.patch.object(module("optimizer"), "USING_PYTORCH_OPTIMIZER", False):
        before = module("optimizer.distrib_optimizer").Adam
        assert fused_adam.install() is False
        assert module("optimizer.distrib_optimizer").Adam is before


def test_fused_adam_is_installed_on_every_device_without_te_or_apex() -> None:
    assert isinstance(fused_adam.install, FunctionType)
    assert "cuda" not in inspect.getsource(fused_adam.install)
    in_fresh_fork(install_twice)
    in_fresh_fork(install_beside_te)


def test_ranks_are_adapted() -> None:
    run_ranks(1, enable_without_cuda_again)


def enable_without_cuda_again() -> None:
    assert isinstance(module("utils").torch, cpu_platform.TorchStandIn)
    assert module("optimizer").Adam is fused_adam.FusedAdam
