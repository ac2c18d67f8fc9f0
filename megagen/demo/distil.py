"""The demo's student: knowledge distillation, then DMD2, from captions alone.

Two runs of ``megagen train``, the second from the exported weights of the first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagen.demo import clips as clip_sets
from megagen.demo.rows import STUDENT_STEPS
from megagen.demo.training import train

Phase = Callable[[str, str], AbstractContextManager[None]]


@dataclass(frozen=True)
class DistilOptions:
    """The student's two runs.

    Args:
        kd, dmd2: their configs.
        num_ranks: of data parallelism.
        num_paths: teacher's paths that knowledge distillation learns, one a caption.
        guidance_scale: of the teacher.
        kd_steps, dmd2_steps: training steps; None: as the configs say.
    """

    kd: Path = Path("configs/demo/kd.yaml")
    dmd2: Path = Path("configs/demo/dmd2.yaml")
    num_ranks: int = 2
    num_paths: int = 320
    guidance_scale: float = 1.25
    kd_steps: int | None = None
    dmd2_steps: int | None = None


def distil(
    options: DistilOptions, teacher: Path, out: Path, text_encoder: Mapping[str, Any], phase: Phase
) -> None:
    """Leaves ``prompts/``, ``paths/``, ``kd/``, ``kd_student/``, ``dmd2/`` and ``student/``.

    Raises:
        MegagenError: a run failed.
    """
    write_prompts(out, options.num_paths, text_encoder)
    shutil.rmtree(out / "paths", ignore_errors=True)
    keys: dict[str, object] = {
        "models.student.init_from": teacher,
        "models.teacher.init_from": teacher,
        "training.data.data_path": out / "prompts",
    }
    with phase("kd", f"{options.num_paths} paths of the teacher, megagen train {options.kd}"):
        kd = keys | {
            "method.teacher_path_cache": out / "paths",
            "method.teacher_guidance_scale": options.guidance_scale,
            **steps_of(options.kd_steps),
        }
        train(options.kd, out / "kd", options.num_ranks, kd)
        export(out / "kd", out / "kd_student", teacher)
    with phase("dmd2", f"megagen train {options.dmd2}"):
        dmd2 = keys | {
            "models.student.init_from": out / "kd_student",
            "models.critic.init_from": teacher,
            "method.real_score_guidance_scale": options.guidance_scale,
            **steps_of(options.dmd2_steps, parts=3),
        }
        train(options.dmd2, out / "dmd2", options.num_ranks, dmd2)
        export(out / "dmd2", out / "student", teacher, STUDENT_STEPS[4])


def steps_of(steps: int | None, parts: int | None = None) -> dict[str, object]:
    """Overrides for a run of so many steps, with a checkpoint after each of ``parts`` parts."""
    if steps is None:
        return {}
    found: dict[str, object] = {"training.loop.max_train_steps": steps}
    if parts is not None:
        every = max(1, steps // parts)
        found["training.checkpoint.training_state_checkpointing_steps"] = every
    return found


def write_prompts(out: Path, count: int, text_encoder: Mapping[str, Any]) -> None:
    """``out/prompts``: a dataset of ``count`` captions, those of training in turn."""
    from megagen.data.prompts import encode_prompts, prompt_options

    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "prompts", ignore_errors=True)
    (out / "prompts.txt").write_text("\n".join(clip_sets.asked(count, "train").captions) + "\n")
    encode_prompts(
        prompt_options(
            {
                "prompts": str(out / "prompts.txt"),
                "output_dir": str(out / "prompts"),
                "text_encoder": dict(text_encoder),
            }
        )
    )


def export(run: Path, target: Path, teacher: Path, t_list: Sequence[float] | None = None) -> None:
    """A run's averaged weights as a diffusers directory that says how to decode and to sample.

    Args:
        run: of ``megagen train``.
        target: directory to make; what is there is removed.
        teacher: directory whose codec and text encoder are the student's.
        t_list: timesteps that the student is sampled at; None: those it was trained at.
    """
    from megagen.checkpoint.convert import Export, to_diffusers
    from megagen.config.load import load_run_config
    from megagen.sampling.source import few_step_way, read_spec, write_spec

    shutil.rmtree(target, ignore_errors=True)
    to_diffusers(Export(run, target))
    spec = read_spec(teacher)
    assert spec is not None, "the teacher's directory has sampling.json"
    way = few_step_way(load_run_config(run / "run.yaml", {}).method.own_options(), spec.flow_shift)
    if t_list is not None:
        way["t_list"] = list(t_list)
    write_spec(target, spec.model_copy(update=way))
