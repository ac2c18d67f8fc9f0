"""Wan on a CUDA device: against diffusers there, and the backends that a CPU cannot run.

Each needs one GPU; flash-attention and Transformer Engine are tested where they can be imported.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from megagen.models.base import Request
from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import init_distributed
from tests import seeds
from tests.models.wan_cases import (
    CASES,
    make_request,
    megagen_run,
    reference_model,
    reference_run,
    relative,
    together,
    worst,
)

pytestmark = pytest.mark.gpu

# Transformer Engine and flash-attention want sizes that divide by 16
ROUND: dict[str, Any] = {
    **CASES["t2v"],
    "attention_head_dim": 32,
    "text_dim": 32,
    "ffn_dim": 256,
}


@pytest.fixture
def generator() -> torch.Generator:
    seed = seeds.fresh()
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def exact_fp32() -> None:
    init_distributed()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _on_device(request: Request) -> Request:
    return Request(
        request.latents_BCTHW.cuda(),
        request.timestep.cuda(),
        {name: value.cuda() for name, value in request.condition.items()},
        {name: value.cuda() for name, value in request.extra.items()},
    )


def _ours(directory: Path, request: Request, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    found, gradients = megagen_run(directory, ParallelDims(), request, options)
    assert found is not None
    return found, gradients


@pytest.mark.parametrize(
    ("case", "timestep"),
    [("t2v", "frame"), ("i2v", "sample"), ("flf2v", "sample"), ("ti2v", "token")],
)
def test_equals_diffusers_in_fp32(
    tmp_path: Path, generator: torch.Generator, case: str, timestep: str
) -> None:
    model = reference_model(CASES[case], generator)
    model.save_pretrained(tmp_path)
    request = _on_device(make_request(CASES[case], generator, batch=3, timestep=timestep))
    expected, gradients = reference_run(model.cuda(), request)
    found, found_gradients = _ours(tmp_path, request)
    assert relative(found, expected) <= 1e-5
    error, name = worst(found_gradients, gradients)
    assert error <= 1e-4, name


def _bf16_errors(
    tmp_path: Path, generator: torch.Generator, arch: dict[str, Any]
) -> tuple[Request, tuple[Tensor, dict[str, Tensor]], float, float]:
    """The request, the exact answer, and diffusers' error in bf16 of prediction and gradient."""
    model = reference_model(arch, generator).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    request = _on_device(make_request(arch, generator, batch=2, size=(4, 8, 16)))
    exact = reference_run(model.float().cuda(), request)
    half = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).cuda()
    lowered = request.with_(
        latents_BCTHW=request.latents_BCTHW.bfloat16(),
        condition={name: value.bfloat16() for name, value in request.condition.items()},
    )
    theirs, gradients = reference_run(half, lowered)
    return request, exact, relative(theirs, exact[0]), together(gradients, exact[1])


BF16: list[Any] = [
    pytest.param({}, id="sdpa"),
    pytest.param({"recompute": "full"}, id="full"),
    pytest.param({"recompute": "selective"}, id="selective"),
    pytest.param({"attention_backend": "flash"}, id="flash"),
    pytest.param({"attention_backend": "te"}, id="te-attention"),
    pytest.param({"transformer_impl": "transformer_engine"}, id="te-linears"),
    pytest.param(
        {"transformer_impl": "transformer_engine", "recompute": "full"}, id="te-linears-full"
    ),
]


def _skip_unless_importable(options: dict[str, Any]) -> None:
    if options.get("attention_backend") == "flash" and not _importable("flash_attn"):
        pytest.skip("flash_attn is not installed")
    wants_te = "transformer_impl" in options or options.get("attention_backend") == "te"
    if wants_te and not _importable("transformer_engine.pytorch"):
        pytest.skip("transformer_engine is not installed")


@pytest.mark.parametrize("options", BF16)
def test_bf16_is_as_exact_as_diffusers(
    tmp_path: Path, generator: torch.Generator, options: dict[str, Any]
) -> None:
    _skip_unless_importable(options)
    request, exact, their_error, their_gradient_error = _bf16_errors(tmp_path, generator, ROUND)
    found, gradients = _ours(tmp_path, request, precision="bf16", **options)
    assert found.dtype == torch.bfloat16
    assert relative(found, exact[0]) <= 1.5 * their_error
    assert together(gradients, exact[1]) <= 1.5 * their_gradient_error


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fp8_stays_near(tmp_path: Path, generator: torch.Generator, recompute: str) -> None:
    options = {"transformer_impl": "transformer_engine", "fp8": True, "recompute": recompute}
    _skip_unless_importable(options)
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the device has no fp8")
    request, exact, _, _ = _bf16_errors(tmp_path, generator, ROUND)
    # 8 text tokens x 2 samples: Transformer Engine's fp8 wants rows that divide by 8
    text = request.condition["text_embeds_BLD"]
    padded = torch.cat([text, text.new_zeros(2, 1, text.size(-1))], dim=1)
    request = request.with_(condition={"text_embeds_BLD": padded})
    plain, _ = _ours(tmp_path, request, precision="bf16")
    found, gradients = _ours(tmp_path, request, precision="bf16", **options)
    assert 0 < relative(found, plain) < 0.15
    assert gradients.keys() == exact[1].keys()
    assert all(torch.isfinite(value).all() for value in gradients.values())
