"""The forward pass and every gradient against diffusers' own class, fp32, random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from megagen.parallel.dims import ParallelDims
from megagen.parallel.launch import run_ranks
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

INPUTS = [
    ("t2v", 1, (3, 6, 10), "sample"),
    ("t2v", 3, (1, 2, 6), "sample"),
    ("t2v", 2, (3, 6, 10), "frame"),
    ("i2v", 3, (3, 6, 10), "sample"),
    ("flf2v", 1, (3, 6, 10), "sample"),
    ("flf2v", 3, (5, 2, 2), "sample"),
    ("ti2v", 1, (3, 6, 10), "token"),
    ("ti2v", 3, (2, 6, 6), "token"),
    ("plain_norm", 2, (4, 3, 10), "sample"),
]


@pytest.mark.parametrize(("case", "batch", "size", "timestep"), INPUTS)
def test_equals_diffusers(
    tmp_path: Path,
    generator: torch.Generator,
    case: str,
    batch: int,
    size: tuple[int, int, int],
    timestep: str,
) -> None:
    model = reference_model(CASES[case], generator)
    model.save_pretrained(tmp_path)
    request = make_request(CASES[case], generator, batch=batch, size=size, timestep=timestep)
    expected, gradients = reference_run(model, request)
    ((found, found_gradients),) = run_ranks(1, megagen_run, tmp_path, ParallelDims(), request, {})
    assert relative(found, expected) <= 1e-5
    error, name = worst(found_gradients, gradients)
    assert error <= 1e-4, name


@pytest.mark.parametrize(("case", "timestep"), [("i2v", "sample"), ("ti2v", "token")])
def test_bf16_is_as_exact_as_diffusers(
    tmp_path: Path, generator: torch.Generator, case: str, timestep: str
) -> None:
    model = reference_model(CASES[case], generator).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    request = make_request(CASES[case], generator, batch=2, timestep=timestep)
    exact, gradients = reference_run(model.float(), request)
    half = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    lowered = request.with_(
        latents_BCTHW=request.latents_BCTHW.bfloat16(),
        condition={name: value.bfloat16() for name, value in request.condition.items()},
    )
    theirs, their_gradients = reference_run(half, lowered)
    options = {"precision": "bf16"}
    ((ours, our_gradients),) = run_ranks(1, megagen_run, tmp_path, ParallelDims(), request, options)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) <= 1.5 * relative(theirs, exact)
    assert together(our_gradients, gradients) <= 1.5 * together(their_gradients, gradients)
    for name, gradient in our_gradients.items():
        assert gradient.dtype == their_gradients[name].dtype, name  # the same tensors stay fp32
