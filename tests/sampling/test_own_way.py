"""A few-step student's directory says how it is sampled; what the user gives comes first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megagen.cli import sample as command
from megagen.cli.main import main
from megagen.sampling import source
from megagen.sampling.flow import shift_sigma
from megagen.sampling.pipeline import SamplingOptions
from tests.sampling.test_pipeline import CODEC, TEXT, write_model

FEW: dict[str, Any] = {"t_list": [1000.0, 750.0, 300.0, 0.0], "sampler": "sde"}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("student"))
    spec = source.SamplingSpec(
        codec=CODEC, text_encoder=TEXT, height=8, guidance_scale=1.0, context_noise=20.0, **FEW
    )
    source.write_spec(folder, spec)
    return folder


def asked(model: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> SamplingOptions:
    """The options with which ``megagen sample`` starts its ranks."""
    found: list[Any] = []
    monkeypatch.setattr(command, "_start", lambda nproc, dims, arguments: found.append(arguments))
    size = ("--num-frames", "3", "--width", "12")
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "--model", str(model), "--prompt", "rain", *size, *words])
    assert not stopped.value.code
    options = found[0][4]
    assert isinstance(options, SamplingOptions)
    return options


def test_a_student_needs_no_options(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = asked(student, monkeypatch)
    assert (options.t_list, options.sampler) == (FEW["t_list"], "sde")
    assert options.guidance_scale == 1.0 and options.stream is None


def test_a_teacher_gets_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = asked(write_model(tmp_path), monkeypatch)
    assert (options.t_list, options.sampler, options.num_steps) == (None, "unipc", 50)
    assert options.guidance_scale == 5.0


def test_what_is_given_comes_first(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = asked(student, monkeypatch, "--t-list", "1000,500", "--guidance-scale", "2")
    assert (options.t_list, options.guidance_scale) == ([1000, 500, 0], 2.0)
    assert options.sampler == "sde"
    options = asked(student, monkeypatch, "--steps", "7", "--sampler", "euler")
    assert (options.t_list, options.num_steps, options.sampler) == (None, 7, "euler")
    options = asked(student, monkeypatch, "--guidance-scale", "0")
    assert options.guidance_scale == 0.0


def test_a_stream_takes_them_too(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = asked(student, monkeypatch, "--stream").stream
    assert stream is not None
    assert (stream.t_list, stream.sample_type, stream.context_noise) == (FEW["t_list"], "sde", 20.0)
    words = ("--stream", "--sample-type", "ode", "--context-noise", "0", "--t-list", "1000,100")
    stream = asked(student, monkeypatch, *words).stream
    assert stream is not None
    assert (stream.t_list, stream.sample_type, stream.context_noise) == ([1000, 100, 0], "ode", 0.0)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, {}),
        ({"t_list": [1000, 500, 0]}, {"t_list": [1000, 500, 0], "sampler": "sde"}),
        ({"dmd_denoising_steps": [1000, 500]}, {"t_list": [1000, 500, 0], "sampler": "sde"}),
        (
            {"t_list": [1000, 0], "student_sample_type": "ode", "context_noise": 0},
            {"t_list": [1000, 0], "sampler": "euler", "context_noise": 0.0},
        ),
        (
            {"t_list": [1000, 500, 0], "teacher_path_cache": "paths"},
            {"t_list": [1000, 500, 0], "sampler": "euler"},
        ),
        (
            {"dmd_denoising_steps": [1000, 500], "warp_denoising_step": True},
            {"t_list": [1000, 1000 * shift_sigma(0.5, 3.0), 0], "sampler": "sde"},
        ),
    ],
)
def test_the_way_of_a_methods_student(method: dict[str, Any], expected: dict[str, Any]) -> None:
    found = source.few_step_way(method, shift=3.0)
    assert found == (expected | {"guidance_scale": 1.0} if expected else {})
