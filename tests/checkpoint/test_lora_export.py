"""What becomes of a LoRA run: resumed, exported merged or as an adapter, taken up by another run.

The judge is diffusers' own network, with the adapter as its ``load_lora_weights`` reads it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from typer.testing import CliRunner

from megagen.checkpoint.adapters import FILE, AdapterFile, InitialAdapters
from megagen.checkpoint.weights import find_checkpoint, open_role
from megagen.cli.convert import convert
from megagen.cli.train import run_training
from megagen.config.load import load_run_config
from megagen.core.errors import CheckpointError, MegagenError
from megagen.core.streams import Streams
from megagen.models.adapters import AdapterSpec
from megagen.models.wan import WanModel
from tests.trainer.synthetic import config_tree, write_config, write_dataset

LORA: dict[str, Any] = {"rank": 3, "alpha": 6.0, "target_modules": ["to_q", "attn1.to_out", "ffn"]}
SPEC = AdapterSpec(3, 6.0, tuple(LORA["target_modules"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a base, and a run of five steps with adapters on it."""
    folder = tmp_path_factory.mktemp("lora")
    write_dataset(folder / "data")
    write_base(folder / "base", seed=0)
    train(folder, "run")
    return folder


@pytest.fixture(scope="module")
def curve(place: Path) -> list[float]:
    """Losses and norms of that run."""
    return read_curve(place, "run")


