"""A DMD2 update cycle of megagen.fastgen against nvidia-modelopt's on the same networks, on CPU.

    python -m benchmarks.fastgen [--case score] [--threads 1] [--pairs 15]

A cycle is one student update and one update of the critics, in plain PyTorch over diffusers' Wan
with AdamW. ``score``: score distillation with guidance, the fake score as the only critic; ours
works off the batch sample by sample (``DMDPipeline.backward``), with the numbers of the whole.
``whole``: the same by the published calls alone, the batch at once. ``adversarial``: with a
discriminator on the teacher's features as well, whose step follows the fake score's; ours takes
both from one student forward and stops the gradient, and the forward, behind the last feature.

Time: both sides in one process, one cycle after the other. Memory: each side in a process of its
own, the peak of its resident memory over what it was before the networks were made. Nothing is
reported where the losses of both sides differ.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.measure import compare, reset_peak, resident_mb, write_result

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SIDES = {"ours": "megagen.fastgen", "theirs": "modelopt.torch.fastgen"}
ARCHITECTURE = {
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 4,
}
LATENTS, TEXT = (2, 16, 4, 24, 24), (2, 32, 128)  # 576 tokens a sample
COMMON = {"num_train_timesteps": 1000, "guidance_scale": 4.0, "student_sample_steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "score": {},
    "whole": {},
    "adversarial": {
        "gan_loss_weight_gen": 0.03,
        "gan_r1_reg_weight": 100.0,
        "gan_use_same_t_noise": True,
    },
}
FEATURE_BLOCK = 1


class Heads(nn.Module):
    """A discriminator on tokens: small beside the networks, the same on both sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.judge = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        """``[B, N, D]`` tokens of one block to logits ``[B, 1]``."""
        logits: Tensor = self.judge(features[0]).mean(dim=1)
        return logits


class Cycle:
    """One side: networks, optimizers and the update cycle; a call returns its losses."""

    def __init__(self, side: str, case: str) -> None:
        from diffusers import WanTransformer3DModel

        self.is_ours, self.case = side == "ours", case
        library = importlib.import_module(SIDES[side])
        torch.manual_seed(0)
        networks = {
            name: WanTransformer3DModel(**ARCHITECTURE)
            for name in ("student", "teacher", "fake_score")
        }
        adversarial = "gan_loss_weight_gen" in CASES[case]
        width = ARCHITECTURE["num_attention_heads"] * ARCHITECTURE["attention_head_dim"]
        judge = Heads(width) if adversarial else None
        self.pipeline = library.DMDPipeline(
            **networks, config=self._config(library, case), discriminator=judge
        )
        if adversarial:
            self._capture(networks["teacher"])
        trained = {"student": networks["student"], "fake_score": networks["fake_score"]}
        if judge is not None:
            trained["discriminator"] = judge
        self.optimizers = {
            name: torch.optim.AdamW(network.parameters(), lr=1e-5)
            for name, network in trained.items()
        }
        self.text, self.negative = torch.randn(TEXT), torch.randn(TEXT)
        self.latents = torch.randn(LATENTS)

    def _config(self, library: Any, case: str) -> Any:
        settings = {**COMMON, **CASES[case]}
        if not self.is_ours:
            return library.DMDConfig(**settings)
        return library.ExtendedDMDConfig(**settings, extensions={"early_exit": True})

    def _capture(self, teacher: Any) -> None:
        """Ours: our plugin. Theirs: their protocol, which they have no plugin for Wan for."""
        if self.is_ours:
            from megagen.fastgen.plugins import wan22

            wan22.attach_feature_capture(teacher, [FEATURE_BLOCK])
            return
        teacher._fastgen_captured = []
        teacher.blocks[FEATURE_BLOCK].register_forward_hook(
            lambda _module, _inputs, output: teacher._fastgen_captured.append(output)
        )

    def __call__(self) -> list[float]:
        torch.manual_seed(1)  # the same draws on both sides
        noise = torch.randn(LATENTS)
        given = (self.latents, noise, self.text)
        if self.is_ours and self.case == "score":
            return self._in_parts(given)
        student = self._update(
            "student",
            lambda: self.pipeline.compute_student_loss(
                *given, negative_encoder_hidden_states=self.negative
            ),
        )
        if self.is_ours and "discriminator" in self.optimizers:
            critics = self._update(
                "fake_score", lambda: self.pipeline.compute_critic_loss(*given), "discriminator"
            )
            return [student["total"], critics["fake_score"]]
        critics = self._update("fake_score", lambda: self.pipeline.compute_fake_score_loss(*given))
        if "discriminator" in self.optimizers:
            self._update("discriminator", lambda: self.pipeline.compute_discriminator_loss(*given))
        return [student["total"], critics["fake_score"]]

    def _in_parts(self, given: tuple[Tensor, ...]) -> list[float]:
        found = []
        for phase, more in (
            ("student", {"negative_encoder_hidden_states": self.negative}),
            ("fake_score", {}),
        ):
            losses = self.pipeline.backward(phase, *given, micro_batch_size=1, **more)
            self._step(phase)
            found.append(losses["total"].item())
        return found

    def _update(
        self, name: str, loss: Callable[[], dict[str, Tensor]], *more: str
    ) -> dict[str, float]:
        losses = loss()
        losses["total"].backward()
        self._step(name, *more)
        return {key: value.item() for key, value in losses.items()}

    def _step(self, *names: str) -> None:
        for name in names:
            self.optimizers[name].step()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()


