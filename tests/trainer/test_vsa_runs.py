"""Runs with sparse attention: layouts, a sparsity that rises, resume, and the gate on its way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from megagen.cli.convert import convert
from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from megagen.core.errors import ConfigError
from tests.trainer.synthetic import config_tree, write_config, write_dataset
from tests.trainer.test_runs import curve, read_metrics

# 2 x 3 x 2 tokens: 4 tiles, of which a tile sees 4, 3 and then 2
VSA: dict[str, Any] = {
    "sparsity": 0.5,
    "tile": [1, 2, 2],
    "decay_rate": 0.25,
    "decay_interval_steps": 2,
}
SPARSE = {"backend": "vsa", "vsa": VSA}
GATE = "blocks.0.to_gate_compress.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def run(
    data: Path,
    output: Path,
    ranks: int = 1,
    *,
    attention: dict[str, Any] | None = SPARSE,
    student: dict[str, Any] | None = None,
    steps: int = 6,
    **distributed: Any,
) -> list[dict[str, float]]:
    tree = config_tree(data, output, distributed=distributed)
    tree["models"]["student"]["architecture"]["attention_head_dim"] = 16  # the CPU kernels serve it
    tree["models"]["student"] |= student or {}
    if "init_from" in tree["models"]["student"]:
        del tree["models"]["student"]["architecture"]
    tree["models"]["student"]["attention"] = attention or {}
    tree["training"]["loop"]["max_train_steps"] = steps
    tree["training"]["data"]["global_batch_size"] = 4
    config = load_run_config(write_config(output.parent / f"{output.name}.yaml", tree))
    run_training(config, ranks=ranks, fork=True)
    return read_metrics(output)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    run(data, output)
    return output


def test_the_sparsity_rises(whole: Path) -> None:
    metrics = read_metrics(whole)
    assert [m["vsa_sparsity/student"] for m in metrics] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    work = [m["tflops_per_gpu"] * m["step_time_sec"] for m in metrics]
    assert work[0] == pytest.approx(work[1]) and work[0] > 1.001 * work[2] > 1.002 * work[4]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {}),
        (2, {"pp_size": 2, "virtual_pp_size": 2}),
        (4, {"tp_size": 2, "cp_size": 2, "sequence_parallel": True}),
    ],
)
def test_same_run_under_layouts(
    ranks: int, layout: dict[str, Any], data: Path, tmp_path: Path, whole: Path
) -> None:
    metrics = run(data, tmp_path / "run", ranks, **layout)
    assert curve(metrics) == pytest.approx(curve(read_metrics(whole)), rel=1e-5)


def test_resume_is_bitwise_while_it_rises(data: Path, tmp_path: Path, whole: Path) -> None:
    run(data, tmp_path / "run", steps=3)
    again = run(data, tmp_path / "run")
    assert curve(again) == curve(read_metrics(whole))


# -- the gate on its way ---------------------------------------------------------------------------
def call(*words: object) -> None:
    result = CliRunner().invoke(convert, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_the_gate_survives_conversion(data: Path, tmp_path: Path, whole: Path) -> None:
    out, run_folder, back = tmp_path / "out", tmp_path / "converted", tmp_path / "back"
    call("to-diffusers", "--checkpoint", whole, "--output", out)
    file = "diffusion_pytorch_model.safetensors"
    tensors = load_file(out / file)
    assert tensors[GATE].shape == (64, 64) and tensors[GATE].norm() > 0
    assert json.loads((out / "config.json").read_text())["_vsa"]["sparsity"] == 0.5
    WanTransformer3DModel.from_pretrained(out)  # which leaves out what it does not know
    call("from-diffusers", "--model", out, "--output", run_folder, "--nproc", 2, "--tp-size", 2)
    call("to-diffusers", "--checkpoint", run_folder, "--output", back)
    again = load_file(back / file)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    # it is taken up by a role that says nothing of attention, and by one with another sparsity
    less = {"backend": "vsa", "vsa": {"sparsity": 0.25, "tile": "auto", "kernels": "reference"}}
    for source, attention, sparsity in ((out, less, 0.25), (run_folder, None, 0.0)):
        init = {"init_from": str(source)}
        output = tmp_path / f"again_{source.name}"
        (metrics,) = run(data, output, attention=attention, student=init, steps=1)
        assert metrics["vsa_sparsity/student"] == sparsity


def refuses(why: str, capfd: pytest.CaptureFixture[str], *args: Any, **kwargs: Any) -> None:
    """The run's own process ends with an error that says why."""
    with pytest.raises(SystemExit):
        run(*args, **kwargs)
    assert re.search(why, capfd.readouterr().err.replace("\n", " "))


def test_dense_weights_get_a_gate_of_zeros(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dense = run(data, tmp_path / "dense", attention=None, steps=2)
    assert "vsa_sparsity/student" not in dense[0]
    init = {"init_from": str(tmp_path / "dense")}
    (sparse,) = run(data, tmp_path / "sparse", student=init, steps=1)
    (plain,) = run(data, tmp_path / "plain", attention=None, student=init, steps=1)
    assert sparse["loss/total"] == pytest.approx(plain["loss/total"], rel=1e-5)
    refuses(r"without sparse attention.*init_from", capfd, data, tmp_path / "dense", steps=3)


def test_a_sparse_run_is_not_resumed_dense(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(data, tmp_path / "run", steps=1)
    refuses("was trained with sparse attention", capfd, data, tmp_path / "run", attention=None)


def test_adapters_of_the_gate(data: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 2, "target_modules": ["to_gate_compress", "to_q"]}}
    metrics = run(data, tmp_path / "run", 2, student=lora, tp_size=2, steps=2)
    one = run(data, tmp_path / "one", student=lora, steps=2)
    assert curve(metrics) == pytest.approx(curve(one), rel=1e-5)
    call("to-diffusers", "--checkpoint", tmp_path / "run", "--output", tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")[GATE].norm() > 0


# -- options ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("attention", "layout", "why"),
    [
        ({"backend": "vsa"}, {}, "vsa with its sparsity"),
        ({"backend": "sdpa", "vsa": VSA}, {}, "set backend to vsa"),
        ({"backend": "vsa", "vsa": {**VSA, "sparsity": 1.0}}, {}, "less than 1"),
        ({"backend": "vsa", "vsa": {**VSA, "tile": [4, 4, 5]}}, {}, "80 tokens"),
        ({"backend": "vsa", "vsa": {**VSA, "sparsty": 0.5}}, {}, "did you mean 'sparsity'"),
        ({"backend": "vsa", "vsa": {**VSA, "kernels": "gpu"}}, {}, "unknown kernels"),
        ({"backend": "vsa", "vsa": {"sparsity": 0.5, "decay_rate": 0.1}}, {}, "go together"),
        (SPARSE, {"cp_size": 2, "cp_comm_type": "p2p"}, "cp_comm_type.*a2a"),
        (SPARSE, {"cp_size": 2, "cp_comm_type": "all_gather"}, "cp_comm_type.*a2a"),
        (SPARSE, {"cp_size": 2, "cp_comm_type": "a2a+p2p", "cp_a2a_size": 1}, "Set it to a2a"),
    ],
)
def test_what_cannot_be_is_refused(
    attention: dict[str, Any], layout: dict[str, Any], why: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why):
        run(data, tmp_path / "run", layout.get("cp_size", 1), attention=attention, **layout)


def test_vsa_belongs_to_attention(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vsa is a key of attention"):
        run(data, tmp_path / "run", attention=None, student={"vsa": VSA})