def write_base(folder: Path, seed: int) -> None:
    architecture = config_tree(Path("x"), Path("x"))["models"]["student"]["architecture"]
    shape = {k: v for k, v in architecture.items() if not k.startswith("latents_")}
    model = WanTransformer3DModel(**shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def train(
    folder: Path, name: str, ranks: int = 1, *, lora: dict[str, Any] | None = None, **dotted: Any
) -> list[float]:
    """``megagen train`` with adapters; losses and gradient norms."""
    tree = config_tree(folder / "data", folder / name)
    tree["models"]["student"] = {
        "_target_": "wan",
        "init_from": str(folder / "base"),
        "lora": LORA if lora is None else lora,
    }
    file = write_config(folder / f"{name}.yaml", tree)
    config = load_run_config(file, {k.replace("__", "."): v for k, v in dotted.items()})
    run_training(config, ranks=ranks, fork=True)
    return read_curve(folder, name)


def read_curve(folder: Path, name: str) -> list[float]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [m[key] for m in map(json.loads, lines) for key in ("loss/total", "grad_norm/student")]


def export(folder: Path, run: str, output: Path, *words: object) -> Path:
    command = ["to-diffusers", "--checkpoint", folder / run, "--output", output, *words]
    result = CliRunner().invoke(convert, [str(w) for w in command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return output


def answer(model: WanTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 4, 2, 6, 4, generator=generator)
    text = torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        return model(latents, torch.tensor([200.0, 900.0]), text, return_dict=False)[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def with_adapter(base: Path, adapter: Path) -> WanTransformer3DModel:
    """As a user of diffusers would load it."""
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel.from_pretrained(base),
    )
    pipeline.load_lora_weights(adapter)
    return pipeline.transformer


@pytest.mark.parametrize("kind", ["weights", "ema"])
def test_merged_and_adapter_are_the_same_network(place: Path, tmp_path: Path, kind: str) -> None:
    merged = export(place, "run", tmp_path / "merged", "--weights", kind)
    adapter = export(place, "run", tmp_path / "adapter", "--weights", kind, "--lora", "adapter")
    base = answer(WanTransformer3DModel.from_pretrained(place / "base"))
    trained = answer(with_adapter(place / "base", adapter))
    assert relative(trained, base) > 1e-3
    assert relative(answer(WanTransformer3DModel.from_pretrained(merged)), trained) < 1e-5
    with safe_open(adapter / FILE, framework="pt") as file:
        names = set(file.keys())
    assert "transformer.blocks.2.attn1.to_out.0.lora_B.weight" in names
    assert not any("to_k" in name or "to_v" in name for name in names)
    before, after = (load_file(next(f.glob("*.safetensors"))) for f in (place / "base", merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        n.removeprefix("transformer.").replace("lora_A.", "") for n in names if "_A" in n
    }


def test_a_checkpoint_holds_adapters_alone(place: Path) -> None:
    checkpoint = find_checkpoint(place / "run")
    assert checkpoint is not None
    said = json.loads((checkpoint / "trainer.json").read_text())["adapters"]["student"]
    assert said["base"]["init_from"] == str(place / "base")
    stored = FileSystemReader(str(checkpoint / "state")).read_metadata().state_dict_metadata
    kept = {k: v for k, v in stored.items() if isinstance(v, TensorStorageMetadata)}
    assert kept and all(".lora." in name for name in kept), sorted(kept)
    adapters = sum(t.numel() for t in load_file(export_once(place) / FILE).values())
    sizes = [v.size.numel() for k, v in kept.items() if re.match(r"student\.(ema\.)?blocks", k)]
    assert sum(sizes) == 2 * adapters


def export_once(place: Path) -> Path:
    output = place / "adapter"
    if not output.exists():
        export(place, "run", output, "--lora", "adapter", "--weights", "weights")
    return output


def test_resume_is_bitwise(place: Path, curve: list[float]) -> None:
    train(place, "halves", training__loop__max_train_steps=3)
    assert train(place, "halves") == curve


def test_another_layout_is_the_same_run(place: Path, curve: list[float]) -> None:
    found = train(place, "tp2", 2, training__distributed__tp_size=2)
    assert found == pytest.approx(curve, rel=1e-5)
    outputs = [export(place, run, place / f"{run}_out") for run in ("tp2", "run")]
    networks = [answer(WanTransformer3DModel.from_pretrained(output)) for output in outputs]
    assert relative(*networks) < 1e-4


def resumed(place: Path, capfd: pytest.CaptureFixture[str], **changes: Any) -> str:
    """The error of a resumed run whose config or base is another."""
    name = "changed"
    shutil.copytree(place / "run", place / name, dirs_exist_ok=True)
    with pytest.raises(SystemExit) as stop:
        train(place, name, **changes, training__loop__max_train_steps=6)
    assert stop.value.code == CheckpointError.exit_code
    return capfd.readouterr().err


def test_resume_refuses_other_adapters_and_other_bases(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = resumed(place, capfd, lora={**LORA, "alpha": 3.0})
    assert "'student' have alpha 6.0 there, 3.0 in this run" in said
    said = resumed(place, capfd, lora={**LORA, "target_modules": ["to_q"]})
    assert "have modules 20 modules from" in said
    write_base(tmp_path / "base", seed=1)
    said = resumed(place, capfd, models__student__init_from=str(tmp_path / "base"))
    assert "trained on other base weights" in said


def test_export_finds_the_base_where_it_is_now(place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(place, moved, ignore=shutil.ignore_patterns("tp2*", "halves"))
    checkpoint = find_checkpoint(moved / "run")
    assert checkpoint is not None
    other = tmp_path / "other"
    write_base(other, seed=1)
    plugin = WanModel(WanModel.Options(init_from=str(place / "base")))
    with pytest.raises(CheckpointError, match="other weights than the adapters"):
        bare = WanModel(WanModel.Options(architecture=plugin.portable_options()["architecture"]))
        open_role(checkpoint, bare, "student", base=str(other))
    merged = export(moved, "run", tmp_path / "merged", "--base-weights", moved / "base")
    again = export(place, "run", tmp_path / "again")
    assert (
        relative(*(answer(WanTransformer3DModel.from_pretrained(p)) for p in (merged, again))) == 0
    )


def test_a_run_goes_on_from_an_adapter_or_from_a_merged_run(
    place: Path, curve: list[float]
) -> None:
    from_file = train(
        place,
        "from_file",
        lora={**LORA, "alpha": 3.0, "init_from": str(export_once(place))},
        training__loop__max_train_steps=1,
    )
    from_run = train(
        place,
        "from_run",
        models__student__init_from=str(place / "run"),
        training__loop__max_train_steps=1,
    )
    assert from_file[0] == pytest.approx(from_run[0], rel=1e-6)
    assert from_file[0] != pytest.approx(curve[0], rel=1e-3)
    merged = export(place, "from_run", place / "from_run_out")
    assert answer(WanTransformer3DModel.from_pretrained(merged)).isfinite().all()


# -- files --------------------------------------------------------------------------------------
def plugin_of(place: Path) -> WanModel:
    return WanModel(WanModel.Options(init_from=str(place / "base")))


def test_fresh_adapters_change_nothing_and_are_spread_as_peft_spreads_them(place: Path) -> None:
    plugin, streams = plugin_of(place), Streams(1)
    store = InitialAdapters(plugin, AdapterSpec(64, 64.0), streams, "student")
    values = torch.cat([store.read(n, None, 0, 1).flatten() for n in store.names() if "_A" in n])
    bound = 48**-0.5
    assert values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    name = "blocks.1.attn2.to_v.lora_A.weight"
    whole = store.read(name, None, 0, 1)
    assert torch.equal(store.read(name, 1, 1, 2), whole[:, 24:])
    assert not store.read(name.replace("_A", "_B"), None, 0, 1).any()
    other = InitialAdapters(plugin, AdapterSpec(64, 64.0), streams, "critic")
    assert not torch.equal(other.read(name, None, 0, 1), whole)


def test_files_of_others(place: Path, tmp_path: Path) -> None:
    """PEFT's prefix, and ``alpha`` beside each module, as other trainers write them."""
    plugin, ours = plugin_of(place), load_file(export_once(place) / FILE)
    theirs = {n.replace("transformer.", "base_model.model."): t for n, t in ours.items()}
    modules = {name.partition(".lora_")[0] for name in theirs}
    alphas = {f"{module}.alpha": torch.tensor(6.0) for module in modules}
    save_file({**theirs, **alphas}, tmp_path / "x.safetensors")
    half = AdapterSpec(3, 12.0, SPEC.target_modules)
    stores = [
        AdapterFile(export_once(place), plugin, SPEC, "x"),
        AdapterFile(tmp_path / "x.safetensors", plugin, SPEC, "x"),
        AdapterFile(tmp_path / "x.safetensors", plugin, half, "x"),
    ]
    for name in stores[0].names():
        tensors = [store.read(name, None, 0, 1) for store in stores]
        assert torch.equal(tensors[0], ours[f"transformer.{name}"])
        assert torch.equal(tensors[0], tensors[1])
        assert torch.equal(tensors[2], tensors[0] / 2 if "lora_B" in name else tensors[0])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (AdapterSpec(3, 3.0), "has no tensor 'blocks.0.attn1.to_k.lora_A.weight'"),
        (AdapterSpec(4, 6.0, SPEC.target_modules), r"as \[3, 48\], not \[4, 48\]"),
    ],
)
def test_files_that_do_not_fit(place: Path, spec: AdapterSpec, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        AdapterFile(export_once(place), plugin_of(place), spec, "models.student.lora.init_from")


def test_whole_networks_have_no_adapter_to_export(place: Path, tmp_path: Path) -> None:
    command = ["from-diffusers", "--model", place / "base", "--output", place / "full"]
    result = CliRunner().invoke(convert, [str(w) for w in command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    with pytest.raises(MegagenError, match="has no adapters: it was trained whole"):
        export(place, "full", tmp_path / "x", "--lora", "adapter")