@app.command()
def main(case: str = "", threads: int = 1, pairs: int = 15) -> None:
    """Measure time and memory of one case or of all, and write ``fastgen.json``."""
    result: dict[str, Any] = {"threads": threads, "pairs": pairs, "cases": {}}
    for name in [case] if case else list(CASES):
        timing = in_new_process("time", name, threads, pairs)
        peaks = {side: in_new_process(side, name, threads, 1) for side in SIDES}
        ratio = peaks["ours"]["peak_mb"] / peaks["theirs"]["peak_mb"]
        result["cases"][name] = {"time": timing, "memory": {**peaks, "peak_ratio": ratio}}
        typer.echo(
            f"{name}: time {timing['process_ratio']:.3f}x, peak memory {ratio:.3f}x "
            f"({peaks['ours']['peak_mb']:.0f} MB, theirs {peaks['theirs']['peak_mb']:.0f} MB)"
        )
    typer.echo(write_result("fastgen", result))


@app.command()
def part(what: str, name: str, threads: int, pairs: int) -> None:
    """One measurement in this process, printed as JSON."""
    torch.set_num_threads(threads)
    found = measure_time(name, pairs) if what == "time" else measure_memory(name, what)
    print(json.dumps(found))


def in_new_process(what: str, name: str, threads: int, pairs: int) -> dict[str, Any]:
    """``part`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fastgen", "part", what, name]
    done = subprocess.run(
        [*command, str(threads), str(pairs)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_time(name: str, pairs: int) -> dict[str, Any]:
    """Ratios of neighbouring cycles; the losses of the first must agree."""
    ours, theirs = Cycle("ours", name), Cycle("theirs", name)
    losses = [ours(), theirs()]
    if any(abs(mine - other) > 1e-5 * abs(other) for mine, other in zip(*losses, strict=True)):
        raise SystemExit(f"losses differ, {losses}: not timed")
    return {"losses": losses, **compare(ours, theirs, pairs=pairs, warmup=1)}


def measure_memory(name: str, side: str) -> dict[str, Any]:
    """Peak over what was resident after the imports of both sides."""
    for library in (*SIDES.values(), "diffusers.models.transformers.transformer_wan"):
        importlib.import_module(library)
    before = resident_mb("VmRSS")
    cycle = Cycle(side, name)
    cycle()
    reset_peak()
    for _ in range(3):
        cycle()
    return {"peak_mb": resident_mb("VmHWM") - before}


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "part":
        app()
    else:
        typer.run(main)
