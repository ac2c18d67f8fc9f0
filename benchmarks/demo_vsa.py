"""Sparse against dense attention on the demo: quality after a short training, time of a long step.

    python -m benchmarks.demo_vsa            both; results go to benchmarks/results/
    python -m benchmarks.demo_vsa quality    the teacher, trained on with 75% of tiles left out
    python -m benchmarks.demo_vsa step       one training step at 2,048 tokens

Both arms of the quality part begin with the same weights, see the same clips and noise, and are
judged on the same held-out captions. The step is timed in process time, arms in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.measure import compare, write_result
from megagen.core import log
from megagen.core.streams import Streams
from megagen.demo import clips as clip_sets
from megagen.demo import processes
from megagen.demo.distil import export
from megagen.demo.judge import train_judge
from megagen.demo.rows import load, teacher_way, timed
from megagen.demo.run import WEIGHTS, DemoOptions, Phases, make_data
from megagen.demo.training import train

CONFIG = Path("configs/demo/vsa.yaml")
DENSE = {"models.student.attention": "{backend: sdpa}"}
LONG = (8, 32, 32)
"""Latent frames, height and width: 16 frames of 64 x 64 pixels, 8 x 16 x 16 tokens."""
SPARSITY = 0.75

app = typer.Typer(add_completion=False)


@app.command()
def both(out: Path = Path("runs/demo-vsa")) -> None:
    """Quality and step."""
    quality(out)
    step()


@app.command()
def quality(
    out: Path = Path("runs/demo-vsa"),
    steps: int = 2400,
    num_samples: int = 1000,
    solver_steps: int = 48,
    nproc: int = 2,
) -> None:
    """Train both arms, sample and judge; the demo's clips are made where ``out`` has none."""
    log.setup()
    options = DemoOptions(out=out)
    streams = Streams(options.seed)
    if not all((out / part / "dataset.json").is_file() for part in ("data", "held_out")):
        make_data(options, streams, Phases(2))
    asked = clip_sets.asked(num_samples, "held_out")
    judge = train_judge(streams, reference=clip_sets.from_dataset(out / "held_out"))
    result: dict[str, Any] = {
        "training_steps": steps,
        "num_samples": num_samples,
        "solver_steps": solver_steps,
        "sparsity": SPARSITY,
        "arms": {},
    }
    for name, keys in (("dense", DENSE), ("vsa", {})):
        given = {"training.data.data_path": out / "data", "training.loop.max_train_steps": steps}
        train(CONFIG, out / name, nproc, given | keys)
        export(out / name, out / f"{name}_student", WEIGHTS)
        way = teacher_way(solver_steps, options.distil.guidance_scale, options.seed)
        drawn = processes.together(nproc, _sample, out / f"{name}_student", asked, way)
        result["arms"][name] = judge.judge(drawn).as_dict()
        typer.echo(f"{name}: {result['arms'][name]}")
    typer.echo(write_result("demo_vsa_quality", result))


def _sample(directory: Path, asked: clip_sets.Clips, way: dict[str, Any]) -> clip_sets.Clips:
    return timed(load(directory), asked, way).clips


@app.command()
def step(threads: int = 1, pairs: int = 5, batch: int = 1, sparsity: float = SPARSITY) -> None:
    """Time one step at the long setting, dense and sparse in turn."""
    found = processes.together(1, _time_steps, threads, pairs, batch, sparsity)
    typer.echo(found)
    typer.echo(write_result("demo_vsa_step", found))


def _time_steps(threads: int, pairs: int, batch: int, sparsity: float) -> dict[str, Any]:
    from megagen.models.base import Request

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 8, *LONG, generator=generator)
    text = torch.randn(batch, 5, 64, generator=generator)
    target = torch.randn(latents.shape, generator=generator)
    request = Request(
        latents, torch.rand(batch, generator=generator) * 1000, {"text_embeds_BLD": text}
    )
    sparse = _role({"sparsity": sparsity})
    dense = _role(None)

    def run(role: Any) -> None:
        role.zero_grad()
        role.forward_backward([request], lambda v, _: {"loss": (v - target).square().mean()})
        role.step()

    timing = compare(lambda: run(sparse), lambda: run(dense), pairs=pairs, warmup=1)
    flops = {
        name: role.plugin.flops(latents.shape, 5)
        for name, role in (("vsa", sparse), ("dense", dense))
    }
    return {
        "tokens": sparse.plugin.num_tokens(latents.shape),
        "batch": batch,
        "threads": threads,
        "sparsity": sparsity,
        "forward_flops": flops,
        "vsa_against_dense": timing,
    }


def _role(vsa: dict[str, Any] | None) -> Any:
    """The demo's network and an optimizer."""
    from megagen.checkpoint.weights import open_weights
    from megagen.engine.role import OptimizerSettings, Role, RoleSettings
    from megagen.models.wan import WanModel
    from megagen.parallel.dims import ParallelDims
    from megagen.parallel.mesh import Mesh

    plugin = WanModel(WanModel.Options(init_from=str(WEIGHTS), vsa=vsa))
    dims, streams = ParallelDims(), Streams(0)
    settings = RoleSettings("student", dims, optimizer=OptimizerSettings(learning_rate=1e-4))
    store = open_weights(plugin, str(WEIGHTS), streams, "student", None)
    return Role.build(plugin, settings, data_layout=Mesh.build(dims), store=store)


if __name__ == "__main__":
    app()
