"""Distil a diffusers transformer to four steps in a plain PyTorch loop: no Megatron, no trainer.

    python examples/fastgen_custom_loop.py [--steps 300] [--out runs/fastgen]

The teacher is the small text-to-video Wan that comes with megagen (moving handwritten digits,
4 MB); ``--transformer`` takes another Wan directory with its ``sampling.json``. The loop alternates
one update of the student with two of the fake score (DMD2, arXiv 2405.14867), on prompts alone: a
student that simulates its own earlier steps needs no videos. It prints the losses, and for teacher
and student how blurred their clips are and how long one takes, and writes ``clips.png``: middle
frames of the teacher at 48 steps, at 4, and of the student at 4.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from torch import Tensor

import megagen.fastgen as mtf
from megagen.data.codecs import build_codec
from megagen.data.text import build_text_encoder

WEIGHTS = Path(mtf.__file__).parents[1] / "demo" / "weights"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIRECTIONS = ("left", "right", "up", "down")
GUIDANCE, SHIFT, BATCH = 2.5, 3.0, 16


def schedule(steps: int) -> list[float]:
    """``steps`` times from 1 towards 0 with the teacher's shift, and 0."""
    even = [1 - k / steps for k in range(steps + 1)]
    return [SHIFT * t / (1 + (SHIFT - 1) * t) for t in even]


def settings() -> mtf.DMDConfig:
    """Four steps, each trained on the student's own rollout up to it."""
    return mtf.DMDConfig(
        pred_type="flow",
        num_train_timesteps=1000,
        guidance_scale=GUIDANCE,
        student_sample_steps=4,
        student_sample_type="sde",
        backward_simulation=True,
        student_update_freq=3,
        sample_t_cfg={"time_dist_type": "shifted", "shift": SHIFT, "t_list": schedule(4)},
        ema={"decay": 0.98},
    )


class Prompts:
    """Embeddings of ``a three moving left`` and the like, and of no prompt."""

    def __init__(self, spec: dict[str, object], generator: torch.Generator) -> None:
        encoder = build_text_encoder(spec)
        texts = [f"a {digit} moving {way}" for way in DIRECTIONS for digit in DIGITS]
        self.embeds = encoder.encode(texts)[0]
        self.nothing = encoder.encode([""])[0]
        self.generator = generator

    def batch(self, size: int) -> Tensor:
        """``[B, L, D]`` of random prompts."""
        return self.embeds[torch.randint(len(self.embeds), (size,), generator=self.generator)]


def teacher_samples(
    pipeline: mtf.DMDPipeline, noise: Tensor, text: Tensor, nothing: Tensor, steps: int
) -> Tensor:
    """The guided teacher by Euler steps; the conditional and unconditional pass in one batch."""

    def guided(**call: Tensor) -> Tensor:
        both = {
            "hidden_states": torch.cat([call["hidden_states"]] * 2),
            "timestep": torch.cat([call["timestep"]] * 2),
            "encoder_hidden_states": torch.cat([text, nothing.expand_as(text)]),
        }
        cond, uncond = pipeline.teacher(**both).sample.chunk(2)
        return mtf.utils.classifier_free_guidance(cond, uncond, GUIDANCE)

    return pipeline.sample(noise, text, model=guided, t_list=schedule(steps), sample_type="ode")


def distil(pipeline: mtf.DMDPipeline, prompts: Prompts, shape: tuple[int, ...], steps: int) -> None:
    """The loop: everything that is DMD2 is in the three ``compute_*_loss`` and ``update_ema``."""
    config, generator = pipeline.config, prompts.generator
    optimizers = {
        "student": torch.optim.AdamW(pipeline.student.parameters(), lr=2e-4, betas=(0.0, 0.99)),
        "fake_score": torch.optim.AdamW(
            pipeline.fake_score.parameters(), lr=4e-4, betas=(0.0, 0.99)
        ),
    }
    shown: dict[str, float] = {}
    start = time.perf_counter()
    for step in range(steps):
        noise = torch.randn((BATCH, *shape), generator=generator)
        latents, text = torch.zeros_like(noise), prompts.batch(BATCH)
        if step % config.student_update_freq == 0:
            phase = "student"
            losses = pipeline.compute_student_loss(
                latents,
                noise,
                text,
                negative_encoder_hidden_states=prompts.nothing.expand_as(text),
                generator=generator,
            )
        else:
            phase = "fake_score"
            losses = pipeline.compute_fake_score_loss(latents, noise, text, generator=generator)
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(getattr(pipeline, phase).parameters(), 1.0)
        optimizers[phase].step()
        optimizers[phase].zero_grad()
        if phase == "student":
            pipeline.update_ema()
        shown[phase] = losses["total"].item()
        if step % 30 == 29:
            terms = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
            print(f"step {step + 1:4d}  {terms}  {time.perf_counter() - start:.0f} s", flush=True)


def picture(rows: list[Tensor], path: Path) -> None:
    """The middle frame of each clip; one row per ``[B, 3, T, H, W]`` in [0, 1]."""
    frames = [torch.cat(list(video[:, :, video.shape[2] // 2]), dim=-1) for video in rows]
    levels = torch.cat(frames, dim=1).permute(1, 2, 0).mul(255).round().byte()
    image = Image.fromarray(levels.numpy())
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Load, distil, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformer", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/fastgen"))
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    facts = json.loads((arguments.transformer / "sampling.json").read_text())
    codec, prompts = build_codec(facts["codec"]), Prompts(facts["text_encoder"], generator)
    teacher = WanTransformer3DModel.from_pretrained(arguments.transformer)
    frames, size = facts["num_frames"] // codec.temporal, facts["height"] // codec.spatial
    shape = (teacher.config.in_channels, frames, size, size)
    pipeline = mtf.DMDPipeline(
        copy.deepcopy(teacher), teacher, mtf.create_fake_score(teacher), settings()
    )
    noise = torch.randn((len(DIGITS), *shape), generator=generator)
    text = prompts.embeds[: len(DIGITS)]
    samplers: dict[str, Callable[[], Tensor]] = {
        f"teacher, {steps} steps": partial(
            teacher_samples, pipeline, noise, text, prompts.nothing, steps
        )
        for steps in (48, 4)
    }
    distil(pipeline, prompts, shape, arguments.steps)
    student = copy.deepcopy(pipeline.student)
    pipeline.ema.copy_to(student)
    samplers["student, 4 steps"] = lambda: pipeline.sample(
        noise, text, model=student, generator=generator
    )
    rows = []
    for name, sample in samplers.items():
        start = time.perf_counter()
        video = codec.decode(sample()).clamp(-1, 1).add(1).div(2)  # [B, 3, T, H, W]
        seconds = (time.perf_counter() - start) / len(video)
        # a digit is black and white: grey is what too few steps leave undecided
        blur = float((4 * video * (1 - video)).mean())
        print(f"{name:18s} blur {blur:.3f}  {seconds:.3f} s a clip")
        rows.append(video)
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture(rows, arguments.out / "clips.png")
    student.save_pretrained(arguments.out / "student")
    print(f"{arguments.out / 'clips.png'} and {arguments.out / 'student'} written")


if __name__ == "__main__":
    main()
