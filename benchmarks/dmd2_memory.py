"""Peak memory of a rank in a DMD2 run, against the layout of its three networks, on the CPU.

    python -m benchmarks.dmd2_memory [--case tp2]

Student, teacher and critic are Wans of 12 layers of 384 with 256 tokens a sample, two samples a
step, fp32, full recompute; a run makes four steps, two of them with both updates. A rank's figure
is the peak of its resident memory over what it was before the networks were made. Bytes of weights
are counted, each storage once. Every layout has processes of its own; losses must agree before
anything is written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.measure import reset_peak, resident_mb, write_result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

LATENT_SHAPE, TEXT_SHAPE = (16, 4, 16, 16), (16, 64)
STEPS = 4
ARCHITECTURE = {
    "num_layers": 12,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "ffn_dim": 1536,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_SHAPE[1],
    "freq_dim": 64,
}
LORA = {"rank": 16}
CASES: dict[str, tuple[int, dict[str, Any], bool | None]] = {
    # ranks, training.distributed, LoRA: None without, else share_base
    "1": (1, {}, None),
    "tp2": (2, {"tp_size": 2, "sequence_parallel": True}, None),
    "cp2": (2, {"cp_size": 2}, None),
    "pp2": (2, {"pp_size": 2}, None),
    "dp2, distributed optimizer": (2, {"use_distributed_optimizer": True}, None),
    "dp2, plain optimizer": (2, {"use_distributed_optimizer": False}, None),
    "1, LoRA": (1, {}, False),
    "1, LoRA, share_base": (1, {}, True),
}


def config_tree(folder: Path, layout: dict[str, Any], shares: bool | None) -> dict[str, Any]:
    """A run on text alone; with LoRA the teacher stays the base."""
    network: dict[str, Any] = {"_target_": "wan", "init_from": str(folder / "weights")}
    models = {role: dict(network) for role in ("student", "teacher", "critic")}
    models["teacher"]["trainable"] = False
    if shares is not None:
        for role in ("student", "critic"):
            models[role]["lora"] = {**LORA, "share_base": shares}
        if shares:
            models["teacher"]["lora"] = {"share_base": True}
    return {
        "models": models,
        "method": {
            "_target_": "dmd2",
            "rollout_mode": "simulate",
            "dmd_denoising_steps": [1000, 500],
            "generator_update_interval": 2,
            "real_score_guidance_scale": 1.0,
        },
        "training": {
            "distributed": layout,
            "recompute": "full",
            "data": {
                "data_path": str(folder / "data"),
                "preprocessed_data_type": "text_only",
                "latent_shape": list(LATENT_SHAPE),
                "micro_batch_size": 1,
                "global_batch_size": 2,
                "text_len": TEXT_SHAPE[0],
            },
            "optimizer": {"learning_rate": 1e-5},
            "loop": {"max_train_steps": STEPS},
            "checkpoint": {"output_dir": str(folder / "run")},
            "seed": 1,
        },
    }


def write_weights(folder: Path) -> None:
    """What all three networks begin with."""
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    WanTransformer3DModel(**ARCHITECTURE).save_pretrained(folder / "weights")


def write_texts(folder: Path) -> None:
    """Random text embeddings in FastVideo's columns."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(8):
        array = random.standard_normal(TEXT_SHAPE).astype(np.float32)
        rows.append(
            {
                "id": str(number),
                "caption": str(number),
                "text_embedding_bytes": array.tobytes(),
                "text_embedding_shape": list(TEXT_SHAPE),
                "text_embedding_dtype": "float32",
            }
        )
    (folder / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "data.parquet")


def measure_rank(tree: dict[str, Any]) -> dict[str, Any]:
    """Build the run on this rank, make its steps."""
    from megagen.builder import build_plugins, build_run
    from megagen.config.schema import RunConfig
    from megagen.core.options import parse_options

    before = resident_mb("VmRSS")
    config = parse_options(RunConfig, tree, "")
    run = build_run(config, build_plugins(config))
    reset_peak()
    losses = []
    for step in range(STEPS):
        found = run.method.train_step(run.loader.step_batches(step), step)
        losses.append(found.metrics["loss/fake_score"])
    run.loader.close()
    seen = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for role in run.roles.values()
        for chunk in role.chunks
        for p in chunk.parameters()
    }
    return {
        "peak_mb": round(resident_mb("VmHWM") - before, 1),
        "weights_mb": round(sum(seen.values()) / 2**20, 1),
        "losses": losses,
    }


@app.command()
def part(case: str) -> None:
    """One layout, printed as JSON: a list with an object per rank."""
    from megagen.parallel.launch import run_ranks

    ranks, layout, shares = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder)
        if run_ranks(1, write_weights, folder) != [None]:  # beside, so that no rank inherits them
            raise SystemExit("no weights")
        tree = config_tree(folder, layout, shares)
        found = run_ranks(ranks, measure_rank, tree, timeout=900)
    print(json.dumps(found))


@app.command()
def main(case: str = "") -> None:
    """Measure one layout or all, and write ``dmd2_memory.json``."""
    result: dict[str, Any] = {}
    wanted: dict[bool, list[float]] = {}
    for name in [case] if case else list(CASES):
        command = [sys.executable, "-m", "benchmarks.dmd2_memory", "part", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        result[name] = [
            {key: value for key, value in rank.items() if key != "losses"} for rank in found
        ]
        losses = [
            sum(ranks) / len(found) for ranks in zip(*(r["losses"] for r in found), strict=True)
        ]
        first = wanted.setdefault("LoRA" in name, losses)
        if any(abs(a - b) > 1e-4 * abs(b) for a, b in zip(losses, first, strict=True)):
            raise SystemExit(f"{name}: losses {losses} are not {first}: nothing is reported")
        peaks = ", ".join(f"{rank['peak_mb']:.0f}" for rank in found)
        weights = ", ".join(f"{rank['weights_mb']:.0f}" for rank in found)
        typer.echo(f"{name:28s} peak {peaks} MB a rank, weights {weights} MB")
    if not case:
        typer.echo(write_result("dmd2_memory", {"steps": STEPS, "layouts": result}))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "part":
        app()
    else:
        typer.run(main)
